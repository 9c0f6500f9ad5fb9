"""Every script of ../shared/faults, one after the other: what it says of the code as it is now.

python -m benchmarks.faults [--only NAME ...] [--timeout S] [--again] [--table]

The scripts name modules as they were on 2026-11-29; `old_homes` leads them to where the parts live now. Each runs in a
copy of its folder, in a process of its own, nicely, within a time and a memory limit. Each outcome is kept in
results/faults.json at once, so a run that is cut short goes on; `--only` runs those whose names hold a word,
`--again` also what has run, `--table` nothing. results/faults.md shows them beside what was seen before
(faults-before.json) and what
there is to say (faults-notes.json). Scripts that need transformers run where it can be imported (PYTHONPATH).
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
FAULTS = Path(os.environ.get("AUTOPRUNE_FAULTS", ROOT.parent / "shared" / "faults"))
RESULTS = ROOT / "benchmarks" / "results"
KINDS = ("PASS", "FROZEN", "MSG", "FAIL")
NO_SCRIPTS = {"_lib", "common", "hangmod", "tmod", "memory_wide_layer_opts"}
"""Parts that others import, and one that only repeats another with other options."""
MEMORY = 12 << 30
"""Bytes of address space that one script may take."""
UNLIMITED = ("firsthour/relative_out",)
"""Ray reserves far more than it uses."""
MODELS = ("bert", "llama", "gpt2", "vit", "resnet", "distilbert", "t5")
ARGUMENTS: Mapping[str, tuple[str, ...]] = {
    "firsthour/hang_parts": ("ln", "ln-rotary", "rms", "gqa", "all"),
    "firsthour/llama_hang": ("1 4", "2 16"),
    "firsthour/hf_llama_bisect": ("2 A eager", "2 B eager", "4 A sdpa", "2 C eager"),
    "firsthour/hf": tuple(f"{name} {mode}" for name in MODELS for mode in ("raw", "wrap")),
    "firsthour/hf_nocache": ("llama wrap", "gpt2 wrap"),
    "firsthour/memory_wide_layer": ("256", "512", "1024"),
    "firsthour/database_time_conv3x3": ("128", "256", "512"),
}
"""The arguments that a script is run with, one run each."""
EDITS: Mapping[str, tuple[tuple[str, str], ...]] = {
    "review/b13_halve": (("import sys; ; import", "import sys; import"),),
    "review/b16": (
        (
            'x=l.samples[0]; print("an epoch of",100*32,"samples: the lesson holds",size(l.samples),"samples,",'
            'x.numel()*4/1e6,"MB")',
            "print('an epoch of', 100*32, 'samples, 39 MB:', type(l.material).__name__); import autoprune.evaluator."
            "material as M; M.MOST = 1; ev._lesson = None; print('more than may lie in memory:', "
            "type(ev.lesson(25).material).__name__)",
        ),
    ),
    "review/b1b_search": (('r["finetuned"]["loss"]', 'r["finetuned"]'),),
    "review/b6_threads": (
        ("for k in d1.entries)", "for k in d1)"),
        ("d1=db()", "d1=tensors(db())"),
        ("d2=db()", "d2=tensors(db())"),
        ("(d1.entries[k],d2.entries[k])", "(d1[k],d2[k])"),
        ('for k in d1.entries if k.startswith("keep")', 'for k in d1 if k.endswith("order")'),
        ("TieredEvaluator(task,st,d1,s)", "TieredEvaluator(task,st,db(),s)"),
        (
            "torch.set_num_threads(1); d1",
            "tensors=lambda d: {f'{g} {k}': t for g, v in d.levels.items() for k, t in v.plain()[0].items()}\n"
            "torch.set_num_threads(1); d1",
        ),
    ),
    "review/b7_exec": (('p.metrics["validation"]["loss"]', 'p.losses["validation"]["loss"]'),),
    "firsthour/metric_name_collision": (("python regression_mse.py", "# python regression_mse.py"),),
    "firsthour/segmentation_kl_axis": (
        (
            "from autoprune.losses import kl",
            "from functools import partial; from autoprune.losses.kl import kl; kl = partial(kl, classes=1)",
        ),
    ),
    "firsthour/stale_export": (
        (
            "cd PROJECT && . .venv/bin/activate",
            "autoprune search search_spaces/digits.yaml --trials 40 --out runs/k9 > /dev/null",
        ),
    ),
}
"""What does not run as it stands, and what stands there instead."""
EVERYWHERE = (("autoprune.database.store import build_database", "autoprune.database.build import build_database"),)
SEC = (
    "cd sec && (autoprune apply policy.json --task job.yaml --at p00 --out small; echo exit $?;"
    " test -e OWNED && echo FAIL imported || echo PASS nothing imported)"
)


class Case(NamedTuple):
    """One run of a script: its name with its arguments, its file, and the command in a copy of its folder."""

    name: str
    file: Path
    command: str

    @property
    def toys(self) -> bool:
        """Whether it needs the toys in the package: a job that names them."""
        return self.file.suffix == ".yaml"

    @property
    def needs(self) -> str:
        """A package that it cannot run without and that is not here."""
        text = self.file.read_text(encoding="utf-8")
        wanted = re.search(r"^import .*\btransformers\b", text, re.MULTILINE) or "hf.py" in text
        return "transformers" if wanted and importlib.util.find_spec("transformers") is None else ""


def cases() -> Iterator[Case]:
    """In the order of their names; toys are copied into the package where a job names them."""
    for folder in ("review", "firsthour", "public"):
        for path in sorted((FAULTS / folder).iterdir()):
            name = f"{folder}/{path.stem}"
            if path.suffix in (".py", ".txt") and path.stem not in NO_SCRIPTS:
                for arguments in ARGUMENTS.get(name, _kinds(path) if path.stem == "kinds" else ("",)):
                    yield Case(f"{name} {arguments}".strip(), path, f"python {path.name} {arguments}")
            elif path.suffix == ".sh":
                yield Case(name, path, f"bash {path.name}")
            elif path.suffix == ".yaml":
                yield Case(f"{name}.yaml", path, f"autoprune search {path.name} --out runs/{path.stem}")
            elif path.name == "sec":
                yield Case(name, path / "job.yaml", SEC)


def _kinds(path: Path) -> tuple[str, ...]:
    """The model kinds of kinds.py: the keys of its table, and the one that it names apart."""
    table = path.read_text(encoding="utf-8").partition("cases = {")[2]
    return (*re.findall(r'"([\w-]+)": \(', table), "two-inputs")


def outcome(case: Case, timeout_s: float) -> dict[str, Any]:
    """Run a case; its exit code, seconds, processor seconds, counts of its verdicts and last words."""
    with tempfile.TemporaryDirectory(prefix="faults-") as place:
        work, env = _laid_out(case, Path(place))
        limited = "" if case.name in UNLIMITED else f"ulimit -v {MEMORY >> 10}; "
        began, spent = time.perf_counter(), _processor_s()
        with (Path(place) / "said").open("w+") as said, (Path(place) / "errors").open("w+") as errors:
            process = subprocess.Popen(
                ["nice", "-n", "1", "bash", "-c", limited + case.command],
                cwd=work,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=errors,
                start_new_session=True,
            )
            try:
                code: int | None = process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                code = None
            _end(process)
            texts = [_read(f.name) for f in (said, errors)]
        found = {"rc": code, "seconds": round(time.perf_counter() - began, 1)}
        found["processor_s"] = round(_processor_s() - spent, 1)
    text = texts[0]
    counts = {kind: len(re.findall(rf"^{kind}\b", text, re.MULTILINE)) for kind in KINDS}
    said_at = re.compile(f"{re.escape(place)}/|{re.escape(str(ROOT))}/")
    lines = [said_at.sub("", line) for line in "\n".join(texts).splitlines() if line.strip()]
    still = [line for line in lines if line.startswith(("FAIL", "MSG", "FROZEN"))]
    return {**found, "code": _commit(), "counts": counts, "open": still[:40], "last": lines[-6:]}


def _laid_out(case: Case, place: Path) -> tuple[Path, dict[str, str]]:
    """A copy of the case's folder to run in, and the environment that leads it to the code."""
    folder = FAULTS / case.name.partition("/")[0]
    work = place / "work"
    shutil.copytree(folder, work)
    (work / "search_spaces").symlink_to(ROOT / "search_spaces")
    for old, new in (*EVERYWHERE, *EDITS.get(case.name, ())):
        edited = work / case.file.name
        edited.write_text(edited.read_text(encoding="utf-8").replace(old, new), encoding="utf-8")
    (place / "sitecustomize.py").write_text("from benchmarks.old_homes import install\ninstall()\n", encoding="utf-8")
    paths = [place, work, ROOT]
    if case.toys:
        shutil.copytree(ROOT / "autoprune", place / "package" / "autoprune")
        shutil.copytree(FAULTS / "toys", place / "package" / "autoprune", dirs_exist_ok=True)
        paths.insert(0, place / "package")
    given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    env = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([*map(str, paths), *(p for p in given if p)]),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
    }
    return work, env


