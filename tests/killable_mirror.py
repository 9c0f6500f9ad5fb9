"""A mirrored search of a tiny model in a process of its own, to be killed: FOLDER URL TRIALS (see test_mirror.py)."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from autoprune.record import mirror
from autoprune.run.run import search
from tests.killable_compare import tiny_job

if __name__ == "__main__":
    mirror.EVERY_S = 0.3
    job = tiny_job(search={"trials": int(sys.argv[3])}, sync_to=sys.argv[2])
    for _ in search(job, out=Path(sys.argv[1])):
        time.sleep(0.02)  # so that a search of milliseconds lasts for several mirrors
