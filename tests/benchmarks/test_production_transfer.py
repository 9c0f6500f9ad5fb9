"""The transfer benchmark's cells: kept as they come, never mixed with other settings, shown as far as they go."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from autoprune.errors import InputError
from benchmarks.production_transfer import Cells, main, parsed, points, table


def cell(loss: float) -> dict[str, float]:
    return {"macs": 0.5, "loss": loss, "accuracy": 0.9 - loss, "seconds": 1}


def test_cells_are_kept_and_other_settings_are_refused(tmp_path: Path) -> None:
    cells = Cells(tmp_path / "found.json")
    cells.claim({"trials": 300})
    cells.add("0.5 transfer refit", cell(0.2))
    again = Cells(tmp_path / "found.json")
    again.claim({"trials": 300})
    assert again.held == {"protocol": {"trials": 300}, "0.5 transfer refit": cell(0.2)}
    with pytest.raises(InputError, match="trials is 300 there, 20 here; choose another --results"):
        again.claim({"trials": 20})


def test_the_table_shows_what_there_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    held = {"dense refit": cell(0.0), "0.5 transfer refit": cell(0.2), "0.5 uniform tune": cell(0.1)}
    lines = table(held).splitlines()
    assert "| 0.5 | transfer | 0.5000 | 0.2000 / 70.00% | - |" in lines
    assert "| 0.5 | uniform | 0.5000 | - | 0.1000 / 80.00% |" in lines
    assert "| 0.5 | search | - | - | - |" in lines
    (tmp_path / "found.json").write_text(json.dumps(held))
    main(["--show", "--results", str(tmp_path / "found.json")])
    assert capsys.readouterr().out.splitlines() == lines


def test_the_measured_points_are_those_of_the_search_benchmark() -> None:
    with pytest.raises(InputError, match="no policies of the ResNet-20 at"):
        points(parsed(["--budgets", "0.55"]))
