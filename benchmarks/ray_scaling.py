"""What a cluster costs: efficiency of executors, the driver's limits, bytes, memory and start-up, side by side.

usage: OMP_NUM_THREADS=1 python -m benchmarks.ray_scaling [--only efficiency,driver,slots,wire,start]
       [--evaluations 400] [--seconds 0.1,1]

Efficiency is useful evaluation time (as the evaluations measure it themselves) over wall time times workers, start-up
apart: from the first answer of every worker on. The evaluations sleep, so that two workers on a busy machine measure
the executor and not each other.
"""

from __future__ import annotations

import argparse
import heapq
import os
import resource
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from autoprune.codec import Codec
from autoprune.evaluation import Ask, Evaluation
from autoprune.executors.local import Local
from autoprune.policy import Policy
from autoprune.protocols import Executor, WorkerState
from autoprune.record.record import Record
from autoprune.run.loop import search_loop
from autoprune.samplers import build_sampler
from autoprune.structure import Structure
from benchmarks.naps import Nap
from tests.synthetic import Asks, Hills, chain, make_problem

WORKERS = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--evaluations", type=int, default=400)
    parser.add_argument("--only", default="efficiency,driver,slots,wire,start")
    parser.add_argument("--seconds", default="0.1,1", help="how long the sleeping evaluations take")
    args = parser.parse_args()
    seconds = [float(s) for s in args.seconds.split(",")]
    parts = {
        "start": start,
        "wire": wire,
        "efficiency": partial(efficiency, args.evaluations, seconds),
        "driver": driver,
        "slots": slots,
    }
    for name in args.only.split(","):
        print(f"\n**{name}** (load {os.getloadavg()[0]:.1f})\n", flush=True)
        parts[name]()


# efficiency -----------------------------------------------------------------------------------------------------------


def efficiency(n: int, lengths: Sequence[float]) -> None:
    """Sleeping evaluations through Ray actors, a process pool of ours, and a Tune trial each."""
    print(f"| executor | {' | '.join(f'{s:g} s' for s in lengths)} |\n" + "|---" * (1 + len(lengths)) + "|", flush=True)
    for name, measure in (("Ray actors", ray_actors), ("worker processes", processes), ("Tune trials", tune_trials)):
        print(f"| {name} | {' | '.join(f'{measure(s, n):.4f}' for s in lengths)} |", flush=True)


def ray_actors(seconds: float, n: int) -> float:
    from autoprune.executors.ray import Ray

    with ray_here():
        return of_executor(Ray(Nap(chain(30), seconds), WORKERS), n)


def processes(seconds: float, n: int) -> float:
    return of_executor(Local(Nap(chain(30), seconds), WORKERS), n)


def of_executor(executor: Executor, n: int) -> float:
    """Both workers are warm before the clock starts."""
    policies = random_policies(chain(30), n + 2 * WORKERS)
    with closing(executor):
        for index in range(2 * WORKERS):
            executor.submit(index, Ask(policies[index], "refit"))
        while executor.next_done() is not None:
            pass
        while any(w.state == "starting" for w in executor.workers()):
            executor.submit(0, Ask(policies[0], "refit"))
            executor.next_done()
        started = time.perf_counter()
        asked, useful = 0, list[float]()
        while len(useful) < n:
            while asked < min(n, len(useful) + 16):
                executor.submit(asked, Ask(policies[2 * WORKERS + asked], "refit"))
                asked += 1
            done = executor.next_done()
            useful += [] if done is None else [done[1].seconds]
        return sum(useful) / ((time.perf_counter() - started) * WORKERS)


def tune_trials(seconds: float, n: int) -> float:
    """A Ray Tune trial for each evaluation, actors reused, loggers off: from the first trial's end to the last's."""
    from ray import tune

    os.environ.update(TUNE_DISABLE_AUTO_CALLBACK_LOGGERS="1", RAY_AIR_NEW_OUTPUT="0")

    class Sleep(tune.Trainable):
        def setup(self, config: dict[str, Any]) -> None:
            pass

        def step(self) -> dict[str, Any]:
            started = time.time()
            time.sleep(seconds)
            return {"loss": 0.0, "took": time.time() - started, "ended": time.time(), "done": True}

        def reset_config(self, new_config: dict[str, Any]) -> bool:
            return True

        def save_checkpoint(self, checkpoint_dir: str) -> None:
            pass

    with ray_here(), tempfile.TemporaryDirectory() as folder:
        config = tune.TuneConfig(
            num_samples=n, max_concurrent_trials=WORKERS, reuse_actors=True, metric="loss", mode="min"
        )
        run = tune.RunConfig(storage_path=folder, verbose=0)
        space = {"width": tune.randint(0, 100)}
        results = tune.Tuner(Sleep, param_space=space, tune_config=config, run_config=run).fit()
        told = sorted((r.metrics["ended"], r.metrics["took"]) for r in results)[WORKERS:]  # the first ones have waited
    useful = sum(took for _, took in told[1:])
    return float(useful / ((told[-1][0] - told[0][0]) * WORKERS))


