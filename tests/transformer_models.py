"""Small random transformers of every family of autoprune/families, with inputs; built when asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

MISSING = "needs transformers (pip install 'autoprune[transformers]')"
TOKENS, IMAGE = 9, 32
LAYERS = {"num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "max_position_embeddings": 40, **LAYERS}
PICTURE = {"hidden_size": 32, "intermediate_size": 48, "image_size": IMAGE, "patch_size": 8, **LAYERS}
GROUPED = {**TEXT, "num_key_value_heads": 2}
T5 = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
WHISPER = {
    **{"vocab_size": 64, "d_model": 32, "encoder_layers": 2, "decoder_layers": 1, "encoder_attention_heads": 4},
    **{"decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "num_mel_bins": 8},
    **{"max_source_positions": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    "decoder_start_token_id": 1,
}
SEGFORMER = {
    **{"hidden_sizes": [16, 32], "depths": [1, 1], "num_encoder_blocks": 2, "sr_ratios": [2, 1]},
    **{"num_attention_heads": [2, 4], "mlp_ratios": [2, 2], "patch_sizes": [7, 3], "strides": [4, 2]},
    **{"decoder_hidden_size": 16, "num_labels": 5},
}


@dataclass(frozen=True)
class Small:
    """A model by the names of its configuration and class, and how many groups of each kind it has."""

    config: str
    model: str
    settings: Mapping[str, Any]
    kinds: Mapping[str, int]
    inputs: str = "masked"
    part: Callable[[Any], nn.Module] = lambda model: model

    def build(self) -> nn.Module:
        """The model in eval mode, with the same random weights at every call; skips where transformers is missing."""
        if not self.config:  # of torch itself
            torch.manual_seed(0)
            return self.part(None).eval()
        library = pytest.importorskip("transformers", reason=MISSING)
        torch.manual_seed(0)
        model = getattr(library, self.model)(getattr(library, self.config)(**self.settings))
        return self.part(model).eval()

    def example(self) -> Any:
        """Two samples; the second sentence is shorter than the first."""
        draws = torch.Generator().manual_seed(1)
        if self.inputs == "image":
            return (torch.randn(2, 3, IMAGE, IMAGE, generator=draws),)
        if self.inputs == "vectors":
            return (torch.randn(2, TOKENS, 32, generator=draws),)
        if self.inputs == "sound":
            return (torch.randn(2, 8, IMAGE, generator=draws),)
        ids = torch.randint(3, 60, (2, TOKENS), generator=draws)
        if self.inputs == "plain":
            return {"input_ids": ids}
        mask = torch.ones_like(ids)
        mask[1, 6:] = 0
        return {"input_ids": ids, "attention_mask": mask}


class Vectors(nn.Module):
    """torch.nn's own encoder over vectors, and a linear layer over their mean."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 48, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.encoder(x).mean(1))
        return logits


class Translator(nn.Module):
    """torch.nn.Transformer: a decoder layer attends to itself and to what the encoder says."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer = nn.Transformer(32, 4, 1, 1, 48, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1] - 2, dtype=x.dtype)
        out: Tensor = self.transformer(x, x[:, 2:], tgt_mask=mask, tgt_is_causal=True)
        return out


TWO = {"head": 2, "neuron": 2, "block": 4}
TIED = {"head": 1, "neuron": 2, "block": 2}
FEW = {"kv_group": 2, "neuron": 2, "block": 4}
MODELS = {
    "bert": Small("BertConfig", "BertModel", TEXT, TWO),
    "roberta": Small("RobertaConfig", "RobertaForSequenceClassification", TEXT, TWO),
    "electra": Small("ElectraConfig", "ElectraModel", {**TEXT, "embedding_size": 32}, TWO),
    "distilbert": Small(
        "DistilBertConfig",
        "DistilBertModel",
        {"vocab_size": 64, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "max_position_embeddings": 40},
        TWO,
    ),
    "mpnet": Small("MPNetConfig", "MPNetModel", TEXT, {**TIED, "block": 4}),
    "llama": Small("LlamaConfig", "LlamaForCausalLM", GROUPED, FEW, "plain"),
    "mistral": Small("MistralConfig", "MistralForCausalLM", GROUPED, FEW),
    "qwen2": Small("Qwen2Config", "Qwen2ForCausalLM", GROUPED, FEW, "plain"),
    "qwen3": Small("Qwen3Config", "Qwen3ForCausalLM", {**GROUPED, "head_dim": 8}, FEW, "plain"),
    "gemma": Small("GemmaConfig", "GemmaForCausalLM", {**GROUPED, "head_dim": 8}, FEW, "plain"),
    "gemma2": Small("Gemma2Config", "Gemma2ForCausalLM", {**GROUPED, "head_dim": 8}, FEW, "plain"),
    "gpt2": Small(
        "GPT2Config",
        "GPT2LMHeadModel",
        {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 40},
        TWO,
        "plain",
    ),
    "gpt_neox": Small("GPTNeoXConfig", "GPTNeoXForCausalLM", TEXT, TWO, "plain"),
    "opt": Small("OPTConfig", "OPTForCausalLM", {**TEXT, "ffn_dim": 48, "word_embed_proj_dim": 32}, TWO),
    "t5": Small("T5Config", "T5EncoderModel", T5, TIED),
    "t5_gated": Small("T5Config", "T5EncoderModel", {**T5, "feed_forward_proj": "gated-gelu"}, TIED),
    "vit": Small("ViTConfig", "ViTForImageClassification", PICTURE, TWO, "image"),
    "deit": Small("DeiTConfig", "DeiTModel", PICTURE, TWO, "image"),
    "dinov2": Small("Dinov2Config", "Dinov2Model", {**PICTURE, "mlp_ratio": 2}, TWO, "image"),
    "dinov2_gated": Small(
        "Dinov2Config", "Dinov2Model", {**PICTURE, "mlp_ratio": 2, "use_swiglu_ffn": True}, TWO, "image"
    ),
    "segformer": Small(
        "SegformerConfig", "SegformerForSemanticSegmentation", SEGFORMER, {**TWO, "channel": 3}, "image"
    ),
    "clip_vision": Small("CLIPVisionConfig", "CLIPVisionModel", PICTURE, TWO, "image"),
    "clip_text": Small("CLIPTextConfig", "CLIPTextModel", {**TEXT, "eos_token_id": 63}, TWO, "plain"),
    "torch_encoder": Small("", "", {}, {**TWO, "block": 2}, "vectors", lambda _: Vectors()),
    "torch_transformer": Small("", "", {}, {"head": 3, "neuron": 2, "block": 2}, "vectors", lambda _: Translator()),
    "whisper": Small("WhisperConfig", "WhisperModel", WHISPER, TWO, "sound", lambda model: model.get_encoder()),
}
