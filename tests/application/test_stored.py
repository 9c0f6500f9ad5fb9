"""Points that store weights in 8 bits: stitched, repaired, applied, on disk, without autoprune, and as an int8 file."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import autoprune
from autoprune import plugins
from autoprune.application.int8 import quantise
from autoprune.application.plain import RECIPE
from autoprune.database.build import build_database
from autoprune.database.stitch import Stitcher
from autoprune.errors import InputError, RunError
from autoprune.evaluation import Ask
from autoprune.evaluator.settings import Settings
from autoprune.evaluator.tiers import TieredEvaluator
from autoprune.exports import export
from autoprune.files.policy_file import load_front, save_front
from autoprune.front import Front
from autoprune.policy import Policy
from autoprune.space import Space
from autoprune.tracing.rounding import nearest
from tests.points import front_over
from tests.small import World, world_of


class Net(nn.Module):
    """Two convolutions that a channel group ties, a pointwise one, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 24, 3, padding=1, bias=False), nn.BatchNorm2d(24)
        self.wide = nn.Conv2d(24, 40, 3, padding=1)
        self.head = nn.Linear(40, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.wide(self.bn(self.stem(x)).relu()).relu()
        out: torch.Tensor = self.head(x.mean((2, 3)))
        return out


def small() -> World:
    torch.manual_seed(0)
    return world_of(Net().eval(), (3, 8, 8), space=Space(bits=(32, 8)))


@pytest.fixture(scope="module")
def w() -> World:
    return small()


def policy_of(w: World, **widths: int) -> Policy:
    return Policy.of(Policy.dense(w.structure).as_dict() | widths)


def front_of(w: World, policy: Policy) -> Front:
    front = front_over(w.model, w.task.example_inputs(), structure=w.structure)
    point = front[0]
    keep = {g.name: tuple(range(policy.as_dict()[g.name])) for g in w.structure}
    return Front(
        (type(point)(point.id, policy, keep, point.costs, point.losses, {}, 0, point.base),), front.base, {}, {}
    )


def is_stored_in_8_bits(weight: torch.Tensor) -> bool:
    return torch.equal(nearest(weight.detach()).weight, weight.detach())


ALL = {"stem.weight@bits": 8, "wide.weight@bits": 8, "head.weight@bits": 8}


def test_a_stitched_weight_is_rounded_and_comes_back_as_it_was(w: World) -> None:
    database = build_database(w.model, w.structure, w.seen, plugins.load("criteria", "obs")())
    stitcher = Stitcher(w.model, w.structure, database)
    narrow = w.structure.group("stem").grid[1]
    for policy in (policy_of(w, **ALL), policy_of(w, **ALL, stem=narrow), policy_of(w, stem=narrow)):
        model = stitcher.stitch(policy)
        rounded = policy.as_dict()["wide.weight@bits"] == 8
        assert is_stored_in_8_bits(model.wide.weight) == rounded
        fresh = Stitcher(w.model, w.structure, database).stitch(policy)
        assert all(
            torch.equal(a, b) for a, b in zip(model.state_dict().values(), fresh.state_dict().values(), strict=True)
        )
    stitcher.stitch(Policy.dense(w.structure))
    assert torch.equal(stitcher.model.wide.weight, w.model.wide.weight)


def test_compensation_keeps_the_outputs_nearer_than_rounding_alone(w: World) -> None:
    database = build_database(w.model, w.structure, w.seen, plugins.load("criteria", "obs")())
    x = w.statistics[0]
    losses = []
    for compensated in (True, False):
        model = Stitcher(w.model, w.structure, database, compensated).stitch(policy_of(w, **{"wide.weight@bits": 8}))
        with torch.no_grad():
            losses.append(float((model(x) - w.model(x)).square().mean()))
    assert 0 < losses[0] < losses[1]


def test_every_tier_scores_a_model_of_rounded_weights(w: World) -> None:
    database = build_database(w.model, w.structure, w.seen, plugins.load("criteria", "obs")())
    settings = Settings(calibration=64, validation=32, finetune_steps=2, loss="kl", precision="fp32")
    evaluator = TieredEvaluator(w.task, w.structure, database, settings)
    narrow = w.structure.group("stem").grid[1]
    policy = policy_of(w, **ALL, stem=narrow)
    for tier in ("stitch", "refit", "tune"):
        assert evaluator(Ask(policy, tier)).ok
        model = evaluator.repaired(Ask(policy, tier))
        assert all(is_stored_in_8_bits(m.weight) for m in (model.stem, model.wide, model.head))


def test_an_applied_point_is_small_on_disk_and_is_read_back_bit_for_bit(w: World, tmp_path: Path) -> None:
    front = front_of(w, policy_of(w, **ALL, stem=w.structure.group("stem").grid[3]))
    save_front(front, tmp_path / "policy.json")
    front = load_front(tmp_path / "policy.json")
    assert front.base.groups == w.structure.groups
    with pytest.warns(UserWarning, match="only slices"):
        made = autoprune.apply(front[0], w.model, w.task.example_inputs())
    assert is_stored_in_8_bits(made.wide.weight)
    autoprune.save(made, tmp_path / "out")
    held = load_file(tmp_path / "out" / "model.safetensors")
    assert held["wide.weight"].dtype == torch.int8
    again = autoprune.load(tmp_path / "out", factory=w.task.build)
    own: dict[str, object] = {}
    exec(RECIPE, own)
    plain = own["pruned"](w.task.build(), str(tmp_path / "out"))  # type: ignore[operator]
    for other in (again, plain):  # layouts in memory may differ, numbers may not
        for (name, a), b in zip(other.state_dict().items(), made.state_dict().values(), strict=True):
            assert torch.equal(a, b), name


def test_what_was_trained_since_is_saved_as_it_is_and_said(w: World, tmp_path: Path) -> None:
    front = front_of(w, policy_of(w, **ALL))
    with pytest.warns(UserWarning, match="only slices"):
        made = autoprune.apply(front[0], w.model, w.task.example_inputs())
    with torch.no_grad():
        made.wide.weight.add_(0.01 * torch.rand_like(made.wide.weight))
    with pytest.warns(UserWarning, match=r"wide.weight: the policy stores it in 8 bits, and it was trained since"):
        autoprune.save(made, tmp_path / "out")
    again = autoprune.load(tmp_path / "out", factory=w.task.build)
    assert torch.equal(again.wide.weight, made.wide.weight)


def test_a_policy_whose_matrix_the_model_lacks_is_refused(w: World) -> None:
    front = front_of(w, policy_of(w, **ALL))
    other = Net()
    other.head = nn.Sequential(nn.Linear(40, 16))  # type: ignore[assignment]
    with pytest.raises(InputError, match=r"head.weight@bits: the model has no matrix 'head.weight'"):
        autoprune.apply(front[0], other.eval(), w.task.example_inputs())


@pytest.mark.skipif(
    any(importlib.util.find_spec(p) is None for p in ("onnx", "onnxscript", "onnxruntime")),
    reason="needs the extra autoprune[onnx]",
)
def test_the_int8_file_quantises_what_the_point_stores_in_8_bits_and_nothing_else(w: World, tmp_path: Path) -> None:
    import onnx
    from onnx import numpy_helper

    front = front_of(w, policy_of(w, **{"wide.weight@bits": 8}))
    with pytest.warns(UserWarning, match="only slices"):
        made = autoprune.apply(front[0], w.model, w.task.example_inputs()).eval()
    (path,) = export(made, w.task.example_inputs(), ["onnx"], tmp_path)
    found = quantise(path, made, w.task, w.task.example_inputs(), chosen=True)
    graph = onnx.load(found.path).graph
    ints = {c.name: numpy_helper.to_array(c) for c in graph.initializer if c.data_type == onnx.TensorProto.INT8}
    matrices = [value for value in ints.values() if value.ndim > 1]
    assert len(matrices) == 1
    if float(np.abs(matrices[0]).max()) == 127:  # else the processor has no VNNI, and 7 bits it is
        assert np.array_equal(matrices[0], nearest(made.wide.weight.detach()).integers.numpy())
    dense = w.task.build().eval()
    (path,) = export(dense, w.task.example_inputs(), ["onnx"], tmp_path)
    with pytest.raises(RunError, match="stores no weight in 8 bits"):
        quantise(path, dense, w.task, w.task.example_inputs(), chosen=True)


def test_the_policy_file_tells_which_weights(w: World, tmp_path: Path) -> None:
    save_front(front_of(w, policy_of(w, **ALL)), tmp_path / "policy.json")
    told = json.loads((tmp_path / "policy.json").read_text())
    assert told["groups"]["wide.weight@bits"] == {
        **{"kind": "bits", "width": 32, "grid": [8, 32], "slices": [], "matrices": ["wide.weight"]}
    }
    assert told["points"][0]["widths"]["wide.weight@bits"] == 8