# the driver -----------------------------------------------------------------------------------------------------------


class Simulated:
    """256 workers that answer at once: what is left is the driver."""

    slots = 256

    def __init__(self, structure: Structure) -> None:
        self._hills, self._waiting, self.retried = Hills(structure), list[tuple[int, Ask]](), 0

    def submit(self, index: int, ask: Ask) -> None:
        self._waiting.append((index, ask))

    def next_done(self, timeout: float | None = None) -> tuple[int, Evaluation] | None:
        if not self._waiting or (timeout == 0 and len(self._waiting) < self.slots):
            return None
        index, ask = self._waiting.pop(int(index_of(len(self._waiting))))
        return index, Evaluation(ask, 1.0, {"macs": 0.5}, passes=1.0)

    def cancel(self, index: int) -> None:
        self._waiting.clear()

    def close(self) -> None:
        self._waiting.clear()

    def workers(self) -> tuple[WorkerState, ...]:
        return ()


def index_of(n: int) -> int:
    """Workers do not finish in order."""
    return (7919 * n) % n if n else 0


class Stream:
    """A sampler that costs nothing: policies drawn beforehand."""

    def __init__(self, policies: list[Policy]) -> None:
        self._left = iter(policies)

    def ask(self) -> Ask:
        return Ask(next(self._left), "refit")

    def tell(self, evaluation: Evaluation) -> None:
        pass


class Unrecorded(Record):
    """A record that keeps everything in memory alone."""

    def add(self, index: int, evaluation: Evaluation, stage: Any, label: str = "") -> None:
        self._remember(stage, index, label, evaluation)


def driver() -> None:
    """Results a second at 30 groups and window 512, and what the samplers alone would allow."""
    structure = chain(30)
    print("| what limits | results/s |\n|---|---|", flush=True)
    for label, make, n in (("every result on disk", Record, 2000), ("recording off", Unrecorded, 5000)):
        with tempfile.TemporaryDirectory() as folder, make(Path(folder), structure, ("macs",)) as record:
            rate = loop_rate(record, structure, n)
        print(f"| {label} | {rate:.0f} |", flush=True)
    for name in ("random", "evolution", "spdy"):
        print(f"| {name} sampler alone | {sampler_rate(name, structure, 600):.0f} |", flush=True)


def loop_rate(record: Record, structure: Structure, n: int) -> float:
    stream, executor = Stream(random_policies(structure, n)), Simulated(structure)
    started = time.perf_counter()
    told = sum(1 for _ in search_loop(record, executor, stream, Asks(n), window=512))
    return told / (time.perf_counter() - started)


def sampler_rate(name: str, structure: Structure, n: int) -> float:
    problem = make_problem(structure, n_trials=n)
    sampler, hills = build_sampler(name, problem, np.random.default_rng(0), {}), Hills(structure)
    spent = 0.0
    for _ in range(n):
        started = time.perf_counter()
        ask = sampler.ask()
        spent += time.perf_counter() - started
        evaluation = hills(ask)
        started = time.perf_counter()
        sampler.tell(evaluation)
        spent += time.perf_counter() - started
    return n / spent


class Slots:
    """So many workers whose evaluations take `seconds` of the clock and of nothing else."""

    def __init__(self, slots: int, seconds: float) -> None:
        self.slots, self.seconds, self.retried = slots, seconds, 0
        self._running, self._waiting = list[tuple[float, int, Ask]](), deque[tuple[int, Ask]]()

    def submit(self, index: int, ask: Ask) -> None:
        self._waiting.append((index, ask))
        self._fill()

    def _fill(self) -> None:
        while self._waiting and len(self._running) < self.slots:
            heapq.heappush(self._running, (time.monotonic() + self.seconds, *self._waiting.popleft()))

    def next_done(self, timeout: float | None = None) -> tuple[int, Evaluation] | None:
        if not self._running:
            return None
        wait = self._running[0][0] - time.monotonic()
        if timeout is not None and wait > timeout:
            return None
        time.sleep(max(0.0, wait))
        _, index, ask = heapq.heappop(self._running)
        self._fill()
        return index, Evaluation(ask, 1.0, {"macs": 0.5}, passes=1.0, seconds=self.seconds)

    def cancel(self, index: int) -> None:
        self._running.clear()
        self._waiting.clear()

    def close(self) -> None:
        self.cancel(0)

    def workers(self) -> tuple[WorkerState, ...]:
        return ()


