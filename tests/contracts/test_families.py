"""The contract of every file in autoprune/families: what it declares is proved, cut, counted and written."""

from __future__ import annotations

import copy
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from autoprune import plugins
from autoprune.allocation.polynomial import macs_polynomial
from autoprune.exports import export
from autoprune.families import analyze
from autoprune.policy import Policy
from autoprune.structure import Structure
from autoprune.tracing.copies import flat_output
from autoprune.tracing.inputs import call_model
from autoprune.tracing.ops import count_macs
from autoprune.tracing.slim import slim
from autoprune.tracing.verify import random_keep, verify
from tests.transformer_models import MODELS

each_model = pytest.mark.parametrize("name", MODELS)
each_family = pytest.mark.parametrize("name", plugins.names("families"))


@cache
def structure_of(name: str) -> Structure:
    return analyze(MODELS[name].build(), MODELS[name].example())


def output(model: nn.Module, inputs: Any) -> Tensor:
    with torch.no_grad():
        return flat_output(call_model(model, tuple(inputs) if isinstance(inputs, list) else inputs))


@each_family
def test_a_family_says_whether_it_is_traced_and_leaves_other_modules_alone(name: str) -> None:
    family = plugins.load("families", name)()
    assert isinstance(family.traced, bool)
    others = nn.Sequential(nn.Linear(4, 4), nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2), nn.Embedding(3, 2))
    assert [part for n, m in others.named_modules() for part in family.parts(n, m)] == []


@each_model
def test_every_layer_has_its_heads_and_neurons(name: str) -> None:
    assert Counter(group.kind for group in structure_of(name)) == Counter(MODELS[name].kinds)


@each_model
def test_what_stays_says_why(name: str) -> None:
    frozen = structure_of(name).frozen
    assert frozen
    assert not any("lost" in reason or "loses" in reason or "Error" in reason for reason in frozen.values()), frozen


@each_model
@pytest.mark.parametrize("seed", [0, 1])
def test_a_slim_model_is_the_masked_one_and_costs_what_the_polynomial_says(name: str, seed: int) -> None:
    dense, structure, inputs = MODELS[name].build(), structure_of(name), MODELS[name].example()
    before = copy.deepcopy(dense.state_dict())
    keep = random_keep(structure.groups, np.random.default_rng(seed))
    small = copy.deepcopy(dense)
    slim(small, structure, keep)
    assert verify(small, dense, structure, keep, inputs) < 1e-5
    policy = Policy.of({group: len(atoms) for group, atoms in keep.items()})
    assert int(macs_polynomial(structure)(policy.array(structure))) == count_macs(small, inputs)
    assert all(torch.equal(value, before[key]) for key, value in dense.state_dict().items())


@each_model
def test_a_slim_model_is_saved_and_read_again(name: str, tmp_path: Path) -> None:
    structure, inputs = structure_of(name), MODELS[name].example()
    keep = random_keep(structure.groups, np.random.default_rng(2))
    small, again = MODELS[name].build(), MODELS[name].build()
    slim(small, structure, keep)
    path = tmp_path / "model.safetensors"
    save_file({k: v.contiguous().clone() for k, v in small.state_dict().items()}, path)
    slim(again, structure, keep)
    again.load_state_dict(load_file(path))
    assert torch.equal(output(small, inputs), output(again, inputs))


@each_model
def test_a_slim_model_is_exported_and_computes_the_same(name: str, tmp_path: Path) -> None:
    small, structure, inputs = MODELS[name].build(), structure_of(name), MODELS[name].example()
    slim(small, structure, random_keep(structure.groups, np.random.default_rng(3)))
    cached = getattr(getattr(small, "config", None), "use_cache", None)
    assert [p.name for p in export(small, inputs, ["onnx", "pt2"], tmp_path)] == ["model.onnx", "model.pt2"]
    assert getattr(getattr(small, "config", None), "use_cache", None) == cached


def test_query_heads_are_asked_for_by_name() -> None:
    small = MODELS["llama"]
    dense, inputs = small.build(), small.example()
    structure = analyze(dense, inputs, kinds=("head", "neuron"))
    assert [g.width for g in structure if g.kind == "head"] == [2, 2]
    keep = random_keep(structure.groups, np.random.default_rng(0))
    slimmer = copy.deepcopy(dense)
    slim(slimmer, structure, keep)
    assert verify(slimmer, dense, structure, keep, inputs) < 1e-5
    assert slimmer.model.layers[0].self_attn.num_key_value_groups == 1
    assert slimmer.model.layers[0].self_attn.k_proj.weight.shape == dense.model.layers[0].self_attn.k_proj.weight.shape


class OwnAttention(nn.Module):
    """Attention that no family knows."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        y: Tensor = self.out((q @ k.mT).softmax(-1).matmul(v).transpose(1, 2).flatten(2))
        return x + y


def test_an_attention_of_the_library_that_no_family_knows_is_frozen_and_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(OwnAttention, "__module__", "transformers.models.own.modeling_own")
    model = nn.Sequential(OwnAttention(), nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 3)).eval()
    structure = analyze(model, (torch.randn(2, 5, 8),))
    assert structure.frozen["0.qkv"] == "no family for OwnAttention: see docs/extending.md"
    assert structure.names == ("1",), "the rest is traced as ever"


def test_a_model_may_mix_a_stem_of_convolutions_with_an_encoder() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Sequential(nn.Conv2d(3, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 3, 3, padding=1))
            self.encoder = MODELS["vit"].build()

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.encoder(self.stem(x)).logits
            return logits

    structure = analyze(Mixed().eval(), MODELS["vit"].example())
    assert Counter(g.kind for g in structure) == {"channel": 1, "head": 2, "neuron": 2, "block": 4}
