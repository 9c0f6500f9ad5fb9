"""Mistakes in Python get one line each, as the command line's do: what, what came, what is allowed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

import autoprune
from autoprune.application.training import Training, figures, promised
from autoprune.comparison.checks import asked_names, checked_budgets, checked_names, checked_seeds
from autoprune.criteria import build_criterion
from autoprune.errors import InputError
from autoprune.files.job import Job
from autoprune.front import Front
from autoprune.protocols import Batch
from autoprune.run.ignored import ignored
from autoprune.run.prepare import settings_of
from tests.plugged import Tilted, mlp
from tests.small import RandomTask

JOB: dict[str, Any] = {
    "criterion": "l1_norm",
    "budget": {"macs": [0.3, 0.9], "at": [0.6]},
    "search": {"trials": 3, "sampler": "random"},
    "evaluator": {"calibration": 32, "validation": 16, "finalists": 0, "fitness": "refit", "sensitivity": 0},
    "executor": {"kind": "inline"},
}
SPLITS = ("calibration", "validation", "test", "train")


def anything(value: Any) -> Any:
    """What a type checker would refuse at once."""
    return value


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[Front, RandomTask]:
    task = mlp()
    return autoprune.search(JOB, task=task, out=tmp_path_factory.mktemp("run")).finish().front, task


@pytest.mark.parametrize(
    ("mistake", "said"),
    [
        (lambda: Training.of(anything(3), None), "finetune is a word: none, proxy, full, not 3; epochs are finetune_e"),
        (lambda: Training.of(None, anything("2")), "must be a number of epochs from 0 to 10000, not '2'"),
        (lambda: Training.of(None, True), "must be a number of epochs from 0 to 10000, not True"),
        (lambda: build_criterion(anything(Tilted)), r"a criterion is named: .* \(as tests.plugged:Tilted\)"),
        (lambda: autoprune.analyze(anything(nn.Linear), (torch.ones(2, 3),)), "not the class Linear"),
        (lambda: checked_budgets(anything(["0.5"])), "--budgets takes ratios to dense, as in 0.7,0.5,0.3, not '0.5'"),
        (lambda: checked_budgets(anything(None)), "--budgets takes ratios to dense, .*, not None"),
        (lambda: checked_names(anything([None])), "--strategies takes names, as in uniform,evolution, not None"),
        (lambda: checked_seeds(anything("3"), 0), "--seeds takes whole numbers, as in 3 or 0,1,2, not '3'"),
        (lambda: checked_seeds(anything(2.5), 0), "--seeds takes whole numbers, as in 3 or 0,1,2, not 2.5"),
    ],
)
def test_a_wrong_argument_is_one_line(mistake: Callable[[], object], said: str) -> None:
    with pytest.raises(InputError, match=said):
        mistake()


def test_one_name_and_one_budget_need_no_list() -> None:
    job = Job.of(JOB, mlp())
    assert checked_names(asked_names("uniform", job)) == ("uniform",)
    assert checked_budgets(0.5) == (0.5,)
    with pytest.raises(InputError, match="unknown name 'uniformm'; did you mean 'uniform'"):
        checked_names(asked_names("uniformm", job))


def test_a_mapping_needs_no_task_where_one_is_lent(tmp_path: Path) -> None:
    document = autoprune.compare(JOB, "uniform", 0.6, 1, tmp_path, task=mlp())
    assert [row["strategy"] for row in document["rows"]] == ["uniform"]
    with pytest.raises(InputError, match="task is a Linear without build"):
        autoprune.compare(JOB, "uniform", 0.6, 1, tmp_path, task=anything(nn.Linear(2, 2)))


def test_an_axis_of_classes_is_a_whole_number() -> None:
    loaders = {key: [(torch.randn(4, 3), torch.zeros(4, dtype=torch.long))] for key in SPLITS}
    given = (nn.Linear(3, 2), loaders, nn.functional.cross_entropy, lambda outputs, targets: {})
    with pytest.raises(InputError, match=r"classes must be the number of an axis of the outputs, .*, not '1'"):
        autoprune.task(*anything(given), classes=anything("1"))


def test_apply_names_a_task_that_is_none_and_a_wrapper_around_the_model(found: tuple[Front, RandomTask]) -> None:
    (point, *_), task = found
    model, inputs = task.build(), task.example_inputs()
    with pytest.raises(InputError, match="task is a Sequential without build"):
        autoprune.apply(point, model, inputs, task=anything(model))
    with pytest.raises(InputError, match=r"model must be a torch\.nn\.Module that can be called, not the class Linear"):
        autoprune.apply(point, anything(nn.Linear), inputs, task=task)
    with pytest.raises(InputError, match=r"wrapped in DataParallel: pass the model inside, its `\.module`"):
        autoprune.apply(point, nn.DataParallel(model), inputs, task=task)
    with pytest.raises(InputError, match=r"wrapped in OptimizedModule: pass the model inside, its `\._orig_mod`"):
        autoprune.apply(point, anything(torch.compile(model, backend="eager")), inputs, task=task)


def test_apply_draws_the_calibration_samples_once(found: tuple[Front, RandomTask]) -> None:
    (point, *_), task = found

    class Counted(RandomTask):
        drawn: ClassVar[list[str]] = []

        def split(self, name: str) -> Iterable[Batch]:
            self.drawn.append(name)
            return super().split(name)

    counted = Counted(task.model, task.shape, task.samples)
    autoprune.apply(point, task.build(), task.example_inputs(), task=counted, finetune="none")
    assert Counted.drawn.count("calibration") == 1


def test_what_was_never_scored_before_its_fine_tune_is_not_promised(found: tuple[Front, RandomTask]) -> None:
    (point, *_), _ = found
    base = replace(point.base, space={**point.base.space, "tier": "tune"})
    tuned = replace(point, base=base, finetuned={"recipe": "proxy", "steps": 1, "seed": 0})
    assert promised(tuned, Training.of("none", None)) is None
    assert promised(tuned, Training.of(None, None)) == figures(tuned, "validation")
    assert promised(point, Training.of("none", None)) == figures(point, "validation")


def test_what_a_job_asks_for_in_vain_is_said() -> None:
    given = {**JOB, "latency": {"runtime": "eager"}, "evaluator": {"finalists": 3, "finetune_steps": 0}}
    job = Job.of(given, mlp())
    assert ignored(job, settings_of(job)) == (
        "latency.runtime is not used: latency is no cost of this search (objectives.costs)",
        "evaluator.finalists: 3 is not used: evaluator.finetune_steps is 0",
    )
    used = Job.of({**given, "objectives": {"costs": ["macs", "latency"]}, "evaluator": {"finetune_steps": 0}}, mlp())
    assert ignored(used, settings_of(used)) == ()
    for costs, said in (([], 1), (["bytes"], 0)):
        bits = Job.of({**JOB, "space": {"bits": [32, 8]}, "objectives": {"costs": ["macs", *costs]}}, mlp())
        found = [line for line in ignored(bits, settings_of(bits)) if line.startswith("space.bits saves nothing here")]
        assert len(found) == said
    for costs, said in (([], 1), (["nonzeros"], 0), (["bytes"], 0)):
        space = {"granularity": ["channel", "weight"]}
        zeros = Job.of({**JOB, "space": space, "objectives": {"costs": ["macs", *costs]}}, mlp())
        found = [line for line in ignored(zeros, settings_of(zeros)) if "zeros in weights save nothing here" in line]
        assert len(found) == said
