"""The contract of every file in autoprune/tasks, but of those over images: data that repeat, a model that is fresh."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from autoprune import plugins
from autoprune.protocols import SPLITS, Task
from autoprune.tracing.inputs import call_model, example_tuple
from tests import text_folders


def needs_arguments(name: str) -> bool:
    parameters = inspect.signature(plugins.load("tasks", name)).parameters.values()
    return any(p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters)


@pytest.fixture(params=plugins.names("tasks"), scope="module")
def task(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Task]:
    if request.param in text_folders.TEXT_TASKS:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("AUTOPRUNE_CACHE", str(tmp_path_factory.mktemp("cache")))
            yield text_folders.make(tmp_path_factory.mktemp(request.param), request.param)
        return
    if needs_arguments(request.param):
        pytest.skip("it needs files; tests/tasks has some")
    yield plugins.load("tasks", request.param)()


def first(batches: Iterable[object]) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(next(iter(batches))) if isinstance(leaf, Tensor)]


def test_it_offers_what_a_task_must(task: Task) -> None:
    assert isinstance(task, Task)
    assert isinstance(task.directions, Mapping)
    assert set(task.directions.values()) <= {"maximize", "minimize"}


@pytest.mark.parametrize("split", SPLITS)
def test_every_split_repeats_itself(task: Task, split: str) -> None:
    one, two = first(task.split(split)), first(task.split(split))
    assert one
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_splits_differ(task: Task) -> None:
    inputs = [first(task.split(split))[0] for split in SPLITS]
    assert all(a.shape != b.shape or not torch.equal(a, b) for a, b in pairwise(inputs))


def test_every_model_is_fresh_and_alike(task: Task) -> None:
    one, two = task.build(), task.build()
    assert one is not two
    assert {id(p) for p in one.parameters()}.isdisjoint(id(p) for p in two.parameters())
    assert all(torch.equal(a, two.state_dict()[name]) for name, a in one.state_dict().items())


def test_outputs_loss_and_metrics_go_together(task: Task) -> None:
    model = task.build().eval()
    inputs = example_tuple(task.example_inputs())
    batch = next(iter(task.split("calibration")))
    with torch.no_grad():
        assert tree_leaves(call_model(model, inputs))
        outputs = task.outputs(model, batch)
        metrics = task.metrics(model, [batch])
    assert bool(torch.isfinite(outputs).all())
    assert set(metrics) == set(task.directions)
    loss = task.loss(model, batch)
    assert loss.shape == ()
    loss.backward()
    assert any(p.grad is not None and bool((p.grad != 0).any()) for p in model.parameters())
