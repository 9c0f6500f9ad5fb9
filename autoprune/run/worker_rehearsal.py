"""An evaluator like a worker's, tried in this process: the peak rate of the brief fine-tune, the memory of a worker."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Generator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from autoprune.evaluation import Ask
from autoprune.evaluator.settings import Settings
from autoprune.evaluator.tiers import PROBED_SHARE, TieredEvaluator
from autoprune.files.job import Job
from autoprune.files.whole import write_whole
from autoprune.policy import Policy
from autoprune.protocols import Step
from autoprune.run.needs import measured


def rehearsed(
    job: Job, settings: Settings, identity: str, database: Path, make: Callable[[], TieredEvaluator], ahead_s: float
) -> Generator[Step, None, tuple[Settings, int | None]]:
    """The settings with the peak rate of the brief fine-tune, the same for all workers; what memory a worker takes.

    Both from their files, or found now by an evaluator like a worker's. `identity` are the data and the loss.
    """
    s, probed = settings, _tunes(job) and settings.learning_rate is None
    what = (identity, s.calibration, s.finetune_steps, s.seed, s.precision, PROBED_SHARE)
    key = hashlib.sha256(repr(what).encode()).hexdigest()[:8]
    rate_file, memory_file = (database.with_name(f"{database.stem}-{key}.{name}.json") for name in ("rate", "memory"))
    rate, worker = _held(rate_file, "learning_rate") if probed else s.learning_rate, _held(memory_file, "worker_bytes")
    if probed and rate is None:
        yield Step("peak rate", ahead_s=ahead_s)
        with measured() as most:
            rate = make().found_rate(s.finetune_steps)
        write_whole(rate_file, json.dumps({"learning_rate": rate}))
    elif worker is None and job.executor.kind == "local":
        yield Step("rehearsal of a worker", ahead_s=ahead_s)
        with measured() as most:
            evaluator = make()
            middle = {g.name: g.grid[len(g.grid) // 2] for g in evaluator.structure}
            evaluator(Ask(Policy.of(middle), "refit"))
            del evaluator
    else:
        most = []
    if most:
        worker = most[0]
        write_whole(memory_file, json.dumps({"worker_bytes": worker}))
    return replace(s, learning_rate=rate), None if worker is None else int(worker)


def _held(path: Path, name: str) -> float | None:
    """A number from a file of ours; None where there is none."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        return float(json.loads(path.read_text(encoding="utf-8"))[name])
    return None


def _tunes(job: Job) -> bool:
    part = job.evaluator
    return part.finetune_steps > 0 and (part.finalists > 0 or part.fitness in ("auto", "tune"))
