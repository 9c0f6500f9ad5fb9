"""The folder of a run before anything is computed: whose it is, whether its study answers, what `fresh` drops."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from autoprune.errors import InputError
from autoprune.files.job import Job, changed_keys, changed_since
from autoprune.record.mirror import Mirror
from autoprune.record.storage import JOURNAL, find_home, load_study

RUN_FILES = ("job.yaml", "policy.json", "front.csv", "report.html", "log.jsonl", "proxy.json", "finetune.json")
MIRRORED = (*RUN_FILES, JOURNAL)
RUN_FOLDERS = ("tune", "finetuned", "price")


def same_job(job: Job, folder: Path) -> Job:
    """The job as the run in `folder` goes on with it.

    What may change between calls: trials upwards, the executor.

    Raises:
        InputError: something else differs (names the keys).
    """
    if not (folder / "job.yaml").exists():
        return job
    before = Job.load(folder / "job.yaml")
    job = job.continuing(before)
    _refuse(changed_keys(before, job), str(folder))
    return job


def check_storage(job: Job, folder: Path, fresh: bool) -> None:
    """That the database answers, before minutes of work, and that a run begun on another machine had the same job."""
    if job.storage is None:
        return
    home = find_home(folder, job.storage_url)
    try:
        study = None if fresh else load_study(home)
        held = None if study is None else home.read(lambda: study.user_attrs.get("job"))
    finally:
        home.close()
    refuse_other(job, held, f"the study {home.study_name} in {home.shown}")


def recorded_identity(job: Job, folder: Path) -> Mapping[str, str]:
    """What the run's record says its evaluations depend on; nothing where there is no record yet."""
    if job.storage is None and not (folder / JOURNAL).exists():
        return {}
    home = find_home(folder, job.storage_url)
    try:
        study = load_study(home)
        return {} if study is None else home.read(lambda: dict(study.user_attrs.get("identity", {})))
    finally:
        home.close()


def refuse_other(job: Job, held: Mapping[str, Any] | None, where: str) -> None:
    """InputError that names the keys where a record of the job `held` is another job's."""
    _refuse(() if held is None else changed_since(held, job), where)


def _refuse(keys: tuple[str, ...], where: str) -> None:
    if keys:
        raise InputError(
            f"{where} holds a run of another job: {', '.join(keys)} differ; trials may grow and executor.* may "
            f"change, for anything else choose another --out or start anew with --fresh"
        )


def go_on_from(mirror: Mirror, job: Job) -> None:
    """Bring the run here where the mirror is ahead, unless it is another job's; the folder is held."""
    before = mirror.job()
    if before is not None:
        _refuse(changed_keys(Job.loads(before, source=f"{mirror.url}/job.yaml"), job), mirror.url)
    mirror.fetch()


def forget(folder: Path, database: Path, samples: Path | None = None) -> None:
    """Remove the files of an earlier run, and nothing else; those of `database` and `samples` are the new one's."""
    for name in RUN_FILES:
        (folder / name).unlink(missing_ok=True)
    for name in RUN_FOLDERS:
        shutil.rmtree(folder / name, ignore_errors=True)
    for path in (folder.resolve() / "database").glob("*"):  # `database` is absolute too
        if path.stem != database.stem and path != samples and path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        elif path != database and path.suffix == ".safetensors":
            path.unlink()
