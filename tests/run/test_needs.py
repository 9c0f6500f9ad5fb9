"""What a search needs is said beforehand, and too little memory is one line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from autoprune.errors import InputError
from autoprune.run import needs as rooms
from autoprune.run.needs import Needs, measured
from autoprune.run.run import search
from tests.killable_compare import tiny_job

GB = 10**9


def test_as_many_workers_start_as_have_memory() -> None:
    found = Needs(driver=GB, worker=2 * GB, shared=GB, disk=0, free=12 * GB)
    assert found.workers(None, most=8) == 4
    assert found.workers(None, most=2) == 2
    assert found.workers(6, most=6) == 6  # who asks for them gets them
    assert Needs(GB, 2 * GB, GB, 0, GB).workers(None, most=8) == 1
    assert Needs(GB, None, GB, 0, GB).workers(None, most=8) == 8
    said = found.said(4)
    assert "1.0 GB of memory for this process, 4 workers of 2.0 GB each" in said
    with pytest.raises(InputError, match=r"12\.0 GB are free here, and the search needs about 21\.0 GB"):
        Needs(GB, 20 * GB, 0, 0, 12 * GB).check("lower it")


def test_too_little_memory_is_told_before_the_data_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rooms, "free_memory", lambda: 10**6)
    with pytest.raises(InputError, match=r"too little memory: 1 MB are free.*lower evaluator\.calibration") as caught:
        search(tiny_job(), out=tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "run").rglob("*.safetensors"))


def test_memory_that_was_held_for_a_while_is_measured() -> None:
    with measured() as before:
        pass
    with measured() as most:
        held = np.ones(40_000_000)
        held += 1
        del held
    if most:  # where the system tells
        assert most[0] - before[0] > 200e6
