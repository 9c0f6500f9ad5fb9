"""A user's model becomes a task: inputs, batches and outputs as people have them, and mistakes named at once."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from autoprune.database.batches import Parts, gather, size
from autoprune.errors import InputError
from autoprune.protocols import SPLITS
from autoprune.tasks._wrap import WrappedTask
from autoprune.tasks._wrap import task as wrap
from autoprune.tracing.inputs import call_model, described

N = 12


def rows(seed: int, n: int = N) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 5, generator=generator), torch.randint(3, (n,), generator=generator)


def loaders(made: Any = lambda x, y: (x, y), size: int = 8) -> dict[str, Any]:
    """Two batches a split, the last one smaller."""
    found = {}
    for seed, name in enumerate(SPLITS):
        x, y = rows(seed)
        found[name] = [made(a, b) for a, b in zip(x.split(size), y.split(size), strict=True)]
    return found


def accuracy(outputs: Any, targets: Any) -> Mapping[str, float]:
    return {"accuracy": float((outputs.argmax(-1) == targets).float().mean())}


class Net(nn.Module):
    """x -> three logits, in the form of `kind`."""

    def __init__(self, kind: str = "plain") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.kind = nn.Linear(5, 8), nn.Linear(8, 3), kind

    def forward(self, x: Any, y: Any = None) -> Any:
        if self.kind == "images":
            x = torch.stack(x)
        if self.kind == "record":
            x = x["x"]
        h = self.b(F.relu(self.a(x if y is None else x + y)))
        return {"out": h, "plus": h + 1} if self.kind == "dict" else Out(x, h) if self.kind == "dataclass" else h


@dataclass
class Out:
    hidden: Tensor
    logits: Tensor


def whole_pass(task: WrappedTask) -> tuple[Tensor, float]:
    """Outputs of the first calibration batch, and the metric over the test split of two batches."""
    batch = next(iter(task.split("calibration")))
    model = task.build()
    assert sum(map(size, gather(task.split("test"), 100))) == N
    assert Parts.of(task, 100).total == N
    with torch.no_grad():
        assert torch.isfinite(task.loss(model, batch))
        call_model(model, task.example_inputs())
    return task.outputs(model, batch), task.metrics(model, task.split("test"))["accuracy"]


REFERENCE = Net()
X, Y = rows(SPLITS.index("calibration"))
EXPECTED = float((REFERENCE(rows(SPLITS.index("test"))[0]).argmax(-1) == rows(SPLITS.index("test"))[1]).float().mean())


@pytest.mark.parametrize(
    ("kind", "made"),
    [
        ("plain", lambda x, y: (x, y)),
        ("plain", lambda x, y: [x, y]),
        ("plain", lambda x, y: (x.numpy(), y.numpy())),
        ("plain", lambda x, y: (x.double(), y)),
        ("plain", lambda x, y: ((x, 0 * x), y)),
        ("plain", lambda x, y: ([x, 0 * x], y)),
        ("plain", lambda x, y: ({"x": x, "y": 0 * x}, y)),
        ("record", lambda x, y: ({"x": x, "other": x}, y)),
        ("images", lambda x, y: (list(x), y)),
        ("plain", lambda x, y: {"x": x, "y": 0 * x, "labels": y}),
        ("plain", lambda x, y: {"x": x, "label": y}),
        ("plain", lambda x, y: UserDict(targets=y, x=x.numpy())),
        ("record", lambda x, y: {"x": x, "other": x, "target": y}),
    ],
)
def test_inputs_of_any_form_give_what_the_plain_ones_give(kind: str, made: Any) -> None:
    outputs, found = whole_pass(wrap(Net(kind), loaders(made), F.cross_entropy, accuracy))
    assert torch.allclose(outputs, REFERENCE(X[:8]))
    assert found == pytest.approx(EXPECTED)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (
            lambda x, y: {"x": x, "y": y},
            "the targets under one of labels, label, targets, target, not a dict of 'x', 'y'$",
        ),
        (lambda x, y: {"x": x, "labels": y, "label": y}, "not a dict of 'x', 'labels', 'label'$"),
        (lambda x, y: {"labels": y}, "not a dict of 'labels'$"),
        (lambda x, y: (x, y, y), "not a tuple of 3$"),
        (lambda x, y: {"image": x, "label": y}, "no parameters 'image', so it was given the dict as one argument$"),
    ],
)
def test_batches_without_inputs_and_targets_are_refused_with_what_is_allowed(made: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        wrap(Net(), loaders(made), F.cross_entropy, accuracy)


@pytest.mark.parametrize(
    ("kind", "wanted", "get"),
    [
        ("dict", None, lambda out: out["out"]),
        ("dict", "plus", lambda out: out["plus"]),
        ("dict", 1, lambda out: out["plus"]),
        ("dataclass", None, lambda out: out.logits),
        ("dataclass", lambda out: out.logits * 2, lambda out: out.logits),
    ],
)
def test_outputs_of_any_form_are_seen_whole_by_loss_and_metric(kind: str, wanted: Any, get: Any) -> None:
    task = wrap(
        Net(kind),
        loaders(),
        lambda out, y: F.cross_entropy(get(out), y),
        lambda out, y: accuracy(get(out), y),
        outputs=wanted,
    )
    outputs, found = whole_pass(task)
    shift = {"plus": 1.0, 1: 1.0}.get(wanted, 0.0) if not callable(wanted) else 0.0
    assert torch.allclose(outputs, REFERENCE(X[:8]) * (2 if callable(wanted) else 1) + shift)
    assert found == pytest.approx(EXPECTED)
    assert task.output_said


def test_the_axis_of_the_classes_is_the_tasks() -> None:
    assert wrap(Net(), loaders(), F.cross_entropy, accuracy, classes=1).classes == 1
    assert wrap(Net(), loaders(), F.cross_entropy, accuracy).classes is None


def test_example_inputs_of_a_dict_keep_their_names_and_are_two_samples() -> None:
    task = wrap(Net(), loaders(lambda x, y: ({"x": x, "y": x}, y), size=1), F.cross_entropy, accuracy)
    (inputs,) = task.example_inputs()
    assert {name: x.shape for name, x in inputs.items()} == {"x": (2, 5), "y": (2, 5)}
    assert [d["name"] for d in described(task.example_inputs())] == ["x", "y"]
    assert described((X,)) == ({"shape": [12, 5], "dtype": "float32"},)


class Clips(nn.Module):
    """Four frames a clip, folded into the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).view(-1, 4, 3).mean(1)


