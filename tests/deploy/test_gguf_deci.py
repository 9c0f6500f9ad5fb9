"""GGUF of llama.cpp's deci: the file alone, computed as deci.cpp does, is the pruned model; llama.cpp says so too."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import autoprune
from autoprune.application.delivery import apply_file
from autoprune.application.order import Order
from autoprune.deploy import check_model, misfits, searched
from autoprune.deploy.gguf_deci import GgufDeci
from autoprune.errors import InputError, RunError
from autoprune.files.policy_file import save_front
from autoprune.policy import Policy
from autoprune.space import Space
from autoprune.structure import Structure
from tests.deploy.decoders import DECODERS, IDS, INPUTS, Cut, analysed, cut, decoder
from tests.deploy.vocabularies import SENTENCES, VOCABULARIES, vocabulary
from tests.points import front_over
from tests.text_folders import write_tokenizer

gguf = pytest.importorskip("gguf", reason="needs gguf (pip install 'autoprune[gguf]')")
NO_WORDS = "ignore:model.gguf has no vocabulary"
pytestmark = [
    pytest.mark.filterwarnings("ignore:without a task autoprune.apply only slices"),
    pytest.mark.filterwarnings(NO_WORDS),
]
WHOLE = "model.layers.{}"
EXACT = {"rtol": 1e-4, "atol": 1e-4}


class Deci:
    """The network of `deci.cpp`, of nothing but the file: counts by layer, neighbours rotated, skips what it skips."""

    def __init__(self, path: Path) -> None:
        reader = gguf.GGUFReader(path)
        held = {t.name: gguf.dequantize(t.data, t.tensor_type) for t in reader.tensors}
        self.tensors = {name: torch.from_numpy(np.array(value)) for name, value in held.items()}
        self.facts = {name: field.contents() for name, field in reader.fields.items()}
        assert self.facts["general.architecture"] == "deci"

    def fact(self, name: str) -> Any:
        return self.facts[f"deci.{name}"]

    def __call__(self, ids: Tensor) -> Tensor:
        layer_input = F.embedding(ids, self.tensors["token_embd.weight"])
        heads, kv_heads = self.fact("attention.head_count"), self.fact("attention.head_count_kv")
        for i, neurons in enumerate(self.fact("feed_forward_length")):
            x = layer_input
            if heads[i]:
                x = x + self.attended(i, self.normed(f"blk.{i}.attn_norm", x), heads[i], kv_heads[i])
            if not neurons:
                continue  # and whatever the attention computed is lost
            y = self.normed(f"blk.{i}.ffn_norm", x)
            gate, up = (self.linear(f"blk.{i}.ffn_{part}", y) for part in ("gate", "up"))
            assert gate.shape[-1] == neurons
            layer_input = x + self.linear(f"blk.{i}.ffn_down", F.silu(gate) * up)
        output = self.tensors.get("output.weight", self.tensors["token_embd.weight"])
        return F.linear(self.normed("output_norm", layer_input), output)

    def attended(self, i: int, x: Tensor, heads: int, kv_heads: int) -> Tensor:
        size = self.fact("attention.key_length")
        q, k, v = (
            self.linear(f"blk.{i}.attn_{part}", x).unflatten(-1, (n, size)).transpose(1, 2)
            for part, n in (("q", heads), ("k", kv_heads), ("v", kv_heads))
        )
        found = F.scaled_dot_product_attention(self.turned(q), self.turned(k), v, is_causal=True, enable_gqa=True)
        return self.linear(f"blk.{i}.attn_output", found.transpose(1, 2).flatten(2))

    def turned(self, x: Tensor) -> Tensor:
        """Neighbours rotated by the position, LLAMA_ROPE_TYPE_NORM."""
        size = self.fact("rope.dimension_count")
        speed = self.fact("rope.freq_base") ** (-torch.arange(0, size, 2) / size)
        speed = speed / self.tensors.get("rope_freqs.weight", torch.ones(size // 2))
        angle = torch.arange(x.shape[2])[:, None] * speed
        a, b = x[..., 0::2], x[..., 1::2]
        return torch.stack((a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()), -1).flatten(-2)

    def normed(self, name: str, x: Tensor) -> Tensor:
        return F.rms_norm(
            x, x.shape[-1:], self.tensors[f"{name}.weight"], self.fact("attention.layer_norm_rms_epsilon")
        )

    def linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.tensors[f"{name}.weight"], self.tensors.get(f"{name}.bias"))


def written(made: Cut, folder: Path) -> Path:
    GgufDeci().write(made.model, made.structure, made.policy, folder)
    GgufDeci().read_back(folder, made.model, INPUTS)
    return folder / "model.gguf"


def by_llama_cpp(path: Path, every: bool = True) -> Tensor:
    """Logits [tokens, vocabulary] of the first sample; of its last token alone, which takes another way."""
    library = pytest.importorskip("llama_cpp", reason="needs llama-cpp-python, which compiles for ten minutes")
    ids = IDS[0].tolist()
    model = library.Llama(str(path), n_ctx=32, logits_all=every, verbose=False, type_k=0, type_v=0)
    model.eval(ids)
    if every:
        return torch.from_numpy(np.array(model.scores[: len(ids)]))
    logits = np.ctypeslib.as_array(library.llama_get_logits(model.ctx), shape=(model.n_vocab(),))
    return torch.from_numpy(logits.copy())[None]


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("seed", [1, 3])
def test_the_file_alone_computes_what_the_pruned_model_does(name: str, seed: int, tmp_path: Path) -> None:
    made = cut(name, "gguf-deci", seed)
    torch.testing.assert_close(Deci(written(made, tmp_path))(IDS), made.logits, **EXACT)


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_llama_cpp_itself_computes_what_the_pruned_model_does(name: str, tmp_path: Path) -> None:
    made = cut(name, "gguf-deci", 3)
    path = written(made, tmp_path)
    torch.testing.assert_close(by_llama_cpp(path), made.logits[0], **EXACT)
    torch.testing.assert_close(by_llama_cpp(path, every=False), made.logits[0, -1:], **EXACT)


def test_layers_have_heads_and_neurons_of_their_own_and_may_be_absent(tmp_path: Path) -> None:
    heads = {"model.layers.0.self_attn.q_proj": 3, "model.layers.3.self_attn.q_proj": 1}
    widths = {**heads, "model.layers.2.self_attn": 0, "model.layers.1": 0, "model.layers.3.mlp.gate_proj": 160}
    made = cut("grouped queries", "gguf-deci", **widths)
    network = Deci(written(made, tmp_path))
    assert network.fact("attention.head_count") == [6, 0, 0, 2]
    assert network.fact("attention.head_count_kv") == [3, 0, 0, 1]
    assert network.fact("feed_forward_length") == [768, 0, 768, 160]
    torch.testing.assert_close(network(IDS), made.logits, **EXACT)


def test_whole_layers_and_attentions_stand_in_the_place_of_single_feed_forward_layers() -> None:
    held = searched(analysed("grouped queries"), Space(), "gguf-deci")
    blocks = [g.name for g in held if g.kind == "block"]
    layers = [WHOLE.format(i) for i in (1, 2)]
    assert blocks == [
        layers[0],
        f"{layers[0]}.self_attn",
        layers[1],
        f"{layers[1]}.self_attn",
        "model.layers.3.self_attn",
    ]
    inside = {held.names[block]: {held.names[i] for i in inner} for block, inner in held.inside}
    assert inside[layers[0]] == {f"{layers[0]}.{end}" for end in ("self_attn", "self_attn.q_proj", "mlp.gate_proj")}
    again = GgufDeci().restrict(held)
    assert (again.groups, again.ops) == (held.groups, held.ops)


@pytest.mark.parametrize(
    ("gone", "fits", "said"),
    [
        (["1.self_attn", "1.mlp"], True, ""),
        (["1.mlp"], False, "loses the attention of layer 1, whose feed-forward layer is absent"),
        (["3.self_attn"], True, ""),
        (["3.self_attn", "3.mlp"], False, "needs the feed-forward layer of the last layer, 3: keep it"),
        (["0.self_attn"], False, "reads the width of all heads off layer 0, whose attention is absent: keep it"),
    ],
)
def test_a_point_of_an_unrestricted_search_fits_or_is_refused_by_its_layers(
    gone: list[str], fits: bool, said: str, tmp_path: Path
) -> None:
    whole, widths = analysed("grouped queries"), {f"model.layers.{name}": 0 for name in gone}
    policy = Policy.of({**Policy.dense(whole).as_dict(), **widths})
    lines = misfits(Structure(whole.groups, ()), policy, "gguf-deci")
    made = cut("grouped queries", None, **widths)
    if fits:
        assert lines == []
        torch.testing.assert_close(Deci(written(made, tmp_path))(IDS), made.logits, **EXACT)
    else:
        assert all(line.endswith("is 0 of 1, the nearest that fits is 1") for line in lines)
        assert lines
        with pytest.raises(InputError, match=said):
            GgufDeci().write(made.model, made.structure, made.policy, tmp_path / "gguf-deci")
        assert not (tmp_path / "gguf-deci").exists()


def test_apply_writes_the_file_and_says_that_it_has_no_vocabulary(tmp_path: Path) -> None:
    dense = decoder()
    dense.save_pretrained(tmp_path / "dense")  # type: ignore[operator]
    write_tokenizer(tmp_path / "dense" / "tokenizer.json")
    structure = searched(analysed("grouped queries"), Space(), "gguf-deci")
    save_front(front_over(dense, INPUTS, structure=structure), tmp_path / "policy.json")
    order = Order(deploy="gguf-deci")
    with pytest.warns(UserWarning, match=r"no vocabulary, .* llama.cpp has no tokenizer of the type WordLevel"):
        facts = apply_file(tmp_path / "policy.json", str(tmp_path / "dense"), "p00", tmp_path / "small", order)
    folder = tmp_path / "small" / "gguf-deci"
    assert str(folder) in facts["files"]
    small: Any = autoprune.load(tmp_path / "small")
    with torch.no_grad():
        torch.testing.assert_close(Deci(folder / "model.gguf")(IDS), small(**INPUTS[0]).logits, **EXACT)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_of_half_precision_stay_it(dtype: torch.dtype, tmp_path: Path) -> None:
    made = cut("biases", "gguf-deci", 1)
    made.model.to(dtype)
    held = {t.name: t.tensor_type.name for t in gguf.GGUFReader(written(made, tmp_path)).tensors}
    kind = {torch.float16: "F16", torch.bfloat16: "BF16"}[dtype]
    assert held["blk.0.attn_q.weight"] == held["token_embd.weight"] == kind
    assert held["blk.0.attn_q.bias"] == held["output_norm.weight"] == "F32"


def test_positions_that_llama_cpp_computes_otherwise_are_refused() -> None:
    scaled = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 2.0, "original_max_position_embeddings": 20}
    with pytest.raises(InputError, match="holds rotary positions of the type default, linear, llama3, not 'yarn'"):
        check_model(decoder(rope_parameters=scaled), "gguf-deci")


def test_without_the_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(InputError, match=r"needs the package gguf \(pip install 'autoprune\[gguf\]'\)"):
        check_model(decoder(), "gguf-deci")


def test_what_is_not_the_model_is_seen_when_it_is_read_back(tmp_path: Path) -> None:
    made = cut("grouped queries", "gguf-deci", 1)
    written(made, tmp_path)
    with torch.no_grad():
        made.model.model.layers[0].self_attn.q_proj.weight[3, 5] += 1e-3
    with pytest.raises(RunError, match=r"what it holds of blk\.0\.attn_q\.weight is not what the model has"):
        GgufDeci().read_back(tmp_path, made.model, INPUTS)


@pytest.mark.parametrize("kind", VOCABULARIES)
def test_the_vocabulary_lies_in_the_file(kind: str, tmp_path: Path) -> None:
    tokenizer = vocabulary(kind, tmp_path / "tokenizer.json")
    model = decoder(vocab_size=tokenizer.get_vocab_size() + 7, bos_token_id=0, eos_token_id=1)
    structure = analysed("grouped queries")
    path = written(Cut(model, structure, Policy.dense(structure)), tmp_path)
    facts = Deci(path).facts
    tokens, kinds = facts["tokenizer.ggml.tokens"], facts["tokenizer.ggml.token_type"]
    assert (len(tokens), len(kinds)) == (model.config.vocab_size,) * 2  # type: ignore[union-attr]
    assert [tokenizer.token_to_id(token) for token in tokens[:-7]] == [*range(len(tokens) - 7)]
    assert tokens[-1] == f"[PAD{len(tokens) - 1}]"
    assert set(kinds[-7:]) == {gguf.TokenType.UNUSED}
    assert facts["tokenizer.ggml.model"] == ("llama" if kind == "characters" else "gpt2")
    assert facts["tokenizer.ggml.eos_token_id"] == 1
    if kind != "characters":
        assert facts["tokenizer.ggml.pre"] == kind
        assert facts["tokenizer.ggml.merges"]


@pytest.mark.parametrize("kind", VOCABULARIES)
def test_llama_cpp_cuts_texts_into_the_same_tokens(kind: str, tmp_path: Path) -> None:
    library = pytest.importorskip("llama_cpp", reason="needs llama-cpp-python, which compiles for ten minutes")
    tokenizer = vocabulary(kind, tmp_path / "tokenizer.json")
    model, structure = decoder(vocab_size=tokenizer.get_vocab_size()), analysed("grouped queries")
    path = written(Cut(model, structure, Policy.dense(structure)), tmp_path)
    theirs = library.Llama(str(path), vocab_only=True, verbose=False)
    for text in SENTENCES:
        assert theirs.tokenize(text.encode(), add_bos=True, special=True) == tokenizer.encode(text).ids


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda told: told["model"].update(type="Unigram"), "has no tokenizer of the type Unigram"),
        (lambda told: told["pre_tokenizer"].update(add_prefix_space=True), "none of llama-bpe, .* splits texts as"),
        (lambda told: told["added_tokens"].append({"id": 9999, "content": "x"}), "counts up to token 9999"),
    ],
)
def test_a_tokenizer_that_llama_cpp_has_not_is_left_out_and_why_is_said(change: Any, said: str, tmp_path: Path) -> None:
    tokenizer = vocabulary("gpt-2", tmp_path / "tokenizer.json")
    told = json.loads((tmp_path / "tokenizer.json").read_text())
    change(told)
    (tmp_path / "tokenizer.json").write_text(json.dumps(told))
    model, structure = decoder(vocab_size=tokenizer.get_vocab_size()), analysed("grouped queries")
    with pytest.warns(UserWarning, match=said):
        path = written(Cut(model, structure, Policy.dense(structure)), tmp_path)
    assert Deci(path).facts["tokenizer.ggml.model"] == "none"
