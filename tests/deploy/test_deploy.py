"""Containers: uniform layers that transformers reads by itself, tiles; points that do not fit are told by layer."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import autoprune
from autoprune import plugins
from autoprune.allocation.polynomial import macs_polynomial
from autoprune.application.delivery import apply_file
from autoprune.application.order import Order
from autoprune.deploy import misfits, searched
from autoprune.deploy.hf_uniform import HfUniform
from autoprune.errors import InputError
from autoprune.families import analyze
from autoprune.files.job import Job
from autoprune.files.policy_file import save_front
from autoprune.matrices import with_weights
from autoprune.policy import Policy
from autoprune.space import Space
from autoprune.tracing.ops import count_macs
from autoprune.tracing.verify import random_keep
from tests.deploy.decoders import analysed, cut
from tests.points import front_over
from tests.text_folders import write_model
from tests.transformer_models import MODELS

pytestmark = pytest.mark.filterwarnings("ignore:without a task autoprune.apply only slices")
HEADS = {"grouped queries": [(1, 2, 4)], "mistral": [(1, 2, 3, 4)]}
IDS = torch.arange(4, 12).view(2, 4)
INPUTS = ({"input_ids": IDS, "attention_mask": torch.ones_like(IDS)},)


def opened(folder: Path, kind: str) -> nn.Module:
    library: Any = pytest.importorskip("transformers")
    model: nn.Module = getattr(library, kind).from_pretrained(folder).eval()
    return model


@pytest.mark.parametrize(
    ("name", "kind", "keys"),
    [
        ("llama", "LlamaForCausalLM", ("intermediate_size", "num_key_value_heads", "num_attention_heads")),
        ("bert", "BertModel", ("intermediate_size",)),
        ("opt", "OPTForCausalLM", ("ffn_dim",)),
    ],
)
def test_uniform_layers_are_read_by_transformers_alone(
    name: str, kind: str, keys: tuple[str, ...], tmp_path: Path
) -> None:
    folder = write_model(tmp_path / "dense", name)
    held = load_file(folder / "model.safetensors")
    for query in (held[name] for name in held if name.endswith(("q_proj.weight", "query.weight"))):
        query[::2, ::2] = 0.0
    save_file(held, folder / "model.safetensors", {"format": "pt"})
    dense = opened(folder, kind)
    structure = searched(analyze(dense, INPUTS), Space(), "hf-uniform")
    assert all("*" in group.name for group in structure)
    save_front(front_over(dense, INPUTS, structure=structure), tmp_path / "policy.json")
    facts = apply_file(tmp_path / "policy.json", str(folder), "p00", tmp_path / "small", Order(deploy="hf-uniform"))
    assert str(tmp_path / "small" / "hf-uniform") in facts["files"]
    alone = opened(tmp_path / "small" / "hf-uniform", kind)
    small = autoprune.load(tmp_path / "small")
    with torch.no_grad():
        torch.testing.assert_close(alone(**INPUTS[0])[0], small(**INPUTS[0])[0], rtol=1e-4, atol=1e-5)
    zeros = [sum(int((p == 0).sum()) for p in m.parameters() if p.dim() > 1) for m in (alone, small)]
    assert zeros[0] == zeros[1] > 0
    config, before = (json.loads((f / "config.json").read_text()) for f in (tmp_path / "small" / "hf-uniform", folder))
    narrower = [key for key in keys if config[key] < before[key]]
    assert narrower
    assert "autoprune" not in config


@pytest.mark.parametrize("deploy", ["onnx", "tensorrt", "hf-uniform", "vllm-deci", "gguf-deci"])
def test_zeros_are_numbers_that_every_container_holds(deploy: str) -> None:
    structure = with_weights(analysed("grouped queries"))
    groups = [group for group in structure if group.kind == "weight"]
    assert groups
    policy = Policy.of(Policy.dense(structure).as_dict() | {group.name: group.grid[3] for group in groups})
    assert misfits(structure, policy, deploy) == []
    assert set(groups) <= set(plugins.load("deploy", deploy)().restrict(structure))


def test_a_llama_keeps_a_number_of_heads_that_its_configuration_takes() -> None:
    grids = {n: [g.grid for g in searched(analysed(n), Space(), "hf-uniform") if g.kind == "kv_group"] for n in HEADS}
    assert grids == HEADS  # of 32 channels, 6 heads of 4 are none of LlamaConfig's
    made = cut("grouped queries", None, **{f"model.layers.{i}.self_attn.q_proj": 3 for i in range(4)})
    with pytest.raises(InputError, match=r"a LlamaConfig refuses this point: .* is not a multiple of the num"):
        HfUniform().write(made.model, made.structure, made.policy, Path("nowhere"))


def test_the_cost_of_tied_layers_is_that_of_all_of_them(tmp_path: Path) -> None:
    small = MODELS["llama"]
    dense, inputs = small.build(), small.example()
    structure = searched(analyze(dense, inputs), Space(), "hf-uniform")
    kept = random_keep(structure.groups, np.random.default_rng(1))
    (point,) = front_over(dense, inputs, seed=1, structure=structure)
    pruned = autoprune.apply(point, dense, inputs)
    policy = Policy.of({name: len(atoms) for name, atoms in kept.items()})
    assert int(macs_polynomial(structure)(policy.array(structure))) == count_macs(pruned, inputs)


def test_a_point_that_does_not_fit_names_the_layers_and_the_nearest_width(tmp_path: Path) -> None:
    small = MODELS["llama"]
    dense, inputs = small.build(), small.example()
    front = front_over(dense, inputs)
    save_front(front, tmp_path / "policy.json")
    with pytest.raises(InputError, match=r"hf-uniform cannot hold point p00: .* the nearest that fits is "):
        apply_file(tmp_path / "policy.json", "os:getcwd", "p00", tmp_path / "small", Order(deploy="hf-uniform"))
    with pytest.raises(InputError, match="unknown container 'tensort'; did you mean 'tensorrt'"):
        apply_file(tmp_path / "policy.json", "os:getcwd", "p00", tmp_path / "small", Order(deploy="tensort"))
    structure = analyze(dense, inputs)
    odd = Policy.of({g.name: 13 if g.kind == "neuron" else g.width for g in structure})
    said = misfits(structure, odd, "tensorrt")
    assert said
    assert all(re.search(r"is 13 of 48, the nearest that fits is 16$", line) for line in said)


def test_a_job_names_its_container(tmp_path: Path) -> None:
    assert Job.from_dict({"task": {"name": "digits"}, "deploy": "hf-uniform"}).deploy == "hf-uniform"
    with pytest.raises(InputError, match="unknown container 'hf_uniform'; did you mean 'hf-uniform'"):
        Job.from_dict({"task": {"name": "digits"}, "deploy": "hf_uniform"})
    net = nn.Sequential(nn.Conv2d(1, 5, 3), nn.ReLU(), nn.Conv2d(5, 2, 3)).eval()
    with pytest.raises(InputError, match="deploy: hf-uniform can hold nothing of what the job searches"):
        searched(analyze(net, (torch.randn(2, 1, 8, 8),)), Space(), "hf-uniform")
