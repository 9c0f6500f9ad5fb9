"""The opening of a run: its folder taken, its job compared with what is there, everything made ready step by step."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path

from autoprune.files.job import Job
from autoprune.files.whole import write_whole
from autoprune.protocols import Step, Task
from autoprune.record.folder import new_folder
from autoprune.record.lock import locked
from autoprune.record.mirror import Mirror
from autoprune.record.storage import forget_study
from autoprune.run.before import seed_asks
from autoprune.run.folder_checks import MIRRORED, check_storage, forget, go_on_from, recorded_identity, same_job
from autoprune.run.prepare import check_executor, preparing
from autoprune.run.rehearsal import named, rehearse_recovery, rehearse_sampler, rehearse_strategy
from autoprune.run.setting import Setting


@dataclass(frozen=True)
class Opening:
    """What a run is opened with; `alone` is a setting that was made ready for several runs."""

    job: Job
    path: Path
    task: Task | None = None
    fresh: bool = False
    alone: Setting | None = None

    def steps(self) -> Generator[Step, None, tuple[Setting, Mirror | None]]:
        """Open it: the setting, and the mirror where there is one.

        Raises:
            InputError: the job is wrong, or the folder belongs to a job that differs (names the keys).
        """
        job, path, fresh = self.job, self.path, self.fresh
        with new_folder(path), locked(path):  # who uses it already is told now, and not after the preparation
            if not fresh:
                job = same_job(job, path)
            check_storage(job, path, fresh)
            mirror = None if self.alone is not None or job.sync_url is None else Mirror(path, job.sync_url, MIRRORED)
            if mirror is not None and not fresh:
                go_on_from(mirror, job)
            setting = (yield from self._prepared(job)) if self.alone is None else self.alone.with_table(None)
            _fail_early(setting)
            if fresh:  # not before the new job has proved good
                forget(path, setting.database_path, setting.samples_path)
                forget_study(path, job.storage_url)
                mirror.forget() if mirror is not None else None
            write_whole(path / "job.yaml", job.dump())
        return setting, mirror

    def _prepared(self, job: Job) -> Generator[Step, None, Setting]:
        check_executor(job)
        rehearse_recovery(job)
        recorded = {} if self.fresh else recorded_identity(job, self.path)
        return (yield from preparing(job, self.path, self.task, recorded=recorded, priced=True))


def _fail_early(s: Setting) -> None:
    """What would only be found wrong after minutes of work."""
    part = s.job.search
    rehearse_sampler(part.sampler, s.problem, s.job.options("search"), tabled=s.job.evaluator.has_table)
    for name in s.controls:
        with named("compare.controls", name):
            rehearse_strategy(name, s.problem)
    seed_asks(s.problem, s.controls, s.job.warm_start)
