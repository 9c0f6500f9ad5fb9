"""The evaluator of a job from its files: what every worker calls once."""

from __future__ import annotations

from pathlib import Path

from autoprune.costs._latency_table import LatencyTable
from autoprune.database.store import LevelDatabase
from autoprune.evaluator.memory import bound_kernel_cache, keep_blocks
from autoprune.evaluator.prepared import prepared_model, shared_parts
from autoprune.evaluator.settings import Settings
from autoprune.evaluator.tiers import TieredEvaluator
from autoprune.files.job import Job
from autoprune.structure import Structure


def make_evaluator(
    job_text: str,
    settings: Settings,
    structure: Structure,
    database: Path,
    latency: LatencyTable | None = None,
    samples: Path | None = None,
) -> TieredEvaluator:
    """The evaluator of a job's task over a level database: what every worker calls once.

    `samples` is the folder in which the calibration samples lie, where they are many.
    """
    bound_kernel_cache(structure)
    keep_blocks()
    job, levels = Job.loads(job_text), LevelDatabase.open(database, settings.memory)
    task = job.build_task()
    model = prepared_model(task, settings.torch_device)
    parts = None if samples is None else shared_parts(task, settings, model, samples)
    return TieredEvaluator(task, structure, levels, settings, model, latency, parts)
