"""What a job's latency is measured on: the steps of its runtime, its table, and policies measured anew."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from pathlib import Path

import torch
from torch import nn

from autoprune.costs._latency_table import LatencyTable
from autoprune.costs.latency import Latency
from autoprune.errors import InputError
from autoprune.evaluator.prepared import prepared_model
from autoprune.files.job import Job
from autoprune.files.whole import write_whole
from autoprune.latency.runtime_here import check_threads, device_name, resolve
from autoprune.latency.whole_models import Clocked, fitting_latency, remeasuring, table_key
from autoprune.policy import Policy
from autoprune.protocols import Problem, Step, Task
from autoprune.run.setting import Setting
from autoprune.space import AUTO
from autoprune.structure import Structure

LATENCY = "latency"


def clocked_of(job: Job) -> Clocked:
    """How the job measures latency.

    Raises:
        InputError: it asks for more threads than this machine has cores.
    """
    part = job.latency
    check_threads(part.threads)
    return Clocked(part.runtime, part.batch_size, part.models, part.threads)


def runtime_step(job: Job, device: torch.device, recorded: Mapping[str, str] | None = None) -> int:
    """Channels that make a step of the runtime that the job searches for; 1 where latency is none of its costs.

    A record that is gone on with says it itself (`recorded`, its identity): one of an earlier version knew of none.
    """
    if recorded:
        return int(recorded.get("step", 1))
    multiples = (job.space.multiple_of, *(o.multiple_of for o in job.space.overrides.values()))
    if LATENCY not in (*job.objectives.costs, *job.budget.plain().limits) or AUTO not in multiples:
        return 1
    return resolve(job.latency.runtime, device, clocked_of(job).threads).step


def step_words(job: Job, step: int) -> str:
    """What a user ought to know of the grids; empty where the runtime has no part in them."""
    if step == 1:
        return ""
    runtime = "the runtime" if job.latency.runtime == AUTO else job.latency.runtime
    return (
        f"wide groups of channels have widths in multiples of {step}, in which {runtime} computes here "
        "(space.multiple_of: auto; 1 allows every width)"
    )


def latency_table(
    job: Job, structure: Structure, model: nn.Module, task: Task, folder: Path, resumed: bool
) -> Generator[Step, None, LatencyTable]:
    """The latency table of the job's runtime, from its file or measured now.

    The job's seed has no part in it: searches that differ by chance alone are compared by one clock. A run that is
    `resumed` goes on with the table that it began with, whatever version of the runtime is here now.
    """
    clocked, inputs = clocked_of(job), task.example_inputs()
    path = folder / f"latency-{table_key(model, inputs, structure, clocked)}.json"
    if path.exists():
        return LatencyTable.from_json(path.read_text(encoding="utf-8"))
    if resumed and (begun := _begun_with(folder, structure, model, clocked)) is not None:
        return begun
    table = yield from fitting_latency(model, inputs, structure, clocked, path.with_suffix(".parts"))
    write_whole(path, table.to_json())
    return table


def latencies(s: Setting, policies: list[Policy]) -> Generator[Step, None, dict[Policy, dict[str, float]]]:
    """The policies' latencies, measured anew as ratios to the dense model (a search predicts them), where asked.

    Beside each stand the parts that the table gives it.
    """
    if s.latency is None:
        return {}
    model, inputs, table = prepared_model(s.task, s.settings.torch_device), s.task.example_inputs(), s.latency
    clocked = Clocked(table.runtime, table.batch_size, threads=table.threads)
    timings = yield from remeasuring(model, inputs, s.structure, policies, clocked, s.job.search.seed)
    parts = {policy: time_parts(s.problem, policy) or {} for policy in timings}
    return {policy: {"ratio": t.ratio, "iqr": t.iqr, **parts[policy]} for policy, t in timings.items()}


def time_parts(problem: Problem, policy: Policy | None = None) -> dict[str, float] | None:
    """What the latency table says that the time of a policy, or of the dense model, is made of; None without one."""
    cost = problem.costs.get(LATENCY)
    if not isinstance(cost, Latency):
        return None
    policy = policy or Policy.dense(problem.structure)
    return {name: float(f"{part:.4g}") for name, part in cost.parts(policy.array(problem.structure)).items()}


def _begun_with(folder: Path, structure: Structure, model: nn.Module, clocked: Clocked) -> LatencyTable | None:
    """The table of `folder` that was measured here in the same way; None where there is none, or more than one."""
    here = resolve(clocked.runtime, next((p.device for p in model.parameters()), torch.device("cpu")), clocked.threads)
    asked = (structure.fingerprint, device_name(here.device), clocked.batch_size, clocked.threads)
    found = []
    for path in sorted(folder.glob("latency-*.json")):
        try:
            table = LatencyTable.from_json(path.read_text(encoding="utf-8"))
        except InputError:  # of another version
            continue
        own = (table.structure, table.device, table.batch_size, table.threads)
        if own == asked and table.runtime in (here.name, "eager" if clocked.runtime == AUTO else here.name):
            found.append(table)
    return found[0] if len(found) == 1 else None