def _end(process: subprocess.Popen[bytes]) -> None:
    """Whatever the script left running ends with it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _processor_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _read(path: str) -> str:
    return Path(path).read_text(encoding="utf-8", errors="replace")


def _commit() -> str:
    shown = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return shown.stdout.strip()


def table(found: Mapping[str, Mapping[str, Any]], before: Mapping[str, str], notes: Mapping[str, str]) -> str:
    """The Markdown page: a row a run, then the lines of each that are not PASS."""
    spent = sum(it.get("processor_s", 0.0) for it in found.values()) / 60
    made = sum("rc" in it for it in found.values())
    rows = [
        "# The scripts of ../shared/faults, before and after",
        "",
        f"Written by `python -m benchmarks.faults`: {made} of {len(found)} runs, {spent:.0f} processor-minutes. `code` "
        "is the commit that a run was made with, `s` its wall seconds. The lines of a run that are not PASS stand "
        "below; what was seen by hand, faults without a script too, in [faults-by-hand.md](faults-by-hand.md).",
        "",
        "| script | before | after | what there is to say | code | s |",
        "|---|---|---|---|---|---|",
    ]
    for name, it in found.items():
        script = name.partition(" ")[0]
        seen, note = (one.get(name, one.get(script, "")) for one in (before, notes))
        rows.append(
            f"| {name} | {_cell(seen)} | {_cell(_after(it))} | {_cell(note)} | {it.get('code', '')} "
            f"| {it.get('seconds', 0):.0f} |"
        )
    for name, it in found.items():
        if it.get("open"):
            rows += ["", f"## {name}", "", *(f"- {_cell(line)[:400]}" for line in it["open"])]
    return "\n".join(rows) + "\n"


def _after(it: Mapping[str, Any]) -> str:
    """What a run gave, in short."""
    if "not_run" in it:
        return f"not run: {it['not_run']}"
    counts = ", ".join(f"{n} {kind}" for kind, n in it["counts"].items() if n)
    ended = "no end within the limit" if it["rc"] is None else f"exit {it['rc']}" if it["rc"] else ""
    said = counts or (it["last"][-1] if it["rc"] and it["last"] else " / ".join(it["last"]))[-600:]
    return "; ".join(part for part in (ended, said) if part)


def _cell(text: str) -> str:
    shown = " ".join(text.split()).replace("|", "\\|")
    for place, name in ((str(ROOT), "."), (str(ROOT.parent), "..")):
        shown = shown.replace(place, name)
    return shown


def _loaded(name: str) -> dict[str, Any]:
    path = RESULTS / name
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--timeout", type=float, default=240.0)
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    if not FAULTS.exists():
        raise SystemExit(f"there is no {FAULTS}; AUTOPRUNE_FAULTS names the folder")
    found = _loaded("faults.json")
    for case in () if args.table else cases():
        if args.only and not any(word in case.name for word in args.only):
            continue
        if not args.again and "rc" in found.get(case.name, {}):
            continue
        missing = case.needs
        found[case.name] = {"not_run": f"no {missing} here"} if missing else outcome(case, args.timeout)
        print(case.name, _after(found[case.name])[:300], flush=True)
        text = json.dumps(dict(sorted(found.items())), indent=1)
        (RESULTS / "faults.json").write_text(text + "\n", encoding="utf-8")
    rows = {case.name: {"not_run": "not yet; the command goes on"} for case in cases()} | found
    page = table(dict(sorted(rows.items())), _loaded("faults-before.json"), _loaded("faults-notes.json"))
    (RESULTS / "faults.md").write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
