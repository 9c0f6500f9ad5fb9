"""What this machine has for us: cores and memory, within what a container or a scheduler allows."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

UNKNOWN = 8 << 30
"""Bytes that a machine is taken to have where the system does not say (Windows)."""
STATUS, MEMINFO, CPUINFO = Path("/proc/self/status"), Path("/proc/meminfo"), Path("/proc/cpuinfo")
CGROUPS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def usable_cores() -> int:
    """The cores that this process may use, or those of the machine where the system does not say (macOS, Windows)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    count: Callable[[], int | None] = getattr(os, "process_cpu_count", os.cpu_count)
    return count() or 1


def processor_flags() -> frozenset[str]:
    """What the processor can do, in the words of /proc/cpuinfo; none where the system does not say."""
    with suppress(OSError):
        for line in CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, words = line.partition(":")
            if name.strip() in ("flags", "Features"):
                return frozenset(words.split())
    return frozenset()


def machine_memory() -> int:
    """Bytes of memory that this machine has, or the container that this process runs in."""
    if not hasattr(os, "sysconf"):
        return UNKNOWN
    bytes_ = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for path in CGROUPS:
        with suppress(OSError, ValueError):  # no such file, or "max"
            bytes_ = min(bytes_, int(Path(path).read_text(encoding="ascii")))
    return bytes_


def free_memory() -> int:
    """Bytes that this process may hold in all: what is free now, in its container too, and what it holds already."""
    found = machine_memory()
    if available := _kilobytes(MEMINFO, "MemAvailable"):
        found = min(found, available + own_memory())
    return found


def own_memory() -> int:
    """Bytes that this process holds for itself alone; 0 where the system does not say."""
    return _kilobytes(STATUS, "RssAnon")


def size(bytes_: int) -> str:
    """Bytes as people read them."""
    return f"{bytes_ / 1e9:.1f} GB" if bytes_ >= 1e8 else f"{bytes_ / 1e6:.0f} MB"


def _kilobytes(path: Path, name: str) -> int:
    """The bytes that a file of the system gives as "NAME: 123 kB"."""
    with suppress(OSError, ValueError, IndexError):
        for line in path.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith(f"{name}:"):
                return 1024 * int(line.split()[1])
    return 0
