"""Entries of a level database: made when asked for, kept as long as they fit, shared by the workers of a machine."""

from __future__ import annotations

import os
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from autoprune.errors import RunError
from autoprune.files.held import SharedFolder, claim
from autoprune.files.whole import whole

Entry = Mapping[str, Tensor]
"""Tensors by name."""
Make = Callable[[], Entry]
SUFFIX = ".safetensors"
PATIENCE_S, POLL_S = 1.0, 0.005
"""How long another process may take for an entry where none was made here, and how often its file is looked for."""


class Entries:
    """At most `limit` bytes of entries, those that were used last; in a `folder`, of all processes that share it.

    What lies there is memory-mapped, so that they hold it once. One of them makes an entry, and holds a claim beside it
    that ends with the process at the latest. A file that is gone stays readable for those that have it open; a folder
    that cannot be written to costs no more than the sharing.
    """

    def __init__(self, limit: int, folder: Path | SharedFolder | None = None) -> None:
        self.limit, self._held = limit, folder
        self.folder = folder.path if isinstance(folder, SharedFolder) else folder
        self._kept: OrderedDict[str, Entry] = OrderedDict()
        self._patience_s = PATIENCE_S

    def get(self, makers: Mapping[str, Make]) -> dict[str, Entry]:
        """The entries of these names (a file's stem), which are made where nobody has made them yet.

        Those that another process is making come last: then it is waited for, but no longer than it takes to make one.
        """
        found, since = self._at_once(makers), time.monotonic()
        while rest := {name: make for name, make in makers.items() if name not in found}:
            if time.monotonic() - since > self._patience_s:
                found |= {name: self._shared(name, make()) for name, make in rest.items()}
            else:
                time.sleep(POLL_S)
                found |= self._at_once(rest)
        self._keep(found)
        return found

    def _at_once(self, makers: Mapping[str, Make]) -> dict[str, Entry]:
        """The entries but for those that another process is making."""
        found = {}
        for name, make in makers.items():
            entry = self._kept.get(name)
            entry = self._read(name) if entry is None else entry
            entry = self._made(name, make) if entry is None else entry
            if entry is not None:
                found[name] = entry
        return found

    def _made(self, name: str, make: Make) -> Entry | None:
        """A new entry; None where another process is making it."""
        with ExitStack() as stack:
            if self.folder is not None:
                try:
                    self.folder.mkdir(parents=True, exist_ok=True)
                    ours = stack.enter_context(claim(self.folder / f"{name}.claim"))
                except OSError:
                    self.folder, ours = None, True
                if not ours:
                    return None
                if (entry := self._read(name)) is not None:  # it has come meanwhile
                    return entry
            since = time.monotonic()
            entry = make()
            self._patience_s = max(self._patience_s, time.monotonic() - since)
            return self._shared(name, entry)

    def _read(self, name: str) -> Entry | None:
        """The file of another process, or of this one before it let go of it; one that cannot be read is made anew."""
        if self.folder is None:
            return None
        with suppress(SafetensorError, OSError):
            return load_file(self._path(name))
        return None

    def _shared(self, name: str, entry: Entry) -> Entry:
        """The entry as the file that it becomes."""
        if self.folder is None or _bytes(entry) > self.limit:
            return entry
        try:
            with whole(self._path(name)) as draft:
                save_file(dict(entry), draft)
        except RunError:
            self.folder = None
            return entry
        self._make_room()
        return self._read(name) or entry

    def _keep(self, entries: Mapping[str, Entry]) -> None:
        """Remember what was used last; forget what does not fit, or others have removed."""
        new = entries.keys() - self._kept.keys()
        for name, entry in entries.items():
            self._kept[name] = entry
            self._kept.move_to_end(name)
            if self.folder is not None:
                with suppress(OSError):
                    os.utime(self._path(name))
        if not new:
            return
        if self.folder is not None:
            for name in self._kept.keys() - {path.stem for _, _, path in self._files()}:
                del self._kept[name]
        total = sum(map(_bytes, self._kept.values()))
        while total > self.limit and len(self._kept) > 1:
            total -= _bytes(self._kept.popitem(last=False)[1])

    def _make_room(self) -> None:
        files = self._files()
        total = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if total <= self.limit:
                break
            with suppress(OSError):  # Windows removes nothing that is open
                path.unlink(missing_ok=True)
                total -= size

    def _files(self) -> list[tuple[int, int, Path]]:
        """When each entry of the folder was used last (ns), its bytes and its file."""
        assert self.folder is not None
        files = []
        with suppress(OSError):
            for item in os.scandir(self.folder):
                if item.name.endswith(SUFFIX):
                    with suppress(OSError):  # another process made room too
                        status = item.stat()
                        files.append((status.st_mtime_ns, status.st_size, Path(item)))
        return files

    def _path(self, name: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{name}{SUFFIX}"


def _bytes(entry: Entry) -> int:
    return sum(t.numel() * t.element_size() for t in entry.values())
