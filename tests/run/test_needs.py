"""What a search needs is said beforehand, and too little memory is one line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from autoprune.errors import InputError
from autoprune.run import needs as rooms
from autoprune.run.needs import Needs, database_bytes, entry_bytes, gram_columns, measured
from autoprune.run.run import search
from autoprune.structure import Op, Structure, TensorSpec
from tests.killable_compare import tiny_job
from tests.synthetic import sparse

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


def test_weights_take_a_bit_each_and_their_values_at_every_density_and_a_score_each() -> None:
    conv, turned = TensorSpec("c.weight", (8, 4, 3, 3), 4), TensorSpec("t.weight", (16, 8), 4)
    ops = (
        Op("c", "Conv2d", 0, 9, conv.name, tensors=(conv,)),
        Op("t", "Conv1D", 1, 1, turned.name, tensors=(turned,), outputs=1),
    )
    structure = sparse(Structure((), ops), "2:4")
    assert gram_columns(structure) == {"c.weight": 36, "t.weight": 16}
    assert entry_bytes(structure) == (288 + 128) / 8 + 4 * (144 + 64)
    assert database_bytes(structure) == 4 * (288 + 128) + 8 * (36**2 + 16**2)
