"""DeciLM: what vLLM makes of the folder, built here the way its nemotron_nas.py builds it, computes what was pruned."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

import autoprune
from autoprune.application.delivery import apply_file
from autoprune.application.order import Order
from autoprune.deploy import check_model, misfits, searched
from autoprune.deploy.vllm_deci import VllmDeci, width_of
from autoprune.errors import InputError, RunError
from autoprune.families import analyze
from autoprune.files.policy_file import save_front
from autoprune.policy import Policy
from autoprune.space import Space
from autoprune.structure import Structure
from tests.deploy.decoders import DECODERS, IDS, INPUTS, Cut, analysed, cut, decoder
from tests.points import front_over
from tests.transformer_models import MODELS

pytestmark = pytest.mark.filterwarnings("ignore:without a task autoprune.apply only slices")


def configured(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The configuration as vLLM reads it: by AutoConfig, with the code of the folder trusted."""
    transformers = pytest.importorskip("transformers")
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(folder / "modules"))
    return transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True, local_files_only=True)


class DeciLM:
    """The network of `nemotron_nas.py`: sublayers that are not there are not made, and norms add to the residual."""

    def __init__(self, config: Any, weights: dict[str, Tensor]) -> None:
        self.config, self.weights, self.used = config, weights, set[str]()

    def __call__(self, ids: Tensor) -> Tensor:
        rotary = pytest.importorskip("transformers.models.llama.modeling_llama").LlamaRotaryEmbedding(self.config)
        hidden = F.embedding(ids, self.take("model.embed_tokens.weight"))
        turns, residual = rotary(hidden, torch.arange(ids.shape[1])[None]), None
        for i, block in enumerate(self.config.block_configs):
            at = f"model.layers.{i}"
            if not block.attention.no_op:
                hidden, residual = self.normed(f"{at}.input_layernorm", hidden, residual)
                kv_heads = self.config.num_attention_heads // block.attention.n_heads_in_group
                hidden = self.attended(f"{at}.self_attn", hidden, kv_heads, turns)
            if not block.ffn.no_op:
                hidden, residual = self.normed(f"{at}.post_attention_layernorm", hidden, residual)
                width = width_of(block.ffn.ffn_mult, self.config.hidden_size)
                gate, up = (self.linear(f"{at}.mlp.{p}_proj", hidden, self.config.mlp_bias) for p in ("gate", "up"))
                assert gate.shape[-1] == up.shape[-1] == width
                hidden = self.linear(f"{at}.mlp.down_proj", F.silu(gate) * up, self.config.mlp_bias)
        hidden, _ = self.normed("model.norm", hidden, residual)
        tied = self.config.tie_word_embeddings
        return F.linear(hidden, self.take("model.embed_tokens.weight" if tied else "lm_head.weight"))

    def attended(self, at: str, hidden: Tensor, kv_heads: int, turns: Any) -> Tensor:
        rotated = pytest.importorskip("transformers.models.llama.modeling_llama").apply_rotary_pos_emb
        size, heads = self.config.head_dim, self.config.num_attention_heads
        q, k, v = (
            self.linear(f"{at}.{part}_proj", hidden, self.config.qkv_bias).unflatten(-1, (n, size)).transpose(1, 2)
            for part, n in (("q", heads), ("k", kv_heads), ("v", kv_heads))
        )
        q, k = rotated(q, k, *turns)
        found = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2).flatten(2)
        return self.linear(f"{at}.o_proj", found, self.config.attention_bias)

    def normed(self, at: str, hidden: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        if residual is None and not at.endswith("input_layernorm"):
            raise TypeError("cannot unpack: RMSNorm returns one tensor where there is no residual yet")
        residual = hidden if residual is None else hidden + residual
        return F.rms_norm(residual, residual.shape[-1:], self.take(f"{at}.weight"), self.config.rms_norm_eps), residual

    def linear(self, at: str, x: Tensor, biased: bool) -> Tensor:
        return F.linear(x, self.take(f"{at}.weight"), self.take(f"{at}.bias") if biased else None)

    def take(self, name: str) -> Tensor:
        self.used.add(name)
        return self.weights[name]


def written(made: Cut, folder: Path) -> Path:
    VllmDeci().write(made.model, made.structure, made.policy, folder)
    VllmDeci().read_back(folder, made.model, INPUTS)
    return folder


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("seed", [1, 2])
def test_what_vllm_builds_of_config_json_computes_what_the_pruned_model_does(
    name: str, seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = cut(name, "vllm-deci", seed)
    folder = written(made, tmp_path / "vllm-deci")
    network = DeciLM(configured(folder, monkeypatch), load_file(folder / "model.safetensors"))
    torch.testing.assert_close(network(IDS), made.logits, rtol=1e-4, atol=1e-4)
    assert network.used == network.weights.keys()  # vLLM knows the name of everything in the file


def test_each_half_of_a_layer_may_be_absent_and_the_configuration_says_which(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = ("model.layers.1.self_attn", "model.layers.2.mlp", "model.layers.3.self_attn", "model.layers.3.mlp")
    made = cut("grouped queries", "vllm-deci", **dict.fromkeys(gone, 0), **{"model.layers.*.self_attn.q_proj": 3})
    folder = written(made, tmp_path / "vllm-deci")
    told = json.loads((folder / "config.json").read_text())
    absent = [(b["attention"]["no_op"], b["ffn"]["no_op"]) for b in told["block_configs"]]
    assert absent == [(False, False), (True, False), (False, True), (True, True)]
    assert (told["num_attention_heads"], told["head_dim"], told["architectures"]) == (6, 4, ["DeciLMForCausalLM"])
    network = DeciLM(configured(folder, monkeypatch), load_file(folder / "model.safetensors"))
    torch.testing.assert_close(network(IDS), made.logits, rtol=1e-4, atol=1e-4)


def test_the_configuration_can_be_copied_and_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = written(cut("grouped queries", "vllm-deci", 3), tmp_path / "vllm-deci")
    config = configured(folder, monkeypatch)
    assert not hasattr(config.block_configs[0].ffn, "intermediate_size")
    assert json.loads(config.to_json_string())["block_configs"] == [dict(b) for b in config.block_configs]
    assert config.rope_parameters["rope_theta"] == 10000.0


@pytest.mark.parametrize("hidden", [32, 576, 960, 2048, 4096, 5120, 8192])
def test_every_multiple_of_256_has_an_ffn_mult(hidden: int) -> None:
    assert [width_of(3 * w / (2 * hidden), hidden) for w in range(256, 29000, 256)] == [*range(256, 29000, 256)]


def test_heads_are_one_number_for_all_layers_and_widths_multiples_of_256() -> None:
    held = searched(analysed("grouped queries"), Space(multiple_of=1), "vllm-deci")
    heads = [g for g in held if g.kind == "kv_group"]
    assert [(g.name, g.grid) for g in heads] == [("model.layers.*.self_attn.q_proj", (1, 2, 3, 4))]
    assert {g.grid for g in held if g.kind == "neuron"} == {(256, 512, 768)}
    blocks = {g.name for g in held if g.kind == "block"}
    assert "model.layers.0.self_attn" not in blocks
    assert len(blocks) == 7


def test_query_heads_of_each_group_are_tied_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = decoder()
    held = searched(analyze(model, INPUTS, kinds=("head",)), Space(granularity=("head",)), "vllm-deci")
    assert [(g.kind, g.grid) for g in held] == [("head", (1, 2))]


def test_a_point_with_other_heads_in_each_layer_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    whole = analysed("grouped queries")
    names = [g.name for g in whole if g.kind == "kv_group"]
    heads, neurons = dict(zip(names, (4, 2, 2, 2), strict=True)), {"model.layers.3.mlp.gate_proj": 700}
    point = Policy.of({**Policy.dense(whole).as_dict(), **heads, **neurons})
    said = misfits(Structure(whole.groups, ()), point, "vllm-deci")
    assert said[0] == f"{names[0]} is 4 of 4, the nearest that fits is 2 in all layers"
    assert said[-1] == "model.layers.3.mlp.gate_proj is 700 of 768, the nearest that fits is 768"
    same = Policy.of({**Policy.dense(whole).as_dict(), **dict.fromkeys(names, 3)})
    assert misfits(Structure(whole.groups, ()), same, "vllm-deci") == []
    gone = Policy.of({**same.as_dict(), names[2]: 4, "model.layers.2.self_attn": 0})
    assert misfits(Structure(whole.groups, ()), gone, "vllm-deci") == []
    made = cut("grouped queries", None, **heads)
    with pytest.raises(InputError, match=r"one number of query heads in all layers: layer 0 has 8, the others 4"):
        VllmDeci().write(made.model, made.structure, made.policy, tmp_path / "vllm-deci")
    assert not (tmp_path / "vllm-deci").exists()


def test_apply_refuses_such_a_point_by_its_layers(tmp_path: Path) -> None:
    dense = decoder()
    save_front(front_over(dense, INPUTS, structure=analysed("grouped queries")), tmp_path / "policy.json")
    with pytest.raises(InputError, match=r"vllm-deci cannot hold point p00: model\.layers\..* the nearest that fits"):
        apply_file(tmp_path / "policy.json", "os:getcwd", "p00", tmp_path / "small", Order(deploy="vllm-deci"))
    assert not (tmp_path / "small").exists()


def test_apply_writes_the_folder_with_the_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = decoder("tied embeddings")
    dense.save_pretrained(tmp_path / "dense")  # type: ignore[operator]
    (tmp_path / "dense" / "tokenizer.json").write_text("{}")
    structure = searched(analysed("tied embeddings"), Space(), "vllm-deci")
    save_front(front_over(dense, INPUTS, structure=structure), tmp_path / "policy.json")
    order = Order(deploy="vllm-deci")
    facts = apply_file(tmp_path / "policy.json", str(tmp_path / "dense"), "p00", tmp_path / "small", order)
    folder = tmp_path / "small" / "vllm-deci"
    assert str(folder) in facts["files"]
    held = {"config.json", "configuration_decilm.py", "model.safetensors", "tokenizer.json"}
    assert {path.name for path in folder.iterdir()} == held
    small = autoprune.load(tmp_path / "small")
    network = DeciLM(configured(folder, monkeypatch), load_file(folder / "model.safetensors"))
    with torch.no_grad():
        torch.testing.assert_close(network(IDS), small(**INPUTS[0]).logits, rtol=1e-4, atol=1e-4)


def test_a_container_that_fails_leaves_no_folder_and_all_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(*_: Any) -> None:
        raise RunError("vllm-deci: what it holds is not what the model has")

    monkeypatch.setattr(VllmDeci, "read_back", lost)
    dense = decoder()
    dense.save_pretrained(tmp_path / "dense")  # type: ignore[operator]
    structure = searched(analysed("grouped queries"), Space(), "vllm-deci")
    save_front(front_over(dense, INPUTS, structure=structure), tmp_path / "policy.json")
    order = Order(deploy="vllm-deci")
    with pytest.raises(RunError, match=r"is not what the model has; .* holds all else"):
        apply_file(tmp_path / "policy.json", str(tmp_path / "dense"), "p00", tmp_path / "small", order)
    assert (tmp_path / "small" / "model.safetensors").exists()
    assert not (tmp_path / "small" / "vllm-deci").exists()


@pytest.mark.parametrize("deploy", ["vllm-deci", "gguf-deci"])
@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: MODELS["bert"].build(), "cannot hold a BertModel: it holds decoders built like Llama"),
        (lambda: MODELS["gemma"].build(), "cannot hold a GemmaForCausalLM: it holds decoders built like Llama"),
        (lambda: decoder(hidden_act="gelu"), "its hidden_act is gelu, not silu"),
        (lambda: decoder("mistral", sliding_window=8), r"its attention sees 8 tokens \(sliding_window\)"),
    ],
)
def test_other_models_are_refused_in_one_line(deploy: str, make: Any, said: str) -> None:
    with pytest.raises(InputError, match=rf"^deploy: {deploy} cannot hold .*{said.removeprefix('cannot hold ')}"):
        check_model(make(), deploy)


