"""A user's plug-in that fails or does what its protocol forbids: one line that names it, 2 before work, 3 within."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from autoprune.allocation.budget import Projector
from autoprune.cli import run
from autoprune.costs import build_cost
from autoprune.errors import PluginError
from autoprune.evaluation import Ask, Evaluation
from autoprune.executors.inline import Inline
from autoprune.files.policy_file import load_front
from autoprune.policy import IntArray, Policy
from autoprune.protocols import EvaluatorFactory, FloatArray, Problem, Progress, Task
from autoprune.structure import Group, Structure
from tests.synthetic import chain

HERE = __name__
JOB: dict[str, Any] = {
    "task": {"factory": "tests.plugged:mlp"},
    "criterion": "l1_norm",
    "budget": {"macs": [0.3, 0.9], "at": [0.6]},
    "search": {"trials": 4, "window": 2, "sampler": "random"},
    "evaluator": {"calibration": 32, "validation": 16, "finalists": 0, "fitness": "refit", "sensitivity": 0},
    "executor": {"kind": "inline"},
}


class Sound:
    """A sampler that does nothing wrong; those below do one thing."""

    def __init__(self, problem: Problem, rng: np.random.Generator) -> None:
        self.problem, self.rng, self.told = problem, rng, 0
        self.projector = Projector(problem.structure, problem.costs)

    def ask(self) -> Any:
        ratios = self.rng.random(len(self.problem.structure))
        return Ask(self.projector.project(ratios, {"macs": 0.8}), self.problem.tier)

    def tell(self, evaluation: Evaluation) -> None:
        self.told += 1


class Unborn(Sound):
    def __init__(self, problem: Problem, rng: np.random.Generator) -> None:
        raise KeyError("boom")


class Speechless(Sound):
    def ask(self) -> Any:
        raise RuntimeError("no ask")


class BarePolicy(Sound):
    def ask(self) -> Any:
        return Policy.dense(self.problem.structure)


class OffGrid(Sound):
    def ask(self) -> Any:
        return Ask(Policy.of({g.name: g.width + 1 for g in self.problem.structure}), self.problem.tier)


class Nameless(Sound):
    def ask(self) -> Any:
        return Ask(Policy.dense(self.problem.structure), "refitted")  # type: ignore[arg-type]


class LateInTell(Sound):
    def tell(self, evaluation: Evaluation) -> None:
        self.told += 1
        if self.told == 3:
            raise RuntimeError("too late")


class OneArgument:
    slots = 1

    def __init__(self, make_evaluator: EvaluatorFactory) -> None:
        """Too few."""


class Memberless:
    def __init__(self, make_evaluator: EvaluatorFactory, workers: int, timeout_s: float, retries: int) -> None:
        """Nothing else."""


class LateExecutor(Inline):
    def __init__(self, make_evaluator: EvaluatorFactory, workers: int, timeout_s: float, retries: int) -> None:
        super().__init__(make_evaluator, retries)

    def submit(self, index: int, ask: Ask) -> None:
        if index > 3:
            raise RuntimeError("the queue is closed")
        super().submit(index, ask)


class Doubling:
    def __call__(self, model: nn.Module, groups: Sequence[Group], task: Task) -> Mapping[str, Tensor]:
        for parameter in model.parameters():
            parameter.data.mul_(2)
        return {g.name: torch.ones(g.width) for g in groups}


class InTraining:
    def __call__(self, model: nn.Module, groups: Sequence[Group], task: Task) -> Mapping[str, Tensor]:
        model.train()
        return {g.name: torch.ones(g.width) for g in groups}


class AsList:
    def __call__(self, model: nn.Module, groups: Sequence[Group], task: Task) -> Any:
        return [torch.ones(g.width) for g in groups]


class NowAndThen:
    """A cost that is no number any more once `broken` is set."""

    monotone, dense, broken = True, 1.0, False

    def __init__(self, structure: Structure) -> None:
        self._dense = Policy.dense(structure).array(structure).sum()

    def __call__(self, widths: IntArray) -> FloatArray:
        ratios = np.asarray(widths).sum(-1) / self._dense
        return np.asarray(ratios * (np.nan if self.broken else 1.0))


def raising(problem: Problem, target: float) -> Policy:
    raise LookupError("nowhere")


def generous(problem: Problem, target: float) -> Policy:
    return Policy.dense(problem.structure)


class Untrained:
    def __init__(self, rate: float = 0.1) -> None:
        """With an option."""

    def __call__(self, model: nn.Module, dense: nn.Module, task: Task, steps: int, seed: int) -> Iterator[Progress]:
        raise LookupError("no teacher")
        yield


class StaysInTraining(Untrained):
    def __call__(self, model: nn.Module, dense: nn.Module, task: Task, steps: int, seed: int) -> Iterator[Progress]:
        model.train()
        yield Progress(1, 0.0, 1)


class NoSuffix:
    def __call__(self, model: nn.Module, inputs: tuple[Any, ...], path: Path) -> None:
        """Writes nothing."""


def written(model: nn.Module, inputs: tuple[Any, ...], path: Path) -> None:
    """A function where a class is wanted."""


def search(folder: Path, changes: Mapping[str, Any]) -> int:
    (folder / "job.yaml").write_text(json.dumps({**JOB, **changes}))
    return run(["search", str(folder / "job.yaml"), "--out", str(folder / "run")])


def sampler(name: str) -> dict[str, Any]:
    return {"search": {**JOB["search"], "sampler": f"{HERE}:{name}"}}


AT_ONCE = [
    (
        sampler("Unborn"),
        f"sampler {HERE}:Unborn fails while it is built: KeyError: 'boom'; it must be a class S(problem",
    ),
    (
        sampler("Speechless"),
        f"sampler {HERE}:Speechless fails in ask(): RuntimeError: no ask; it must be a class S(problem",
    ),
    (sampler("BarePolicy"), f"sampler {HERE}:BarePolicy fails in ask(): TypeError: it proposes a Policy, not an Ask;"),
    (sampler("OffGrid"), f"sampler {HERE}:OffGrid fails in ask(): group '0' cannot be 25 wide; its grid is (3, 4"),
    (sampler("Nameless"), f"sampler {HERE}:Nameless fails in ask(): tier must be one of"),
    (
        sampler("raising"),
        f"sampler {HERE}:raising fails while it is built: LookupError: nowhere; it must be a class S(",
    ),
    (sampler("generous"), f"sampler {HERE}:generous gives a Policy without ask, tell; it must be a class S("),
    (
        {"executor": {"kind": f"{HERE}:OneArgument"}},
        f"executor {HERE}:OneArgument cannot be built: too many positional arguments; it must be a class E(",
    ),
    (
        {"executor": {"kind": f"{HERE}:Memberless"}},
        f"executor {HERE}:Memberless gives a type without submit, next_done, cancel, close, workers, retried; it",
    ),
    ({"criterion": f"{HERE}:Doubling"}, f"criterion {HERE}:Doubling fails on this model: ValueError: it changed 0.wei"),
    (
        {"criterion": f"{HERE}:InTraining"},
        "it changed the training mode of the model that it was lent; it must be a class",
    ),
    ({"criterion": f"{HERE}:AsList"}, f"criterion {HERE}:AsList fails on this model: TypeError: it gives a list, not"),
    (
        {"compare": {"controls": [f"{HERE}:raising"]}},
        f"compare.controls: strategy {HERE}:raising fails at the target 0.6: LookupError: nowhere; it must be a f",
    ),
    (
        {"compare": {"controls": [f"{HERE}:generous"]}},
        f"compare.controls: strategy {HERE}:generous gives a policy of macs 1 at the target 0.6; it must be a f",
    ),
    (
        {"recovery": {"schedule": f"{HERE}:Untrained", "options": {"lr": 1}}},
        "recovery.options: unknown option 'lr'; allowed: rate",
    ),
    ({"recovery": {"schedule": f"{HERE}:written"}}, f"recovery '{HERE}:written' must be a class whose instances"),
]


@pytest.mark.parametrize(("changes", "said"), AT_ONCE, ids=[said[:60] for _, said in AT_ONCE])
def test_before_any_work_it_is_wrong_input(
    changes: Mapping[str, Any], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert search(tmp_path, changes) == 2
    (line,) = [text for text in capsys.readouterr().err.splitlines() if text.startswith("autoprune: ")]
    assert said in line
    assert not (tmp_path / "run" / "study.journal").exists()  # nothing was evaluated


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            sampler("LateInTell"),
            f"sampler {HERE}:LateInTell fails in tell(): RuntimeError: too late; it must be a class S(",
        ),
        (
            {"executor": {"kind": f"{HERE}:LateExecutor"}},
            f"executor {HERE}:LateExecutor fails in submit(): RuntimeError: the queue is closed; it must be a class E(",
        ),
    ],
)
def test_in_the_middle_what_was_computed_is_kept(
    changes: Mapping[str, Any], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert search(tmp_path, changes) == 3
    (line,) = [text for text in capsys.readouterr().err.splitlines() if text.startswith("autoprune: ")]
    assert said in line
    assert (tmp_path / "run" / "study.journal").stat().st_size > 0


def test_a_cost_that_is_no_number_later_names_itself_and_the_widths(monkeypatch: pytest.MonkeyPatch) -> None:
    structure = chain(3)
    cost, dense = build_cost(f"{HERE}:NowAndThen", structure), Policy.dense(structure).array(structure)
    assert float(cost(dense)) == 1.0
    monkeypatch.setattr(NowAndThen, "broken", True)
    with pytest.raises(PluginError, match=rf"^cost {HERE}:NowAndThen is nan at the widths \[{dense[0]}, "):
        cost(dense)


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound")
    assert search(folder, sampler("Sound")) == 0
    return folder


@pytest.mark.parametrize(
    ("schedule", "code", "said"),
    [
        ({"schedule": f"{HERE}:Untrained"}, 3, f"recovery {HERE}:Untrained fails while it trains: LookupError: no tea"),
        (
            {"schedule": f"{HERE}:StaysInTraining"},
            3,
            "ValueError: the model is in training mode after step 1; it must be a",
        ),
        ({"schedule": "one_shot", "options": {"rate": 1}}, 2, "recovery.options: unknown option 'rate'"),
    ],
)
def test_a_recovery_that_fails_names_itself(
    schedule: Mapping[str, Any],
    code: int,
    said: str,
    searched: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "job.yaml").write_text(json.dumps({**JOB, "recovery": schedule}))
    policy = str(searched / "run" / "policy.json")
    arguments = ["--task", str(tmp_path / "job.yaml"), "--at", "knee", "--out", str(tmp_path / "small")]
    assert run(["apply", policy, *arguments, "--finetune-epochs", "1"]) == code
    assert said in capsys.readouterr().err
    assert load_front(policy)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "NoSuffix",
            f"export format {HERE}:NoSuffix gives a NoSuffix without suffix; it must be a class without arguments",
        ),
        (
            "written",
            f"export format {HERE}:written is a function; it must be a class without arguments that has a suffix",
        ),
    ],
)
def test_an_export_that_is_none_is_told_before_the_model_is_cut(
    name: str, said: str, searched: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    policy, out = str(searched / "run" / "policy.json"), tmp_path / "small"
    arguments = ["--task", str(searched / "job.yaml"), "--at", "knee", "--out", str(out)]
    assert run(["apply", policy, *arguments, "--export", f"{HERE}:{name}"]) == 2
    assert said in capsys.readouterr().err
    assert not out.exists()