def slots(count: int = 500, seconds: float = 1.0, rounds: int = 12) -> None:
    """How much of 500 workers a driver uses, window 1 024, every result on disk, from the first answer to the last."""
    structure, n = chain(30), rounds * count
    print("| sampler | efficiency | results/s |\n|---|---|---|", flush=True)
    for name in ("policies drawn beforehand", "evolution"):
        sampler: Any = Stream(random_policies(structure, n))
        if name == "evolution":
            sampler = build_sampler(name, make_problem(structure, n_trials=n), np.random.default_rng(0), {})
        with tempfile.TemporaryDirectory() as folder, Record(Path(folder), structure, ("macs",)) as record:
            told = search_loop(record, Slots(count, seconds), sampler, Asks(n), window=1024)
            next(told)
            started = time.perf_counter()
            rate = sum(1 for _ in told) / (time.perf_counter() - started)
        print(f"| {name} | {rate * seconds / count:.3f} | {rate:.0f} |", flush=True)


# bytes, memory, start-up ----------------------------------------------------------------------------------------------


def wire() -> None:
    """What travels for a candidate."""
    from ray import cloudpickle

    print("| groups | ask, bytes | answer, bytes |\n|---|---|---|")
    for groups in (30, 200):
        structure = chain(groups)
        ask = Ask(Policy.dense(structure), "refit")
        answer = Hills(structure)(ask)
        print(f"| {groups} | {len(cloudpickle.dumps(ask))} | {len(cloudpickle.dumps(answer))} |")


@dataclass(frozen=True)
class Weighed:
    """A shipment whose evaluations tell how large their process is."""

    shipment: Callable[[], Callable[[Ask], Evaluation]]

    def __call__(self) -> Callable[[Ask], Evaluation]:
        evaluate = self.shipment()

        def weighed(ask: Ask) -> Evaluation:
            found = evaluate(ask)
            memory = {f"{name}_mib": value for name, value in own_memory().items()}
            return Evaluation(ask, found.loss, found.costs, memory, found.passes, found.seconds, found.error)

        return weighed


def own_memory() -> dict[str, float]:
    """Unique and proportional MiB of this process, and its peak: what is shared with other workers counts by share."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
    kib = {line.split(":")[0]: float(line.split()[1]) for line in lines}
    unique = kib["Private_Clean"] + kib["Private_Dirty"]
    peak = float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    return {"unique": unique / 1024, "proportional": kib["Pss"] / 1024, "peak": peak / 1024}


def start() -> None:
    """ResNet-20 with its CIFAR-10 data: from ray.init to the first answer, and what a worker weighs."""
    from autoprune.run.prepare import prepare
    from benchmarks.search import job, parsed

    with tempfile.TemporaryDirectory() as folder:
        setting = prepare(job(parsed([])), Path(folder))
        factory, asks = Weighed(setting.shipment()), [Ask(Policy.dense(setting.structure), "refit")] * 4
        started = time.perf_counter()
        with ray_here():
            joined = time.perf_counter()
            from autoprune.executors.ray import Ray

            with closing(Ray(factory, WORKERS)) as executor:
                for index, ask in enumerate(asks):
                    executor.submit(index, ask)
                first = executor.next_done()
                answered = time.perf_counter()
                rest = [executor.next_done() for _ in asks[1:]]
    print(f"ray.init {joined - started:.1f} s; from there to the first answer {answered - joined:.1f} s")
    seen = [found[1].metrics for found in (first, *rest) if found is not None]
    print(", ".join(f"{name} {np.median([m[name] for m in seen]):.0f}" for name in seen[0]), "(a worker)")


def random_policies(structure: Structure, n: int) -> list[Policy]:
    codec, rng = Codec(structure), np.random.default_rng(0)
    return [codec.policy(np.floor(rng.random(len(structure)) * (codec.last + 1)).astype(int)) for _ in range(n)]


@contextmanager
def ray_here() -> Iterator[None]:
    import ray

    from autoprune.executors._ray_cluster import connect

    connect("local")
    try:
        yield
    finally:
        ray.shutdown()


if __name__ == "__main__":
    main()
