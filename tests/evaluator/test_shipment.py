"""What a shipment becomes on one machine shares its entries there, and leaves nothing of them."""

from __future__ import annotations

import gc
import tempfile
from pathlib import Path

import pytest

from autoprune import plugins
from autoprune.database.build import build_database
from autoprune.evaluation import Ask
from autoprune.evaluator.settings import Settings
from autoprune.evaluator.shipment import Shipment
from autoprune.evaluator.tiers import TieredEvaluator
from autoprune.files.held import PREFIX
from autoprune.policy import Policy
from tests.small import World, world

SETTINGS = Settings(calibration=64, validation=32, batch_size=16, device="cpu", precision="fp32")


def shipped() -> tuple[World, Shipment, TieredEvaluator]:
    """A shipment, and the evaluator of its parts in this process alone."""
    w = world("projection")
    database = build_database(w.model, w.structure, w.seen, plugins.load("criteria", "obs")())
    alone = TieredEvaluator(w.task, w.structure, database, SETTINGS)
    return w, Shipment.of(w.task, w.structure, database, SETTINGS), alone


def half(w: World) -> Policy:
    return Policy.of({g.name: max(g.grid[0], g.width // 2) for g in w.structure.groups})


def test_evaluators_of_a_shipment_share_entries_and_leave_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    w, shipment, alone = shipped()
    ask = Ask(half(w), "refit")
    one, other = shipment(), shipment()
    losses = [one(ask).loss]
    (folder,) = tmp_path.glob(f"{PREFIX}*")
    files = {p.name: p.stat().st_ino for p in folder.glob("*.safetensors")}
    losses.append(other(ask).loss)
    assert len(files) == len(w.structure)
    assert {p.name: p.stat().st_ino for p in folder.glob("*.safetensors")} == files, "none was made twice"
    assert losses == [alone(ask).loss] * 2
    del one
    gc.collect()
    assert folder.exists()
    del other
    gc.collect()
    assert not folder.exists()


def test_without_room_for_temporary_files_each_has_a_share_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    w, shipment, alone = shipped()
    evaluator = shipment()
    assert evaluator(Ask(half(w), "stitch")).loss == alone(Ask(half(w), "stitch")).loss
    assert evaluator.stitcher.database.entries.limit <= SETTINGS.memory
    assert evaluator.stitcher.database.entries.folder is None
