"""How soon there is something to see: `autoprune --help`, and a worker that has answered its first ask.

usage: python -m benchmarks.start [--repeats 7] [--write]

Processor seconds (user and system) of fresh processes, the median and the least of the repeats; the wall beside them,
which other load on the machine stretches. What --write measures is kept in benchmarks/results/start.json.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results" / "start.json"
HEAVY = ("torch", "numpy", "ray", "optuna", "scipy")
LOADED = f"import sys; print('loaded:', *(m for m in {HEAVY!r} if m in sys.modules))"
WORKER = """
from contextlib import closing
from autoprune.evaluation import Ask
from autoprune.executors.local import Local
from autoprune.policy import Policy
from tests.synthetic import MakeHills, chain
with closing(Local(MakeHills(chain(2)), workers=1)) as executor:
    executor.submit(0, Ask(Policy.dense(chain(2)), "refit"))
    assert executor.next_done()[1].ok
"""
PROGRAMS: Mapping[str, str] = {
    "python alone": "pass",
    "autoprune --help": "import sys, autoprune.cli as c; c.run(['--help'])",
    "import autoprune": "import autoprune",
    "import of the search (autoprune.search)": "import autoprune; autoprune.search",
    "what a worker imports": "import autoprune.executors._worker, autoprune.run.worker_evaluator",
    "a search's process with one worker that has answered": WORKER,
}


def main() -> None:
    """Measure and print all programs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    print("| what | processor s, median (least) | wall s, median | loads of torch, numpy, ray, optuna, scipy |")
    print("|---|---|---|---|")
    rows = []
    for name, program in PROGRAMS.items():
        times = [timed(program) for _ in range(args.repeats)]
        used, wall = ([t[i] for t in times] for i in range(2))
        row = {"what": name, "cpu_s": statistics.median(used), "least_cpu_s": min(used)}
        rows.append({**row, "wall_s": statistics.median(wall), "loads": loads(program)})
        print("| {what} | {cpu_s:.2f} ({least_cpu_s:.2f}) | {wall_s:.2f} | {loads} |".format(**rows[-1]), flush=True)
    if args.write:
        facts = {"repeats": args.repeats, "load": round(os.getloadavg()[0], 1), "rows": rows}
        RESULTS.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def timed(program: str) -> tuple[float, float]:
    """(processor seconds, wall seconds) of a fresh Python with all of its children."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.DEVNULL)
    wall, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, wall


def loads(program: str) -> str:
    """Which heavy libraries the program's own process imports."""
    done = subprocess.run([sys.executable, "-c", f"{program}\n{LOADED}"], check=True, capture_output=True, text=True)
    return done.stdout.split("loaded:")[-1].strip() or "none"


if __name__ == "__main__":
    main()
