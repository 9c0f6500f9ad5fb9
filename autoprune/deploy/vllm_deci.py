"""vLLM's DeciLM (`vllm/model_executor/models/nemotron_nas.py`): layers without attention, of other widths, or empty.

What that file does, and what follows for a policy:

- `DeciLMDecoderLayer` makes neither attention nor its norm where `attention.no_op` says so, and neither feed-forward
  layer nor its norm where `ffn.no_op` does: blocks of both kinds may go, each by itself.
- Its `forward` adds to the residual stream in the norms, and only that of an attention begins one (`if residual is
  None`): the attention of the first layer stays, so that no feed-forward layer is the first to run.
- `num_heads=config.num_attention_heads` in every layer: one number of query heads for all of them; `head_dim` says how
  wide one is. `num_kv_heads` is that over the layer's own `n_heads_in_group`, so that a key-value head cannot go with
  its query heads in one layer alone: heads are tied over the layers.
- `_ffn_mult_to_intermediate_size`: a feed-forward layer is int(2 * ffn_mult * hidden_size / 3) wide, up to the next
  multiple of 256. Versions from vllm-project/vllm#30795 on read an `intermediate_size` of the layer, too; older ones,
  SGLang and TensorRT-LLM do not, so that widths are multiples of 256.

vLLM has no class for this configuration and reads the folder's own, for block_configs must have attributes:
`vllm serve DIR --trust-remote-code`. The class is written beside it; it runs nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from autoprune.deploy import IN_FLOAT, tied, without
from autoprune.deploy._deci import (
    ATTENTION,
    OTHERS,
    Layer,
    check_decoder,
    common,
    feed_forward_widths,
    few,
    head_dim_of,
    is_decoder,
    layers_of,
    part_of,
    tensors_of,
)
from autoprune.errors import InputError, RunError
from autoprune.policy import Policy
from autoprune.structure import Group, Structure

NAME, MULTIPLE = "vllm-deci", 256
CONFIG, WEIGHTS, CODE = "config.json", "model.safetensors", "configuration_decilm.py"
HEADS = ("head", "kv_group")
DROPPED = (
    *(
        "intermediate_size",
        "layer_types",
        "sliding_window",
        "use_sliding_window",
        "max_window_layers",
        "pretraining_tp",
    ),
    *("transformers_version", "_name_or_path", "attn_implementation"),
)
"""Keys of the dense configuration that say nothing of the pruned model, or what DeciLM does not do."""
CONFIGURATION = '''"""The configuration of DeciLM, as vLLM asks for it: what each layer has. Written by autoprune."""

from transformers import PretrainedConfig


class Part(dict):
    """A mapping whose keys are attributes too."""

    def __getattr__(self, name):
        if name in self:
            return self[name]
        raise AttributeError(name)


class DeciLMConfig(PretrainedConfig):
    model_type = "nemotron-nas"

    def __init__(self, block_configs=(), **others):
        super().__init__(**others)
        self.block_configs = [Part({name: Part(part) for name, part in block.items()}) for block in block_configs]
        if not hasattr(self, "rope_scaling"):  # before version 5 of transformers
            scaling = {key: value for key, value in self.rope_parameters.items() if key != "rope_theta"}
            self.rope_scaling = None if scaling.get("rope_type", "default") == "default" else scaling
'''


class VllmDeci:
    """Blocks but for the first attention, one number of heads for all layers, neurons in multiples of 256 by layer."""

    def check(self, model: nn.Module) -> None:
        """InputError where DeciLM computes something else than `model`, or cannot say how wide it is."""
        check_decoder(model, NAME)
        if odd := _odd_words([layer.neurons for layer in layers_of(model) if layer.neurons % MULTIPLE]):
            raise InputError(f"deploy: {NAME} cannot hold this {type(model).__name__}: {odd}")

    def restrict(self, structure: Structure) -> Structure:
        """Grids of such widths; heads are tied over the layers."""
        llama = is_decoder(structure)
        odd = _odd_words([w for w in feed_forward_widths(structure).values() if w % MULTIPLE])

        def reason(group: Group) -> str | None:
            if group.kind == "bits":
                return IN_FLOAT
            if not llama or odd:
                return odd if llama else OTHERS
            if group.kind == "block":
                return "it begins the residual stream" if part_of(group) in (None, ("0", ATTENTION)) else None
            if group.kind == "neuron" and len(_multiples(group)) < 2:
                return f"{group.width} neurons, and no smaller multiple of {MULTIPLE}"
            return None

        held = without(structure, reason)
        fitted = tuple(replace(g, grid=_multiples(g)) if g.kind == "neuron" else g for g in held)
        held = Structure(fitted, held.ops, held.frozen, held.fingerprint)
        return tied(held, [g for g in held if g.kind in HEADS])

    def write(self, model: Any, structure: Structure, policy: Policy, folder: Path) -> None:
        """config.json, the class that reads it, and the weights of what is there.

        Raises:
            InputError: it is a model or a point that DeciLM cannot hold (says which layers, and what would fit).
        """
        self.check(model)
        layers = layers_of(model)
        first = next((i for i, layer in enumerate(layers) if layer.heads or layer.neurons), 0)
        if not layers[first].heads:
            raise InputError(
                f"deploy: {NAME} cannot begin with the feed-forward layer of layer {first}: keep its attention"
            )
        tensors = _with_biases(tensors_of(model))
        config = _configuration(model.config, layers, tensors)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CODE).write_text(CONFIGURATION, encoding="utf-8")
        (folder / CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})

    def read_back(self, folder: Path, model: Any, inputs: Any) -> None:
        """See that the layers of config.json have the shapes of the weights, and that these are the model's.

        Raises:
            RunError: they do not, or are not.
        """
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        held, wanted = load_file(folder / WEIGHTS), tensors_of(model)
        shapes = expected_shapes(config)
        wrong = [n for n in sorted({*held, *shapes}) if n not in held or shapes.get(n) != tuple(held[n].shape)]
        wrong += [n for n, value in wanted.items() if n not in held or not torch.equal(held[n], value)]
        wrong += [n for n in held.keys() - wanted.keys() if bool(held[n].any())]  # biases that only DeciLM has
        if wrong:
            raise RunError(f"{folder.name}: what it holds of {few(wrong)} is not what the model has")


def expected_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The tensors that vLLM makes of config.json, by the names that it loads, with their shapes."""
    hidden, head_dim, heads = config["hidden_size"], config["head_dim"], config["num_attention_heads"]
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
    for i, block in enumerate(config["block_configs"]):
        at, attention, ffn = f"model.layers.{i}", block["attention"], block["ffn"]
        made: list[tuple[str, int, int, bool]] = []
        if not attention["no_op"]:
            q, kv = heads * head_dim, heads // attention["n_heads_in_group"] * head_dim
            biased = config["qkv_bias"]
            made += [(f"{ATTENTION}.{p}_proj", n, hidden, biased) for p, n in (("q", q), ("k", kv), ("v", kv))]
            made.append((f"{ATTENTION}.o_proj", hidden, q, config["attention_bias"]))
            found[f"{at}.input_layernorm.weight"] = (hidden,)
        if not ffn["no_op"]:
            width = width_of(ffn["ffn_mult"], hidden)
            made += [(f"mlp.{p}_proj", width, hidden, config["mlp_bias"]) for p in ("gate", "up")]
            made.append(("mlp.down_proj", hidden, width, config["mlp_bias"]))
            found[f"{at}.post_attention_layernorm.weight"] = (hidden,)
        for name, rows, columns, biased in made:
            found[f"{at}.{name}.weight"] = (rows, columns)
            found |= {f"{at}.{name}.bias": (rows,)} if biased else {}
    found["model.norm.weight"] = (hidden,)
    return found if config["tie_word_embeddings"] else {**found, "lm_head.weight": (config["vocab_size"], hidden)}


