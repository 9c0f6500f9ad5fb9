"""Every script of ../shared/faults, one after the other: what it says of the code as it is now.

python -m benchmarks.faults [--only NAME ...] [--timeout S] [--again]

The scripts name modules as they were on 2026-11-29; a finder in the child process leads old names to where the parts
live now. Each outcome is kept in benchmarks/results/faults.json at once, so a run that is cut short goes on; `--again`
runs all anew. benchmarks/results/faults.md shows them beside what was seen before (from the README of the folder).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FAULTS = ROOT.parent / "shared" / "faults"
RESULTS = ROOT / "benchmarks" / "results"
KINDS = ("PASS", "FROZEN", "MSG", "FAIL")
NO_SCRIPTS = {"_lib", "common", "hangmod", "tmod"}
"""Parts that others import."""
MOVED = {
    "evaluate": ("evaluator.tiers", "evaluator.settings", "evaluator.prepared", "run.worker_evaluator"),
    "setting": ("run.setting", "run.prepare", "record.folder"),
    "calibration": ("database.batches",),
    "job": ("files.job",),
    "precision": ("evaluator.precision",),
    "reference": ("evaluator.dense_reference",),
    "budget": ("allocation.budget",),
    "bootstrap": ("estimates",),
}
FINDER = f"""
import importlib, importlib.abc, importlib.machinery, sys
MOVED = {MOVED!r}
class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        old = name.removeprefix("autoprune.")
        if name != old and old in MOVED and not path_has(path, old):
            return importlib.machinery.ModuleSpec(name, self)
    def create_module(self, spec):
        return None
    def exec_module(self, module):
        for new in reversed(MOVED[module.__name__.removeprefix("autoprune.")]):
            try:
                found = importlib.import_module("autoprune." + new)
            except ModuleNotFoundError:
                continue
            vars(module).update({{k: v for k, v in vars(found).items() if not k.startswith("__")}})
def path_has(path, old):
    from pathlib import Path
    return any((Path(p) / (old + ".py")).exists() for p in path or ())
sys.meta_path.insert(0, Finder())
"""


def scripts() -> Iterator[Path]:
    """The scripts in the order of their names."""
    for folder in ("review", "firsthour", "public"):
        for path in sorted((FAULTS / folder).iterdir()):
            if path.suffix in (".py", ".sh") and path.stem not in NO_SCRIPTS:
                yield path


def outcome(script: Path, timeout_s: float) -> dict[str, Any]:
    """Run one script in a folder of its own; its exit code, seconds, counts of its verdicts and last words."""
    with tempfile.TemporaryDirectory() as place:
        (Path(place) / "sitecustomize.py").write_text(FINDER, encoding="utf-8")
        env = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([place, str(script.parent), str(ROOT)]),
        }
        command = [sys.executable, str(script)] if script.suffix == ".py" else ["bash", str(script)]
        work = Path(place) / "work"
        work.mkdir()
        (work / "search_spaces").symlink_to(ROOT / "search_spaces")
        began = time.perf_counter()
        try:
            done = subprocess.run(
                command, cwd=work, env=env, capture_output=True, text=True, timeout=timeout_s, check=False
            )
            code, text, errors = done.returncode, done.stdout, done.stderr
        except subprocess.TimeoutExpired as late:
            code, text, errors = -1, _text(late.stdout), _text(late.stderr)
        seconds = time.perf_counter() - began
    counts = {kind: len(re.findall(rf"^{kind}\b", text, re.MULTILINE)) for kind in KINDS}
    lines = [line for line in (text + "\n" + errors).splitlines() if line.strip()]
    failed = [line for line in text.splitlines() if line.startswith(("FAIL", "MSG", "FROZEN"))]
    return {"rc": code, "seconds": round(seconds, 1), "counts": counts, "open": failed[:40], "last": lines[-4:]}


def _text(said: str | bytes | None) -> str:
    return said.decode(errors="replace") if isinstance(said, bytes) else said or ""


def table(found: Mapping[str, Mapping[str, Any]], before: Mapping[str, str]) -> str:
    """The Markdown page."""
    rows = [
        "# The scripts of ../shared/faults, before and after",
        "",
        "| script | before | after | s |",
        "|---|---|---|---|",
    ]
    for name, it in found.items():
        counts = ", ".join(f"{n} {kind}" for kind, n in it["counts"].items() if n)
        said = counts or (f"exit {it['rc']}: " if it["rc"] else "") + " / ".join(it["last"])[:300]
        ended = "no end within the limit; " if it["rc"] == -1 else ""
        rows.append(f"| {name} | {before.get(name, '')} | {ended}{_cell(said)} | {it['seconds']:.0f} |")
    return "\n".join(rows) + "\n"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace(str(ROOT.parent), "..")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--timeout", type=float, default=240.0)
    parser.add_argument("--again", action="store_true")
    args = parser.parse_args()
    if not FAULTS.exists():
        raise SystemExit(f"there is no {FAULTS}")
    file, notes = RESULTS / "faults.json", RESULTS / "faults-before.json"
    found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    for script in scripts():
        name = f"{script.parent.name}/{script.stem}"
        wanted = not args.only or any(word in name for word in args.only)
        if wanted and (args.again or args.only or name not in found):
            found[name] = outcome(script, args.timeout)
            print(name, found[name]["rc"], found[name]["counts"], found[name]["last"][-1:], flush=True)
            file.write_text(json.dumps(dict(sorted(found.items())), indent=1), encoding="utf-8")
    before = json.loads(notes.read_text(encoding="utf-8")) if notes.exists() else {}
    (RESULTS / "faults.md").write_text(table(dict(sorted(found.items())), before), encoding="utf-8")


if __name__ == "__main__":
    main()
