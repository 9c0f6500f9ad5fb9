"""What the report reads beside policy.json: the trials of the study and the summary in the log."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autoprune.errors import AutopruneError, InputError, one_line


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


def read_trials(journal: Path, storage: str | None = None) -> tuple[Trial, ...]:
    """All trials of the run whose journal would be `journal`, or in the database `storage`; none without a journal."""
    if storage is None and not journal.exists():
        return ()
    from autoprune.record.storage import find_home, load_study

    home = find_home(journal.parent, storage)
    try:
        study = load_study(home)
        if study is None:
            raise InputError(f"cannot read {home.shown}: it holds no study {home.study_name}")
        trials = home.read(lambda: study.get_trials(deepcopy=False))
    except AutopruneError:
        raise
    except Exception as error:  # a damaged journal surfaces as whatever its parser met
        raise InputError(f"cannot read {home.shown}: {one_line(error)}") from error
    finally:
        home.close()
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
    for line in log.read_text(encoding="utf-8", errors="replace").splitlines():  # what is garbage is no event
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict) and event.get("event") == "summary":
            rows = tuple(event.get("rows", ()))
    return rows
