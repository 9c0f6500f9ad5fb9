"""What a job asks for and nothing will use: said, as it may be a slip."""

from __future__ import annotations

from autoprune.evaluator.settings import Settings
from autoprune.files.job import Job


def ignored(job: Job, settings: Settings) -> tuple[str, ...]:
    """A sentence for each section of `job` that the user wrote and the run passes over."""
    said = []
    given = job.latency.model_dump(exclude_defaults=True)
    if given and "latency" not in settings.costs:
        keys = ", ".join(f"latency.{key}" for key in given)
        said.append(f"{keys} is not used: latency is no cost of this search (objectives.costs)")
    budget = job.budget.plain()
    counted = {budget.cost, *budget.limits, *job.objectives.costs}
    if job.search_space().bits and not any(cost in ("bytes", "latency") or ":" in cost for cost in counted):
        said.append(
            "space.bits saves nothing here: no cost counts them; search for bytes or latency (objectives.costs)"
        )
    if job.space.counted and not any(cost in (*job.space.counted, "bytes") or ":" in cost for cost in counted):
        said.append(
            "space.granularity: zeros in weights save nothing here: no cost counts them; search for nonzeros, "
            "effective_macs or bytes (objectives.costs)"
        )
    part = job.evaluator
    if "finalists" in part.model_fields_set and part.finalists > part.tuned_finalists:
        said.append(f"evaluator.finalists: {part.finalists} is not used: evaluator.finetune_steps is 0")
    return tuple(said)