def test_feed_forward_layers_that_no_ffn_mult_says_are_refused() -> None:
    with pytest.raises(InputError, match=r"its feed-forward layers are 48 wide, .* multiples of 256 alone"):
        check_model(MODELS["llama"].build(), "vllm-deci")
    structure = analyze(MODELS["llama"].build(), MODELS["llama"].example())
    with pytest.raises(InputError, match=r"vllm-deci can hold nothing .* feed-forward layers are 48 wide"):
        searched(structure, Space(), "vllm-deci")
    bert = analyze(MODELS["bert"].build(), MODELS["bert"].example())
    with pytest.raises(InputError, match=r"vllm-deci can hold nothing .* decoders built like Llama"):
        searched(bert, Space(), "vllm-deci")


def test_a_point_that_begins_with_a_feed_forward_layer_is_refused(tmp_path: Path) -> None:
    made = cut("grouped queries", None, **{"model.layers.0.self_attn": 0})
    with pytest.raises(InputError, match="cannot begin with the feed-forward layer of layer 0: keep its attention"):
        VllmDeci().write(made.model, made.structure, made.policy, tmp_path / "vllm-deci")


def test_what_is_not_the_model_is_seen_when_it_is_read_back(tmp_path: Path) -> None:
    made = cut("grouped queries", "vllm-deci", 1)
    folder = written(made, tmp_path / "vllm-deci")
    weights = load_file(folder / "model.safetensors")
    save_file({**weights, "model.norm.weight": weights["model.norm.weight"] + 1}, folder / "model.safetensors")
    with pytest.raises(RunError, match=r"what it holds of model\.norm\.weight is not what the model has"):
        VllmDeci().read_back(folder, made.model, INPUTS)
    told = json.loads((folder / "config.json").read_text())
    told["block_configs"][0]["ffn"]["ffn_mult"] *= 2
    (folder / "config.json").write_text(json.dumps(told))
    with pytest.raises(RunError, match=r"model\.layers\.0\.mlp\.down_proj\.weight"):
        VllmDeci().read_back(folder, made.model, INPUTS)
