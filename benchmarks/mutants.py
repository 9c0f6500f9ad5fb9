"""Numeric mutations, each against the tests that mirror its file: who notices that the numbers are wrong?

usage: OMP_NUM_THREADS=1 python -m benchmarks.mutants [--only ridge,kl] [--again]
       python -m benchmarks.mutants --show      the table of what there is; runs nothing

A mutation (mutations.toml) is a snippet of the source that stands once in its room or file, and what takes its place,
so that it is found again where the code moves; one whose snippet is gone counts as a failure, never as killed. It runs
in a scratch copy of the tree, against tests/<room>/test_<file>.py and the other tests that it names. What was found is
kept in benchmarks/results/mutants.json and holds until the mutated file or its tests change; exit 1 while one survives.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import resource
import shutil
import sys
import tempfile
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import optuna  # noqa: F401  imported for the forks, which would each take seconds for it
import pydantic  # noqa: F401
import pytest
import scipy.stats  # noqa: F401
import torch  # noqa: F401

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "mutants.json"
COPIED = ("autoprune", "tests", "benchmarks", "examples", "search_spaces", "docs", "pyproject.toml", "README.md")
MUTATIONS_FILE = ROOT / "benchmarks" / "mutations.toml"
LIMIT_S = 120
KILLED, SURVIVED, GONE, UNTESTED = "killed", "SURVIVED", "SNIPPET GONE", "NO TESTS"
BROKEN, SENSELESS = "TESTS FAIL UNMUTATED", "NO PROGRAM ANY MORE"


@dataclass(frozen=True)
class Mutation:
    """One line of mutations.toml."""

    name: str
    room: str
    old: str
    new: str
    tests: tuple[str, ...] = ()
    likely: str = ""


def read_mutations() -> list[Mutation]:
    """All mutations, in the order of their file."""
    lines = tomllib.loads(MUTATIONS_FILE.read_text(encoding="utf-8"))
    return [Mutation(name, **{**line, "tests": tuple(line.get("tests", ()))}) for name, line in lines.items()]


@dataclass(frozen=True)
class Place:
    """Where a mutation strikes, and the tests that should notice; `key` changes with either."""

    file: Path
    tests: tuple[str, ...]
    key: str


def located(mutation: Mutation) -> Place | str:
    """The one file of the room that holds the snippet once, or what is wrong."""
    room = ROOT / "autoprune" / mutation.room
    files = [room] if room.suffix == ".py" else sorted(room.rglob("*.py"))
    found = [f for f in files if f.exists() and mutation.old in f.read_text(encoding="utf-8")]
    if len(found) != 1 or found[0].read_text(encoding="utf-8").count(mutation.old) != 1:
        return GONE
    file = found[0].relative_to(ROOT)
    mirror = Path("tests", *file.parts[1:-1], f"test_{file.stem.strip('_')}.py")
    tests = [str(t) for t in dict.fromkeys([mirror, *map(Path, mutation.tests)]) if (ROOT / t).exists()]
    if not tests or len(tests) < len(mutation.tests):
        return UNTESTED
    texts = [found[0].read_text(encoding="utf-8"), mutation.old, mutation.new]
    texts += [(ROOT / t).read_text(encoding="utf-8") for t in tests]
    return Place(file, tuple(tests), hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16])


class Tree:
    """A scratch copy of the sources, in which tests run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in COPIED:
            source, target = ROOT / name, folder / name
            if source.is_dir():
                shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", "results"))
            else:
                shutil.copy(source, target)

    def try_out(self, mutation: Mutation, place: Place) -> dict[str, object]:
        """Whether the tests notice the mutation: the likely ones first, then all; what fails must pass without it."""
        file = self.folder / place.file
        before = file.read_text(encoding="utf-8")
        _write(file, before.replace(mutation.old, mutation.new))
        try:
            failed = self._first_failure([*place.tests, "-k", mutation.likely]) if mutation.likely else ""
            failed = failed or self._first_failure(place.tests)
        finally:
            _write(file, before)
        if failed and "::" not in failed:
            return {"outcome": SENSELESS, "by": failed}
        if failed and (said := self._first_failure([failed])):
            return {"outcome": BROKEN, "by": said}
        return {"outcome": KILLED, "by": failed} if failed else {"outcome": SURVIVED}

    def _first_failure(self, tests: Sequence[str]) -> str:
        """The first test that fails; empty where all pass or none is meant. In a fork: torch is imported but once."""
        said = self.folder / "said.txt"
        said.write_text(f"no end :: within {LIMIT_S} processor seconds", encoding="utf-8")
        child = multiprocessing.get_context("fork").Process(target=_run_tests, args=(self.folder, tests, said))
        child.start()
        child.join()
        return said.read_text(encoding="utf-8")


