"""A real run is killed at random moments and goes on: nothing is lost, nothing repeated, and the front is the same."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

from autoprune.evaluation import Evaluation
from autoprune.executors.inline import Inline
from autoprune.record.record import Record, Stage
from autoprune.record.storage import JOURNAL
from tests import killable_run
from tests.conftest import hear_interrupts, importing_alike
from tests.killable_run import STRUCTURE
from tests.synthetic import MakeHills

N_TRIALS = 60
SCRIPT = Path(killable_run.__file__)


def start(folder: Path, workers: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, str(SCRIPT), str(folder), str(N_TRIALS), str(workers), str(folder / "log")]
    folder.mkdir(exist_ok=True)
    return subprocess.Popen(command, env=importing_alike(), preexec_fn=hear_interrupts)


def stop_after(process: subprocess.Popen[bytes], journal: Path, n_lines: int, sent: signal.Signals) -> int:
    """Send a signal once the journal has `n_lines` (or let the process end); its exit status."""
    while process.poll() is None:
        if n_lines_of(journal) >= n_lines:
            process.send_signal(sent)
            break
        time.sleep(0.005)
    return process.wait(timeout=60)


def evaluated(folder: Path) -> list[str]:
    log = folder / "log"
    return log.read_text().splitlines() if log.exists() else []


def n_lines_of(journal: Path) -> int:
    return journal.read_bytes().count(b"\n") if journal.exists() else 0


def finished(folder: Path) -> set[str]:
    """The log lines of the evaluations that are on disk."""
    asks = [e.ask for e in recorded(folder).values()]
    return {f"{a.policy.digest} {a.tier} {a.fraction} {a.split}" for a in asks}


def recorded(folder: Path) -> dict[tuple[Stage, int], Evaluation]:
    """All that the record holds, without the wall time, which no two runs share."""
    with Record(folder, STRUCTURE, ("macs",)) as record:
        return {key: replace(e, seconds=0.0) for key, e in record.evaluations.items()}


def test_a_run_killed_at_random_moments_ends_like_one_that_never_was(tmp_path: Path) -> None:
    chance = random.Random(0)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    expected = killable_run.run(whole, N_TRIALS, Inline(MakeHills(STRUCTURE, fail_share=0.05)))
    for _ in range(2):
        on_disk, n_lines, n_evaluated = finished(killed), n_lines_of(killed / JOURNAL), len(evaluated(killed))
        process = start(killed, workers=2)
        ended = stop_after(process, killed / JOURNAL, n_lines + chance.randint(1, 25), signal.SIGKILL) == 0
        assert not on_disk & set(evaluated(killed)[n_evaluated:]), "what was on disk is not evaluated again"
        if ended:
            break
        tear(killed / JOURNAL, chance)
    assert start(killed, workers=1).wait(timeout=60) == 0
    assert recorded(killed) == recorded(whole)
    front = killable_run.run(killed, N_TRIALS, Inline(MakeHills(STRUCTURE, log=str(tmp_path / "idle"))))
    assert [replace(e, seconds=0.0) for e in front] == [replace(e, seconds=0.0) for e in expected]
    assert not (tmp_path / "idle").exists(), "a finished run is replayed without any evaluation"


def tear(journal: Path, chance: random.Random) -> None:
    """As a kill in the middle of a write leaves it: half a last line, and Optuna's lock still there."""
    line = journal.read_bytes().splitlines()[-1]
    with journal.open("ab") as file:
        file.write(line[: chance.randint(1, len(line) - 1)])
    if not Path(f"{journal}.lock").is_symlink():  # where the kill itself has not left it
        os.symlink(journal, f"{journal}.lock")


def test_an_interrupted_run_ends_with_130_and_goes_on(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert stop_after(start(folder, workers=2), folder / JOURNAL, 25, signal.SIGINT) == 130
    before = recorded(folder)
    assert start(folder, workers=2).wait(timeout=60) == 0
    after = recorded(folder)
    assert len(before) < len(after)
    assert {key: after[key] for key in before} == before
