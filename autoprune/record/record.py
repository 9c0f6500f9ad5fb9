"""The record of a run: an Optuna study; every finished evaluation is on disk at once, and read back on resume."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TypeVar, get_args

import optuna
from optuna.distributions import BaseDistribution, IntDistribution
from optuna.trial import TrialState

from autoprune.errors import RunError
from autoprune.evaluation import Ask, Evaluation, Tier
from autoprune.policy import Policy
from autoprune.record.lock import lock
from autoprune.record.storage import Home, find_home, open_study
from autoprune.structure import Structure

Stage = Literal["table", "proxy", "seed", "search", "final"]


T = TypeVar("T")


class Record:
    """The study of a run folder, held under a lock: every finished evaluation, on disk at once, and read back.

    It lives in the folder's journal, or in the database at the URL `storage` (see `autoprune.record.storage`).
    `identity` names what the evaluations depend on beside the job (structure, weights, data), each by a hash.
    `evaluations` maps (stage, index of the ask) to its evaluation, `labels` likewise; `known` maps each Ask to its
    first evaluation. `tier` is the fitness tier: full evaluations at it and above are COMPLETE trials, others PRUNED.
    `clock` counts the seconds that the folder has been searched in, over all sessions.

    Raises:
        InputError: another process uses the folder or the study, which is damaged or cannot be reached, or belongs to
            other objectives or to another identity.
    """

    def __init__(
        self,
        folder: Path,
        structure: Structure,
        objectives: Sequence[str],
        tier: Tier = "refit",
        identity: Mapping[str, str] | None = None,
        storage: str | None = None,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder
        self.evaluations: dict[tuple[Stage, int], Evaluation] = {}
        self.labels: dict[tuple[Stage, int], str] = {}
        self.known: dict[Ask, Evaluation] = {}
        self._objectives = tuple(objectives)
        self.tier: Tier = tier
        self._opened, self._before = time.monotonic(), 0.0
        self._distributions: dict[str, BaseDistribution] = {
            g.name: IntDistribution(g.grid[0], g.width) for g in structure.groups
        }
        self._home: Home | None = None
        self._lock = lock(folder)
        try:
            self._home = home = find_home(folder, storage)
            self.study = open_study(home, ("loss", *objectives), identity or {})
            self.versions: Mapping[str, str] = home.read(lambda: self.study.user_attrs["versions"])
            for trial in home.read(lambda: self.study.get_trials(deepcopy=False)):
                self._remember(*_from_trial(trial))
                self._before = max(self._before, trial.user_attrs.get("clock", 0.0))
        except BaseException:
            self.close()
            raise

    def add(self, index: int, evaluation: Evaluation, stage: Stage, label: str = "") -> None:
        """Record the answer to ask `index` of `stage`; when this returns it is on disk."""
        if (stage, index) in self.evaluations:
            raise RunError(f"ask {index} of stage {stage!r} is already recorded")
        ask, state = evaluation.ask, self._state(evaluation)
        attributes = {
            **{"ask": index, "stage": stage, "label": label, "tier": ask.tier, "fraction": ask.fraction},
            **{"split": ask.split, "passes": evaluation.passes, "seconds": evaluation.seconds},
            **{"costs": dict(evaluation.costs), "metrics": dict(evaluation.metrics), "clock": round(self.clock(), 3)},
            **({"loss": evaluation.loss} if evaluation.ok else {"error": evaluation.error}),
            **({"sample_losses": list(evaluation.sample_losses)} if evaluation.sample_losses else {}),
            **({"masks": dict(evaluation.masks)} if evaluation.masks else {}),
        }
        full = state == TrialState.COMPLETE
        trial = optuna.trial.create_trial(
            state=state,
            values=[evaluation.loss, *(evaluation.costs[c] for c in self._objectives)] if full else None,
            params=ask.policy.as_dict(),
            distributions=self._distributions,
            user_attrs=attributes,
        )
        self._written(lambda: self.study.add_trial(trial))
        self._remember(stage, index, label, evaluation)

    def clock(self) -> float:
        """Seconds that this folder's run has been open, earlier sessions up to their last evaluation included."""
        return self._before + time.monotonic() - self._opened

    def horizon(self, n_trials: int) -> int:
        """The ledger that the run was started with: a sampler's schedule keeps to it when the ledger grows."""
        held = self.fact("horizon")
        if held is None:
            self.note("horizon", n_trials)
        return n_trials if held is None else int(held)

    def fact(self, name: str) -> Any:
        """What was noted under `name` beside the trials; None where nothing was."""
        return self._written(lambda: self.study.user_attrs.get(name))

    def note(self, name: str, value: object) -> None:
        """Write a fact beside the trials, in plain JSON values."""
        if self.fact(name) != value:
            self._written(lambda: self.study.set_user_attr(name, value))

    def close(self) -> None:
        """Release the study and the folder."""
        self._home.close() if self._home is not None else None
        os.close(self._lock) if self._lock >= 0 else None
        self._lock = -1

    def __enter__(self) -> Record:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _written(self, action: Callable[[], T]) -> T:
        assert self._home is not None
        return self._home.write(action)

    def _state(self, evaluation: Evaluation) -> TrialState:
        if not evaluation.ok:
            return TrialState.FAIL
        order, ask = get_args(Tier).index, evaluation.ask
        full = ask.fraction == 1.0 and order(ask.tier) >= order(self.tier)
        return TrialState.COMPLETE if full else TrialState.PRUNED

    def _remember(self, stage: Stage, index: int, label: str, evaluation: Evaluation) -> None:
        self.evaluations[stage, index] = evaluation
        self.labels[stage, index] = label
        self.known.setdefault(evaluation.ask, evaluation)


def _from_trial(trial: optuna.trial.FrozenTrial) -> tuple[Stage, int, str, Evaluation]:
    a: Mapping[str, Any] = trial.user_attrs
    ask = Ask(Policy.of(trial.params), a["tier"], a["fraction"], a["split"])
    loss = a.get("loss", float("inf"))
    more = tuple(a.get("sample_losses", ())), a.get("masks", {})
    evaluation = Evaluation(ask, loss, a["costs"], a["metrics"], a["passes"], a["seconds"], a.get("error"), *more)
    return a["stage"], a["ask"], a["label"], evaluation
