"""What is wrong with data, metrics or a loss is found out on the dense model, before anything is searched."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autoprune import plugins
from autoprune.errors import InputError
from autoprune.evaluator.checks import check_apart, check_enough, check_metrics
from autoprune.evaluator.fidelity import fidelity_for
from autoprune.protocols import Batch
from tests.small import RandomTask, world


class Scored(RandomTask):
    """Whose metrics are what a test says."""

    given: Any = 0.0

    def metrics(self, model: nn.Module, batches: Iterable[Batch]) -> Mapping[str, float]:
        if isinstance(self.given, Exception):
            raise self.given
        return {"auc": self.given}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (float("nan"), "the metric 'auc' of the dense model on the validation split is nan"),
        (float("inf"), "is inf"),
        (torch.zeros(3), "on validation fail"),
        (KeyError("auc"), "on validation fail: KeyError"),
    ],
)
def test_metrics_that_are_no_numbers_are_named(given: Any, words: str) -> None:
    task = Scored(nn.Identity(), (4,))
    object.__setattr__(task, "given", given)
    with pytest.raises(InputError, match=words):
        check_metrics(task, task.model, list(task.split("validation")))


def test_splits_that_share_samples_are_refused_and_a_few_equal_ones_said() -> None:
    task = RandomTask(nn.Linear(4, 2), (4,))
    calibration, validation = (list(task.split(name)) for name in ("calibration", "validation"))
    check_apart(calibration, validation)
    with pytest.raises(InputError, match="share 64 of 64 validation samples"):
        check_apart(calibration, calibration[::-1])
    with pytest.raises(InputError, match="share 16 of 64"):
        check_apart(calibration, [*calibration[:1], *validation[1:]])
    one = (torch.cat([validation[0][0][1:], calibration[2][0][3:4]]), validation[0][1])
    with pytest.warns(UserWarning, match="share 1 of 64"):
        check_apart(calibration, [one, *validation[1:]])


def test_a_default_larger_than_the_split_is_said_and_a_figure_of_the_job_refused() -> None:
    assert check_enough("calibration", 2048, 2048, 3000) == ""
    assert check_enough("calibration", 2048, 2048, 640) == (
        "calibration: all 640 samples of the split are used (2048 would be by default)"
    )
    with pytest.raises(InputError, match=r"evaluator\.calibration: the split has 640 samples, the job asks for 700"):
        check_enough("calibration", 700, 2048, 640)


def constant(outputs: Tensor, dense_outputs: Tensor, *, classes: int) -> Tensor:
    return torch.ones(len(outputs))


def scalar(outputs: Tensor, dense_outputs: Tensor, *, classes: int) -> Tensor:
    return (outputs - dense_outputs).square().mean()


def without_classes(outputs: Tensor, dense_outputs: Tensor) -> Tensor:
    return outputs[:, 0]


def own(outputs: Tensor, dense_outputs: Tensor, *, classes: int) -> Tensor:
    return (outputs - dense_outputs).abs().mean(1)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("constant", "0 for equal outputs; it gave up to 1"),
        ("scalar", r"Tensor \[samples\]; for outputs \[16, 5\] it gave \[\]"),
        ("without_classes", "it failed on outputs"),
    ],
)
def test_a_loss_of_ones_own_that_is_none_is_named(name: str, words: str) -> None:
    w = world("plain")
    batch = next(iter(w.task.split("validation")))
    with pytest.raises(InputError, match=words):
        fidelity_for(w.task, w.model, batch, f"{__name__}:{name}")


def test_a_loss_of_ones_own_goes_by_its_path() -> None:
    w = world("plain")
    batch = next(iter(w.task.split("validation")))
    found = fidelity_for(w.task, w.model, batch, f"{__name__}:own")
    assert found(torch.ones(2, 5), torch.zeros(2, 5)).tolist() == [1.0, 1.0]
    assert plugins.source_digest(own) in found.identity, "results of another source are other results"


def test_outputs_that_cannot_be_compared_are_named() -> None:
    w = world("plain")
    inputs, targets = next(iter(w.task.split("validation")))
    batch = (inputs, targets)
    with pytest.raises(InputError, match="not finite"):
        fidelity_for(w.task, w.model, (inputs * float("nan"), targets), "auto")
    with pytest.raises(InputError, match=r"must be a floating tensor .* not torch.int64 \[16\]"):
        fidelity_for(_other(w.task, lambda y: y.argmax(-1)), w.model, batch, "auto")
    with pytest.raises(InputError, match="kl over one value is 0 for every candidate"):
        fidelity_for(_other(w.task, lambda y: y[:, :1]), w.model, batch, "kl")
    with pytest.raises(InputError, match="classes=2 is no axis"):
        fidelity_for(w.task, w.model, batch, "auto", 2)


def _other(task: RandomTask, change: Any) -> Any:
    class Other(RandomTask):
        def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
            return change(super().outputs(model, batch))  # type: ignore[no-any-return]

    return Other(task.model, task.shape, task.samples)


def test_auto_follows_the_targets_and_says_so() -> None:
    w = world("plain")
    batch = next(iter(w.task.split("validation")))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = fidelity_for(w.task, w.model, batch, "auto")
    assert (found.name, found.classes) == ("kl", -1)
    assert "class numbers" in found.why
    assert replace(found, why="").name == "kl"
