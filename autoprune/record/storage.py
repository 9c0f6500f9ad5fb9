"""Where the study of a run lives: study.journal in the run folder, or a database that runs and machines share."""

from __future__ import annotations

import logging
import platform
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Protocol, TypeVar

import optuna
from optuna.storages import BaseStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock

from autoprune.errors import InputError
from autoprune.files.whole import whole_lines

T = TypeVar("T")
JOURNAL, STUDY_NAME = "study.journal", "autoprune"
PACKAGES = ("autoprune", "optuna", "numpy", "torch")


class Home(Protocol):
    """A place that holds the study; `read` and `write` do an action and put its failure into words."""

    shown: str
    study_name: str

    @property
    def storage(self) -> BaseStorage: ...
    def hold(self) -> None: ...
    def read(self, action: Callable[[], T]) -> T: ...
    def write(self, action: Callable[[], T]) -> T: ...
    def close(self) -> None: ...


def find_home(folder: Path, storage: str | None) -> Home:
    """The journal in `folder`, or the database at the URL `storage`, where the study is named after the folder.

    The folder's last name, and not its path: the same command on another machine then finds the study.

    Raises:
        InputError: the database cannot be used.
    """
    if storage is None:
        return _Journal(folder / JOURNAL)
    from autoprune.record.sql import Database

    with optuna_quiet():
        return Database(storage, f"{STUDY_NAME}/{folder.resolve().name}")


def open_study(home: Home, names: tuple[str, ...], identity: Mapping[str, str]) -> optuna.Study:
    """The study, held against other processes and made where there is none; all objectives are minimised.

    Raises:
        InputError: it is damaged or in use, or belongs to other objectives or to another identity.
    """
    with optuna_quiet():
        home.read(home.hold)
        return home.read(lambda: _opened(home, names, identity))


def load_study(home: Home) -> optuna.Study | None:
    """The study, to read it; None where there is none."""

    def load() -> optuna.Study | None:
        storage = home.storage  # a damaged journal is found here
        try:
            storage.get_study_id_from_name(home.study_name)
        except KeyError:
            return None
        return optuna.load_study(study_name=home.study_name, storage=storage)

    with optuna_quiet():
        return home.read(load)


def forget_study(folder: Path, storage: str | None) -> None:
    """Delete the run's study, and no other; InputError where another process uses it."""
    if storage is None:
        (folder / JOURNAL).unlink(missing_ok=True)
        return
    home = find_home(folder, storage)
    try:
        home.read(home.hold)
        if load_study(home) is not None:
            home.read(lambda: optuna.delete_study(study_name=home.study_name, storage=home.storage))
    finally:
        home.close()


@contextmanager
def optuna_quiet() -> Iterator[None]:
    """Optuna without its messages about new studies and its warnings about its own experimental parts."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(before)


def versions() -> dict[str, str]:
    """What a replay depends on, as it is installed now."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


class _Journal:
    """The journal file of a run folder; whoever writes to it holds the folder."""

    study_name = STUDY_NAME

    def __init__(self, path: Path) -> None:
        self.shown, self._path = str(path), path
        self._held = False
        self._storage: JournalStorage | None = None

    @property
    def storage(self) -> JournalStorage:
        if self._storage is None:  # not before `hold` has mended the file
            lock = _NoLock(self.shown) if self._held else None
            self._storage = JournalStorage(JournalFileBackend(self.shown, lock))
        return self._storage

    def hold(self) -> None:
        _mend(self._path)
        self._held = True

    def read(self, action: Callable[[], T]) -> T:
        try:
            return action()
        except (ValueError, KeyError, TypeError) as error:
            hint = "restore it, or start anew with --fresh"
            raise InputError(f"cannot read {self.shown}: it is damaged ({error}); {hint}") from error

    def write(self, action: Callable[[], T]) -> T:
        return action()

    def close(self) -> None:
        pass


class _NoLock(JournalFileSymlinkLock):
    """No second lock: the folder is ours, and Ctrl-C inside Optuna's lock ends in an error of its own."""

    def acquire(self) -> bool:
        return True

    def release(self) -> None:
        pass


def _mend(journal: Path) -> None:
    """After a kill: cut a torn last line, which makes Optuna refuse the whole journal, and drop Optuna's own lock."""
    for stale in journal.parent.glob(f"{journal.name}.lock*"):
        stale.unlink(missing_ok=True)
    if not journal.exists():
        return
    with journal.open("rb+") as file:
        file.truncate(len(whole_lines(file.read())))


def _opened(home: Home, names: tuple[str, ...], identity: Mapping[str, str]) -> optuna.Study:
    study = optuna.create_study(
        storage=home.storage, study_name=home.study_name, directions=["minimize"] * len(names), load_if_exists=True
    )
    held_names, attributes = study.metric_names, study.user_attrs
    if held_names is None:
        study.set_metric_names(list(names))
    elif tuple(held_names) != names:
        was, now = ", ".join(held_names), ", ".join(names)
        raise InputError(f"{home.shown} records {was}, this job has {now}; start anew with --fresh")
    if "versions" not in attributes:
        study.set_user_attr("versions", versions())
        study.set_user_attr("identity", dict(identity))
    held = attributes.get("identity", {})
    other = [name for name, value in identity.items() if held.get(name, value) != value]
    if other:
        raise InputError(
            f"{home.shown} records a search with other {' and '.join(other)}; choose another --out or start anew with "
            f"--fresh"
        )
    return study
