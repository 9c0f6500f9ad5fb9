"""Targets of the dense model in files: what the next evaluator reads is what the first one computed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from autoprune import plugins
from autoprune.database.batches import Parts
from autoprune.database.build import build_database
from autoprune.evaluation import Ask
from autoprune.evaluator.settings import Settings
from autoprune.evaluator.tiers import TieredEvaluator
from autoprune.policy import Policy
from tests.small import World, world

SETTINGS = Settings(calibration=64, validation=32, batch_size=16, device="cpu")


def evaluator(w: World, folder: Path | None, precision: str = "fp32") -> TieredEvaluator:
    database = build_database(w.model, w.structure, w.seen, plugins.load("criteria", "obs")())
    parts = replace(Parts.of(w.task, 64, 16), layout=torch.channels_last, fits=8, folder=folder)
    parts = parts.on(torch.device("cpu"))
    settings = replace(SETTINGS, precision=precision)  # type: ignore[arg-type]
    return TieredEvaluator(w.task, w.structure, database, settings, w.model, parts=parts)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_second_evaluator_reads_what_the_first_one_wrote(precision: str, tmp_path: Path) -> None:
    w = world("projection")
    ask = Ask(Policy.of({g.name: max(g.grid[0], g.width // 2) for g in w.structure.groups}), "refit")
    expected = evaluator(w, None, precision)(ask).loss
    first = evaluator(w, tmp_path, precision)
    files = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    second = evaluator(w, tmp_path, precision)
    assert len(files) == 2 + 1, "one for each of two batches, one for the moments of both"
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == files
    assert [first(ask).loss, second(ask).loss] == [expected, expected]
    assert second(Ask(Policy.dense(w.structure), "refit")).loss <= 1e-7


def test_another_precision_and_a_broken_file_are_no_answer(tmp_path: Path) -> None:
    w = world("projection")
    evaluator(w, tmp_path)
    before = set(tmp_path.iterdir())
    evaluator(w, tmp_path, "bf16")
    assert len(set(tmp_path.iterdir()) - before) == 3
    for path in before:
        path.write_bytes(b"broken")
    assert evaluator(w, tmp_path)(Ask(Policy.dense(w.structure), "refit")).loss <= 1e-7
