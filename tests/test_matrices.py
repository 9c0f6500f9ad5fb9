"""Precisions as groups: which weights have one, which share one, how they are called."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from autoprune.costs.bytes import Bytes
from autoprune.costs.macs import Macs
from autoprune.errors import InputError
from autoprune.families import analyze
from autoprune.matrices import with_precisions, with_weights
from autoprune.policy import Policy
from autoprune.space import Space, restrict
from autoprune.structure import Group
from autoprune.tasks import resnet20


class Net(nn.Module):
    """A stem that is too small, a wide layer, a depthwise one, and a head of few outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.wide = nn.Conv2d(8, 32, 3, padding=1)
        self.depth = nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.point = nn.Conv2d(32, 16, 1)
        self.head = nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.point(self.depth(self.wide(self.stem(x).relu()).relu()).relu()).relu()
        out: torch.Tensor = self.head(x.mean((2, 3)))
        return out


INPUTS = (torch.zeros(2, 1, 8, 8),)


def test_matrices_of_two_long_sides_have_a_precision() -> None:
    structure = analyze(Net(), INPUTS)
    found = with_precisions(structure, (32, 8))
    assert [g.name for g in found if g.kind == "bits"] == ["wide.weight@bits", "point.weight@bits"]
    assert found.group("wide.weight@bits").grid == (8, 32)
    assert found.fingerprint == structure.fingerprint


def test_query_key_and_value_share_one() -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    model = transformers.BertModel(transformers.BertConfig(vocab_size=50, **sizes), add_pooling_layer=False).eval()
    found = with_precisions(analyze(model, (torch.randint(0, 50, (2, 8)),)), (32, 8))
    own = {g.name: g.matrices for g in found if g.kind == "bits"}
    attention = "encoder.layer.0.attention"
    query = f"{attention}.self.query.weight"
    assert own[f"{query}@bits"] == (query, f"{attention}.self.key.weight", f"{attention}.self.value.weight")
    assert not any("embeddings" in name for names in own.values() for name in names)


def test_bytes_count_the_scales_and_follow_the_cuts() -> None:
    structure = restrict(analyze(Net(), INPUTS), Space(bits=(32, 8)))
    cost, numbers = Bytes(structure), sum(p.numel() for p in Net().parameters())
    assert cost.dense == 4 * numbers
    widths = Policy.dense(structure).as_dict() | {"wide.weight@bits": 8}
    saved = 3 * 32 * 8 * 9 - 4 * 32  # three bytes of each number, less a scale for each output
    assert cost(Policy.of(widths).array(structure)) * cost.dense == pytest.approx(cost.dense - saved, abs=1e-6)
    narrow = structure.group("wide").grid[0]
    both, half = Policy.of(widths | {"wide": narrow}), Policy.of(widths | {"wide": narrow, "wide.weight@bits": 32})
    saved = 3 * narrow * 8 * 9 - 4 * narrow
    found = [float(cost(policy.array(structure)) * cost.dense) for policy in (half, both)]
    assert found[0] - found[1] == pytest.approx(saved, abs=1e-6)
    assert Macs(structure)(both.array(structure)) == Macs(structure)(half.array(structure))


def test_a_space_without_bits_has_none_and_globs_reach_them() -> None:
    structure = analyze(Net(), INPUTS)
    assert not any(g.kind == "bits" for g in restrict(structure, Space()))
    named = restrict(structure, Space(bits=(32, 8), exclude=("point.weight@bits",)))
    assert [g.name for g in named if g.kind == "bits"] == ["wide.weight@bits"]
    held = restrict(structure, Space(bits=(32, 8), overrides={"wide*": {"max_sparsity": 0.5}}))
    assert [g.name for g in held if g.kind == "bits"] == ["point.weight@bits"]
    alone = restrict(structure, Space(granularity=("bits",), bits=(32, 8)))
    assert {g.kind for g in alone} == {"bits"}


def test_a_model_without_such_weights_is_told() -> None:
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1))
    with pytest.raises(InputError, match="no weight of the model can be stored in fewer bits"):
        restrict(analyze(model, INPUTS), Space(bits=(32, 8)))


def test_a_precision_has_matrices_and_no_slices() -> None:
    with pytest.raises(InputError, match="bits and weights have matrices"):
        Group("a@bits", "bits", 32, (), (8, 32))
    with pytest.raises(InputError, match="bits and weights have matrices"):
        Group("a", "channel", 8, (), (4, 8), matrices=("a.weight",))


def test_an_excluded_precision_keeps_no_block() -> None:
    structure = analyze(resnet20().eval(), (torch.zeros(2, 3, 32, 32),))
    blocks = [g.name for g in structure if g.kind == "block"]
    found = restrict(structure, Space(bits=(32, 8), exclude=(f"{blocks[-1]}.conv1.weight@bits",)))
    assert [g.name for g in found if g.kind == "block"] == blocks


def test_depthwise_convolutions_have_no_precision() -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 32, 5), nn.ReLU(), nn.Conv2d(32, 32, 4, groups=32), nn.ReLU(), nn.Conv2d(32, 16, 1)
    )
    names = [g.name for g in restrict(analyze(model.eval(), INPUTS), Space(bits=(32, 8))) if g.kind == "bits"]
    assert names == ["4.weight@bits"]


def test_matrices_of_layers_have_zeros_and_a_tied_embedding_has_none() -> None:
    plain = analyze(Net(), INPUTS)
    found = with_weights(plain)
    assert [g.name for g in found if g.kind == "weight"] == ["wide.weight", "point.weight", "head.weight"]
    why = "each of its outputs reads one channel: it stays dense"
    assert {n: r for n, r in found.frozen.items() if n not in plain.frozen} == {"stem.weight": why, "depth.weight": why}
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    config = transformers.LlamaConfig(vocab_size=50, tie_word_embeddings=True, **sizes)
    model = transformers.LlamaForCausalLM(config).eval()
    found = with_weights(analyze(model, (torch.randint(0, 50, (2, 8)),)), "2:4")
    names = [g.name.removeprefix("model.layers.0.") for g in found if g.kind == "weight"]
    attention = [f"self_attn.{name}_proj.weight" for name in "qkvo"]
    assert names == [*attention, *(f"mlp.{name}_proj.weight" for name in ("gate", "up", "down"))]
    assert all(g.grid == (g.width // 2, g.width) for g in found if g.kind == "weight")
