"""Comparing strategies: one row each, the figures of their files, resumable."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from autoprune.compare_ import COLUMNS, compare
from autoprune.errors import InputError
from tests.test_search import job


def test_every_strategy_budget_and_seed_has_a_row_and_a_second_call_the_same(tmp_path: Path) -> None:
    the_job = job(search={"trials": 12}, evaluator={"finalists": 0})
    result = compare(the_job, ("uniform", "global", "random"), (0.6, 0.4), 2, tmp_path)
    with (tmp_path / "compare.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == COLUMNS
    keys = {(r["strategy"], r["budget"], r["seed"]) for r in rows}
    assert len(keys) == len(rows) == len(result["rows"]) == 3 * 2 * 2
    for row in rows:
        assert float(row["macs_ratio"]) <= float(row["budget"]) + 1e-9
        assert float(row["hypervolume"]) > 0
    assert (tmp_path / "compare.json").exists()
    assert compare(the_job, ("uniform", "global", "random"), (0.6, 0.4), 2, tmp_path) == result


def test_unknown_names_are_answered(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="unknown name 'unifrom'; did you mean 'uniform'"):
        compare(job(), ("unifrom",), (0.5,), 1, tmp_path)
    with pytest.raises(InputError, match="at least one strategy"):
        compare(job(), (), (0.5,), 1, tmp_path)
