"""The table of docs/search.md has every criterion, with what it scores and the defaults of its options."""

from __future__ import annotations

import inspect
import re

from autoprune import plugins
from autoprune.protocols import WeightCriterion
from tests.conftest import ROOT

SECTION = (ROOT / "docs" / "search.md").read_text(encoding="utf-8").split("## Criteria")[1].split("\n## ")[0]
ROWS = [
    (re.findall(r"`(\w+)`", row.split(" | ")[0]), row) for row in re.findall(r"^\| (`.*) \|$", SECTION, re.MULTILINE)
]


def test_every_criterion_is_in_the_table() -> None:
    assert sorted(name for names, _ in ROWS for name in names) == sorted(plugins.SHIPPED["criteria"])


def test_the_table_says_which_score_weights_and_which_need_nothing() -> None:
    for names, row in ROWS:
        _, weight, _, needs = re.split(r" (?<!\\)\| ", row)
        for criterion in (plugins.load("criteria", name) for name in names):
            masks = isinstance(criterion(), WeightCriterion) or names == ["obs"]
            assert masks == (weight != "none"), names
            assert getattr(criterion, "weights_only", False) == (needs == "nothing"), names


def test_options_are_told_with_their_defaults() -> None:
    for names, row in ROWS:
        for name in names:
            made = inspect.signature(plugins.load("criteria", name)).parameters.values()
            assert all(f"`{p.name}" in row for p in made), name
            if name == "movement":
                assert all(f"`{p.name}: {p.default}`" in row for p in made)
