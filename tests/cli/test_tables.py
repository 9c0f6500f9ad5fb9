"""The tables of the command line, from plain values."""

from __future__ import annotations

from typing import Any

import pytest

from autoprune.cli.tables import print_summary


def row(arm: str, macs: float | None) -> dict[str, Any]:
    costs = {} if macs is None else {"macs": macs, "nonzeros": 0.5}
    return {"budget": 0.5, "arm": arm, "point": None, "macs_ratio": macs, "costs": costs, "loss": 0.25}


def headings(rows: list[dict[str, Any]], costs: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> list[str]:
    print_summary(rows, costs)
    line = next(line for line in capsys.readouterr().out.splitlines() if "budget" in line and "arm" in line)
    return [word.strip() for word in line.strip("┃").split("┃")]


def test_macs_that_are_dense_in_every_row_have_no_column_unless_they_were_asked_for(
    capsys: pytest.CaptureFixture[str],
) -> None:
    weights = [row("search", 1.0), row("uniform", 1.0), row("global", None)]
    assert headings(weights, ("nonzeros",), capsys) == ["budget", "arm", "point", "nonzero weights", "loss"]
    asked = ["budget", "arm", "point", "MACs", "nonzero weights", "loss"]
    assert headings(weights, ("nonzeros", "macs"), capsys) == asked
    assert headings([*weights, row("mine", 0.7)], ("nonzeros",), capsys) == asked
    assert headings([row("search", None)], ("nonzeros",), capsys) == asked
