"""Entries of a level database: made when asked for, kept as long as they fit, shared by the workers of a machine."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from autoprune.errors import RunError
from autoprune.files.whole import whole

Entry = Mapping[str, Tensor]
"""Tensors by name."""


class Entries:
    """At most `limit` bytes of entries, those that were used last; as many in `folder`, where there is one.

    What lies in the folder is memory-mapped, so that the processes that share it hold it once. A file that is gone
    stays readable for those that have it open; a folder that cannot be written to costs no more than the sharing.
    """

    def __init__(self, limit: int, folder: Path | None = None) -> None:
        self.limit, self.folder = limit, folder
        self._kept: OrderedDict[str, Entry] = OrderedDict()
        self._bytes = 0

    def get(self, name: str, make: Callable[[], Entry]) -> Entry:
        """The entry called `name` (a file name's stem), made where nobody has made it yet."""
        entry = self._kept.get(name)
        if entry is None:
            entry = self._found(name)
            if entry is None:
                entry = self._shared(name, make())
            self._kept[name] = entry
            self._bytes += _bytes(entry)
            while self._bytes > self.limit and len(self._kept) > 1:
                self._bytes -= _bytes(self._kept.popitem(last=False)[1])
        self._kept.move_to_end(name)
        return entry

    def _found(self, name: str) -> Entry | None:
        """The file of another process, or of this one before it let go of it; one that cannot be read is made anew."""
        if self.folder is None:
            return None
        path = self._path(name)
        try:
            entry = load_file(path)
            os.utime(path)  # what was used last is kept longest
        except (SafetensorError, OSError):
            return None
        return entry

    def _shared(self, name: str, entry: Entry) -> Entry:
        """The entry as the file that it becomes, others making room for it."""
        if self.folder is None or _bytes(entry) > self.limit:
            return entry
        with suppress(RunError):
            with whole(self._path(name)) as draft:
                save_file(dict(entry), draft)
            self._make_room()
        return self._found(name) or entry

    def _make_room(self) -> None:
        assert self.folder is not None
        files = []
        with suppress(OSError):
            for item in os.scandir(self.folder):
                with suppress(OSError):  # another process made room too
                    status = item.stat()
                    files.append((status.st_mtime_ns, status.st_size, Path(item)))
        total = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if total <= self.limit:
                break
            path.unlink(missing_ok=True)
            total -= size

    def _path(self, name: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{name}.safetensors"


def _bytes(entry: Entry) -> int:
    return sum(t.numel() * t.element_size() for t in entry.values())
