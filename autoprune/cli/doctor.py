"""`autoprune doctor`: what this machine and this installation offer to autoprune."""

from __future__ import annotations

import os
import platform
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from autoprune.cli.options import JsonFlag
from autoprune.cli.tables import NARROW, console, shown
from autoprune.errors import one_line
from autoprune.version import __version__

PACKAGES = ("torch", "optuna", "ray", "gymnasium", "stable-baselines3")
FLAGS = {
    "AVX": ("avx",),
    "AVX2": ("avx2",),
    "AVX512": ("avx512f",),
    "VNNI": ("avx512_vnni", "avx_vnni"),
    "AVX512-BF16": ("avx512_bf16",),
    "AMX": ("amx_tile",),
    "AMX-BF16": ("amx_bf16",),
    "AMX-INT8": ("amx_int8",),
}
"""What speeds pruned and quantized models up, and by which words of /proc/cpuinfo it is known."""


def doctor(json_: JsonFlag = False) -> dict[str, Any] | None:
    """Show versions, cores, memory, what speeds products up, Ray, extras, and what `auto` comes to on this machine."""
    facts = checked()
    return facts if json_ else shown(print_doctor, facts)


def checked() -> dict[str, Any]:
    """The facts; what cannot be found out has the reason in its place, and nothing is started or waited for."""
    from autoprune.cli.extras import extras, version_of

    versions = {"autoprune": __version__, "python": platform.python_version()}
    return {
        "versions": {**versions, **{name: version_of(name) for name in PACKAGES}},
        **_machine(),
        "ray_cluster": _ray_cluster(),
        "auto": {"workers": _workers(), **_torch(_precision, "precision")},
        "extras": extras(),
    }


def print_doctor(facts: Mapping[str, Any]) -> None:
    """The facts in words, a line each, and how to add the extras that are lacking."""
    out = console()
    width = None if out.is_terminal else NARROW
    table = Table.grid(padding=(0, 2, 0, 0))
    for name, words in _lines(facts):
        table.add_row(name, Text(words))
    out.print(table, width=width)
    rows = Table.grid(padding=(0, 2, 0, 0))
    for extra in facts["extras"]:
        words = "installed" if extra["installed"] else f"lacks {', '.join(extra['lacking'])}; {extra['add']}"
        rows.add_row(extra["name"], Text(words))
    out.print("\nextras" if facts["extras"] else "\nextras: nothing here says which there are")
    out.print(rows, width=width)


def _lines(facts: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    from autoprune.files.machine import size

    yield "versions", ", ".join(f"{name} {version or 'not installed'}" for name, version in facts["versions"].items())
    yield "cores", f"{facts['cores']} that this process may use"
    flags = facts["flags"]
    there = ", ".join(name for name, is_there in (flags or {}).items() if is_there)
    yield "processor", "this system does not say" if flags is None else there or f"none of {', '.join(FLAGS)}"
    memory = facts["memory"]
    yield "memory", f"{size(memory['bytes'])}, of which {size(memory['free'])} are free"
    gpus = [f"{gpu['name']} with {size(gpu['bytes'])}" for gpu in facts["gpus"] or ()]
    yield "GPU", facts.get("gpus_error") or ", ".join(gpus) or "none"
    ray = facts["ray_cluster"]
    yield "Ray cluster", f"{ray['address']} (from {ray['from']}; not asked whether it answers)" if ray else "none known"
    auto = facts["auto"]
    yield "workers: auto", f"{auto['workers']}, or as many as a job's model leaves memory for"
    found = auto["precision"]
    on = f" on {found['device']}" if found else ""
    small = f"; {found['small_models']} below {found['small_macs'] / 1e6:g} million MACs" if found else ""
    yield "precision: auto", auto.get("precision_error") or f"{found['models']}{on}{small}"


def _machine() -> dict[str, Any]:
    from autoprune.files.machine import free_memory, machine_memory, processor_flags, usable_cores

    words = processor_flags()
    return {
        "cores": usable_cores(),
        "flags": {name: any(word in words for word in known) for name, known in FLAGS.items()} if words else None,
        "memory": {"bytes": machine_memory(), "free": free_memory()},
        **_torch(_gpus, "gpus"),
    }


def _torch(ask: Callable[[], Any], name: str) -> dict[str, Any]:
    """What torch answers; where it is broken, why."""
    try:
        return {name: ask()}
    except Exception as error:  # a library that does not load, a driver that does not answer: a doctor says so
        return {name: None, f"{name}_error": one_line(error)}


def _gpus() -> list[dict[str, Any]]:
    import torch

    if not torch.cuda.is_available():
        return []
    found = (torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count()))
    return [{"name": gpu.name, "bytes": gpu.total_memory} for gpu in found]


def _precision() -> dict[str, Any]:
    """What `evaluator.precision: auto` comes to for models beyond the small ones, and for these."""
    from autoprune.evaluator.precision import SMALL_MACS, choose_precision
    from autoprune.evaluator.settings import Settings

    device = Settings().find_device()
    return {
        "device": str(device),
        "models": choose_precision("auto", device, SMALL_MACS),
        "small_models": choose_precision("auto", device, 0.0),
        "small_macs": SMALL_MACS,
    }


def _workers() -> int:
    """What `executor.workers: auto` starts at most; of a large model as many as have memory too."""
    from autoprune.files.job_parts import ExecutorPart

    return ExecutorPart().n_workers


def _ray_cluster() -> dict[str, str] | None:
    """The address that `--ray auto` would try, and who says so; nobody is asked whether it still lives."""
    if address := os.environ.get("RAY_ADDRESS"):
        return {"address": address, "from": "RAY_ADDRESS"}
    common = {"linux": os.environ.get("TMPDIR") or "/tmp", "darwin": "/tmp"}
    folder = os.environ.get("RAY_TMPDIR") or common.get(sys.platform) or tempfile.gettempdir()
    word = Path(folder) / "ray" / "ray_current_cluster"  # where `ray start` leaves it
    try:
        address = word.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return None
    return {"address": address, "from": str(word)} if address else None