def test_clips_are_counted_by_their_targets() -> None:
    task = wrap(Clips(), loaders(lambda x, y: (x.repeat_interleave(4, 0), y)), F.cross_entropy, accuracy)
    outputs, found = whole_pass(task)
    assert torch.allclose(outputs, REFERENCE(X[:8]), atol=1e-6)
    assert found == pytest.approx(EXPECTED)
    assert task.example_inputs()[0].shape == (8, 5)


def test_outputs_that_cannot_be_joined_are_measured_batch_by_batch() -> None:
    def made(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        length = len(x)  # the last batch is shorter in both dimensions
        return x[:, None].expand(-1, length, -1), y[:, None].expand(-1, length)

    task = wrap(Net(), loaders(made), lambda o, y: F.cross_entropy(o.movedim(-1, 1), y), accuracy)
    assert task.metrics(task.build(), task.split("test"))["accuracy"] == pytest.approx(EXPECTED)


def test_a_model_just_trained_becomes_a_task() -> None:
    model = Net().train()
    model.kept = F.relu(model.a(X))  # a tensor with a history, which deepcopy refuses
    assert not wrap(model, loaders(), F.cross_entropy, accuracy).build().training
    assert model.training


class Augmented:
    """New noise at every pass."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        x, y = rows(9)
        yield x + torch.randn_like(x), y


def test_train_may_shuffle_and_augment_and_the_others_may_not() -> None:
    shuffled = DataLoader(TensorDataset(*rows(9)), batch_size=4, shuffle=True)
    for train in (Augmented(), shuffled):
        wrap(Net(), {**loaders(), "train": train}, F.cross_entropy, accuracy)
        for name in ("calibration", "validation", "test"):
            with pytest.raises(InputError, match=rf"loaders\['{name}'\] shuffles or augments"):
                wrap(Net(), {**loaders(), name: train}, F.cross_entropy, accuracy)


def _nothing(outputs: Any, targets: Any) -> Mapping[str, float]:
    return {}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"loaders": [(X, Y)]}, "loaders must map calibration, .* to loaders each, not be a list"),
        (
            {"loaders": loaders(lambda x, y: (x[:, :4], y))},
            r"fails on the first batch .* .float32 \[8, 4\].",
        ),
        ({"metric_fn": lambda o, y: 0.5}, "must return a mapping of names to floats, not a float"),
        ({"metric_fn": lambda o, y: {"hits": o}}, r"one number for 'hits', not a Tensor \[8, 3\]"),
        ({"metric_fn": lambda o, y: {"a": o["x"]}}, "metric_fn fails on the first validation batch"),
        ({"loss_fn": lambda o, y: F.cross_entropy(o, y, reduction="none")}, r"scalar tensor.*not a tensor \[8\]"),
        ({"directions": {"acuracy": "maximize"}}, "did you mean 'accuracy'"),
        ({"directions": {"accuracy": "max"}}, "'accuracy' is 'max'; allowed: maximize, minimize"),
        ({"outputs": "logit"}, "outputs='logit': the model returns a tensor"),
        ({"model": "resnet18"}, "model must be a torch.nn.Module, not a str"),
    ],
)
def test_mistakes_are_named_when_the_task_is_made(change: dict[str, Any], words: str) -> None:
    given = {"model": Net(), "loaders": loaders(), "loss_fn": F.cross_entropy, "metric_fn": accuracy, **change}
    with pytest.raises(InputError, match=words):
        wrap(**given)


@pytest.mark.parametrize(
    ("one", "other"),
    [("train", "test"), ("calibration", "test"), ("validation", "test"), ("train", "validation")],
)
def test_splits_that_begin_with_the_same_samples_are_told_and_train_may_hold_calibration(one: str, other: str) -> None:
    given = loaders()
    said = wrap(Net(), {**given, other: given[one]}, F.cross_entropy, accuracy).samples_said
    assert [f"the splits {one} and {other} begin with the same samples" in line for line in said] == [True]
    assert wrap(Net(), {**given, "train": given["calibration"]}, F.cross_entropy, accuracy).samples_said == ()


def test_a_metric_may_be_a_tensor_or_a_number_of_numpy() -> None:
    for kind in (torch.tensor, np.float32):
        task = wrap(Net(), loaders(), F.cross_entropy, lambda o, y, kind=kind: {"a": kind(0.5)})
        assert task.metrics(task.build(), task.split("test")) == {"a": 0.5}
