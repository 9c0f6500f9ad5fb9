"""Files that are written whole or not at all: a reader, or a run after a kill, sees the old one or the new one."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from autoprune.errors import InputError, RunError


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A draft beside `path`, in a folder that is made where there is none; it takes the place of `path` at the end.

    Files get the mode that the user's umask gives new ones. What fails leaves no draft.

    Raises:
        RunError: the disk is full, or the folder cannot be written to.
    """
    with saying(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f"{path.name}.{os.getpid()}.part")
        try:
            yield draft
            draft.chmod(0o666 & ~_umask())
            os.replace(draft, path)
        finally:
            draft.unlink(missing_ok=True)


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A draft folder beside `folder` that takes its place, with all that was in it, at the end; else nothing changes.

    Raises:
        InputError: there is no writing beside the folder.
        RunError: the disk is full.
    """
    target = folder.resolve()  # a link stays one
    draft, before = (target.with_name(f".{target.name}.{os.getpid()}.{end}") for end in ("part", "old"))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        draft.mkdir()
    except OSError as error:
        raise InputError(f"cannot write to --out {folder}: {error.strerror}") from None
    try:
        with saying(folder):
            yield draft
            for path in (draft, *draft.rglob("*")):
                path.chmod((0o777 if path.is_dir() else 0o666) & ~_umask())
            _swap(draft, target, before)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _swap(draft: Path, target: Path, before: Path) -> None:
    """Put `draft` where `target` is; the old folder goes when the new one stands."""
    if not target.exists():
        os.rename(draft, target)
        return
    os.rename(target, before)
    try:
        os.rename(draft, target)
    except BaseException:
        os.rename(before, target)
        raise
    shutil.rmtree(before, ignore_errors=True)


@contextmanager
def saying(path: Path) -> Iterator[None]:
    """What the system says about a file in one line: writers raise in many ways, safetensors and torch in their own."""
    try:
        yield
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror or error}") from error
    except Exception as error:
        if found := re.search(r"[^:]*\(os error \d+\)|file write failed|failed writing file", str(error)):
            raise RunError(f"cannot write {path}: {found[0].strip()}") from error
        raise


def _umask() -> int:
    """The user's umask, which can only be read by setting it; the strictest one stands for that moment."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def write_whole(path: Path, text: str) -> None:
    """Write a text file whole, on the disk before it takes its name."""
    with whole(path) as draft, draft.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def read_mapping(path: Path) -> dict[str, Any]:
    """The JSON mapping in a file.

    Raises:
        InputError: it cannot be read, or holds something else.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is damaged: {error}") from error
    if not isinstance(found, dict):
        raise InputError(f"{path} is damaged: it holds no mapping")
    return found


def whole_lines(content: bytes) -> bytes:
    """A file of JSON lines that is being written, or was when the machine stopped, up to its last good line."""
    end = content.rfind(b"\n") + 1
    start = content.rfind(b"\n", 0, max(end - 1, 0)) + 1
    try:
        json.loads(content[start:end] or b"{}")
    except ValueError:
        end = start
    return content[:end]