def width_of(ffn_mult: float, hidden_size: int) -> int:
    """The width that vLLM makes of an ffn_mult."""
    return -(-int(2 * ffn_mult * hidden_size / 3) // MULTIPLE) * MULTIPLE


def _multiple_of(width: int, hidden_size: int) -> float:
    """The ffn_mult that says `width`: a hair less than it is rounded up to it again."""
    return 3 * width / (2 * hidden_size)


def _configuration(dense: Any, layers: list[Layer], tensors: dict[str, Tensor]) -> dict[str, Any]:
    attending = {i: layer for i, layer in enumerate(layers) if layer.heads}
    heads = common({i: layer.heads for i, layer in attending.items()}, "query heads", NAME)
    rope = dict(getattr(dense, "rope_parameters", None) or {})
    kept = {key: value for key, value in dense.to_dict().items() if key not in DROPPED}
    return {
        **kept,
        "architectures": ["DeciLMForCausalLM"],
        "model_type": "nemotron-nas",
        "auto_map": {"AutoConfig": f"{CODE.removesuffix('.py')}.DeciLMConfig"},
        "num_attention_heads": heads,
        "num_key_value_heads": next(iter(attending.values())).kv_heads,
        "head_dim": head_dim_of(dense),
        "rope_parameters": rope,
        "rope_theta": rope.get("rope_theta", 10000.0),  # where it was before version 5 of transformers
        "qkv_bias": any(name.endswith(".q_proj.bias") for name in tensors),
        "attention_bias": any(name.endswith(".o_proj.bias") for name in tensors),
        "mlp_bias": any(name.endswith(".down_proj.bias") for name in tensors),
        "tie_word_embeddings": "lm_head.weight" not in tensors,
        "block_configs": [_block(layer, dense.hidden_size) for layer in layers],
    }


def _block(layer: Layer, hidden_size: int) -> dict[str, Any]:
    each = layer.heads // layer.kv_heads if layer.heads else None
    mult = _multiple_of(layer.neurons, hidden_size) if layer.neurons else None
    return {
        "attention": {"n_heads_in_group": each, "no_op": not layer.heads, "replace_with_linear": False},
        "ffn": {"ffn_mult": mult, "no_op": not layer.neurons, "replace_with_linear": False},
    }


def _with_biases(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """With zeros for the biases that DeciLM makes for all layers of a kind where one has one."""
    found = dict(tensors)
    for kinds in (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj", "down_proj")):
        if any(name.endswith(f".{kind}.bias") for name in tensors for kind in kinds):
            for name, value in tensors.items():
                bias = name.removesuffix("weight") + "bias"
                if name.endswith(tuple(f".{kind}.weight" for kind in kinds)) and bias not in tensors:
                    found[bias] = value.new_zeros(value.shape[0])
    return found


def _multiples(group: Group) -> tuple[int, ...]:
    return tuple(w for w in group.grid if w % MULTIPLE == 0 and w)


def _odd_words(widths: Collection[int]) -> str:
    """Why a dense model does not fit, or nothing."""
    if not widths:
        return ""
    odd = ", ".join(str(w) for w in sorted(set(widths)))
    return f"its feed-forward layers are {odd} wide, and DeciLM's ffn_mult says multiples of {MULTIPLE} alone"
