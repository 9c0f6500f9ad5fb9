"""What the report reads beside policy.json: the trials of the study and the summary in the log."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autoprune.errors import InputError


@dataclass(frozen=True)
class Trial:
    """One recorded evaluation; `loss` is None where it failed."""

    index: int
    stage: str
    label: str
    split: str
    full: bool
    loss: float | None
    costs: Mapping[str, float]
    passes: float
    error: str | None


def read_trials(journal: Path) -> tuple[Trial, ...]:
    """All trials of the study in `journal`; none where there is no file."""
    if not journal.exists():
        return ()
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    from autoprune.study import optuna_quiet

    try:
        with optuna_quiet():
            study = optuna.load_study(study_name=None, storage=JournalStorage(JournalFileBackend(str(journal))))
        trials = study.get_trials(deepcopy=False)
    except Exception as error:  # a damaged journal surfaces as whatever its parser met
        raise InputError(f"cannot read {journal}: {type(error).__name__}: {error}") from error
    return tuple(_trial(trial.user_attrs) for trial in trials)


def _trial(attributes: Mapping[str, Any]) -> Trial:
    a = attributes
    return Trial(
        index=int(a.get("ask", -1)),
        stage=str(a.get("stage", "")),
        label=str(a.get("label", "")),
        split=str(a.get("split", "fitness")),
        full=float(a.get("fraction", 1.0)) >= 1.0,
        loss=a.get("loss"),
        costs=a.get("costs", {}),
        passes=float(a.get("passes", 0.0)),
        error=a.get("error"),
    )


def read_summary(log: Path) -> tuple[Mapping[str, Any], ...]:
    """Rows of the last "summary" event of log.jsonl; none where there is none. A torn last line is skipped."""
    rows: tuple[Mapping[str, Any], ...] = ()
    if not log.exists():
        return rows
    for line in log.read_text(encoding="utf-8").splitlines():
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict) and event.get("event") == "summary":
            rows = tuple(event.get("rows", ()))
    return rows