def _write(file: Path, text: str) -> None:
    """Write a module and forget its bytecode, which is told from another by the second and the size alone."""
    file.write_text(text, encoding="utf-8")
    for compiled in (file.parent / "__pycache__").glob(f"{file.stem}.*.pyc"):
        compiled.unlink()


class FirstFailure:
    """A plugin of pytest that remembers the test, or the file, that failed first."""

    def __init__(self) -> None:
        self.name = ""

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """A test, its set-up or its end."""
        if report.failed:
            self.name = self.name or report.nodeid

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """A file that cannot be read as tests."""
        if report.failed:
            self.name = self.name or report.nodeid


def _run_tests(folder: Path, tests: Sequence[str], said: Path) -> None:
    """Run in the scratch copy alone, with the sources of this tree forgotten, and write what failed."""
    resource.setrlimit(resource.RLIMIT_CPU, (LIMIT_S, LIMIT_S))
    os.chdir(folder)
    os.environ["PYTHONPATH"] = str(folder)
    sys.path[:] = [str(folder), *(p for p in sys.path if p and Path(p).resolve() != ROOT)]
    for name in [n for n in sys.modules if n.split(".")[0] in ("autoprune", "tests", "benchmarks")]:
        del sys.modules[name]
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
        first = FirstFailure()
        code = pytest.main(["-x", "-n", "0", "-p", "no:cacheprovider", "--tb=no", *tests], plugins=[first])
    said.write_text(first.name or ("" if code in (0, 5) else f"pytest ended with {int(code)}"), encoding="utf-8")
    os._exit(0)  # whatever threads the tests have left


def table(mutations: Sequence[Mutation], cells: Mapping[str, Mapping[str, object]]) -> str:
    """Every mutation with its outcome, as it stands for the files of now."""
    lines = ["| mutation | file | outcome | by |", "|---|---|---|---|"]
    for mutation in mutations:
        place, cell = located(mutation), cells.get(mutation.name, {})
        outcome = place if isinstance(place, str) else cell.get("outcome", "not run")
        stale = "" if isinstance(place, str) or cell.get("key") == place.key else " (files changed since)"
        file = mutation.room if isinstance(place, str) else str(place.file)
        lines.append(f"| {mutation.name} | {file} | {outcome}{stale} | {cell.get('by', '')} |")
    return "\n".join(lines)


def main() -> int:
    """Run what has no valid cell; 1 unless all mutations are killed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="parts of names, by commas")
    parser.add_argument("--again", action="store_true", help="also what is known")
    parser.add_argument("--show", action="store_true")
    args = parser.parse_args()
    mutations = read_mutations()
    cells = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    if args.show:
        print(table(mutations, cells))
        return 0
    words = [w for w in args.only.split(",") if w]
    wanted = [m for m in mutations if not words or any(w in m.name for w in words)]
    outcomes = []
    with tempfile.TemporaryDirectory(prefix="mutants") as folder:
        tree = Tree(Path(folder))
        for mutation in wanted:
            place, cell = located(mutation), cells.get(mutation.name, {})
            if isinstance(place, str):
                cell = {"outcome": place}
            elif args.again or cell.get("key") != place.key or cell.get("outcome") != KILLED:
                cell = {"key": place.key, "file": str(place.file), **tree.try_out(mutation, place)}
            cells[mutation.name] = cell
            kept = {m.name: cells[m.name] for m in mutations if m.name in cells}
            RESULTS.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
            print(f"{cell['outcome']:>21}  {mutation.name}  {cell.get('by', '')}", flush=True)
            outcomes.append(cell["outcome"])
    bad = [(m.name, o) for m, o in zip(wanted, outcomes, strict=True) if o != KILLED]
    print(f"\n{len(outcomes) - len(bad)} of {len(outcomes)} killed")
    for name, outcome in bad:
        print(f"  {outcome}: {name}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
