"""The table of sparse products: measured once, kept, shown as far as it goes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import sparse_time
from benchmarks.sparse_time import Case, main, table


def test_cells_are_measured_once_and_further_densities_are_added(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sparse_time, "CASES", {"tiny": {"a": Case(16, 8, (4, 16)), "b": Case(4, 4, (1, 4, 5, 5), 3)}})
    results = tmp_path / "found.json"
    words = ["--layers", "tiny", "--seconds", "0.05", "--results", str(results)]
    main([*words, "--densities", "0.5,0.1"])
    first = json.loads(results.read_text())
    assert {name: (cell["columns"], sorted(cell["ratios"])) for name, cell in first.items()} == {
        "a, 1 threads": (4, ["0.1", "0.5"]),
        "b, 1 threads": (25, ["0.1", "0.5"]),
    }
    main([*words, "--densities", "0.5,0.1"])
    assert json.loads(results.read_text()) == first
    main([*words, "--densities", "0.5,0.01"])
    again = json.loads(results.read_text())
    assert again["a, 1 threads"]["ratios"].items() > first["a, 1 threads"]["ratios"].items()
    assert sorted(again["a, 1 threads"]["ratios"]) == ["0.01", "0.1", "0.5"]
    capsys.readouterr()
    main(["--show", "--results", str(results)])
    assert capsys.readouterr().out.rstrip() == table(again)


def test_the_table_says_from_which_density_on_it_pays() -> None:
    cell = {"columns": 32, "dense_ms": 0.5, "ratios": {"0.3": 1.2, "0.1": 0.4, "0.05": 0.2}}
    lines = table({"linear": cell, "other": {**cell, "ratios": {"0.05": 1.5}}}).splitlines()
    assert lines[0] == "| layer | columns | dense ms | 0.3 | 0.1 | 0.05 | pays from |"
    assert lines[2] == "| linear | 32 | 0.5 | 1.20 | 0.40 | 0.20 | 0.1 |"
    assert lines[3] == "| other | 32 | 0.5 | - | - | 1.50 | - |"
