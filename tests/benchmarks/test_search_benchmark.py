"""The search benchmark's results: kept in small files, read back, shown as far as they go, never mixed with others."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from autoprune.errors import InputError
from autoprune.policy import Policy
from autoprune.run.ledger import Prices
from benchmarks.search import best_so_far, parsed, publish
from benchmarks.search_results import DENSE, Arm, Score, Store, Tables

PROTOCOL = {"task": "t", "budgets": [0.7, 0.5, 0.3], "trials": 300, "steps": 300}
NAMES = ("uniform", "tpe", "evolution")


def arm(name: str, seed: int, width: int, budgets: tuple[float, ...] = (0.7, 0.5, 0.3)) -> Arm:
    policies = {at: Policy.of({"a": width + seed, "b": round(100 * at)}) for at in budgets}
    curve = {} if name == "uniform" else {at: [(1.0, 2 * at), (20.0 + seed, at)] for at in budgets}
    return Arm(name, seed, policies, [(0.5, 0.1), (0.3, 0.4)], curve, 10.0, 3.0, {"device": "here"})


def score(loss: float, seed: int = 0) -> Score:
    losses = np.random.default_rng(seed).uniform(0.9 * loss, 1.1 * loss, 50)
    return Score(loss, 0.9 - loss / 10, 2.0, losses.astype(np.float16))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Uniform, two seeds of evolution of which one is scored, and nothing of tpe."""
    made = Store(tmp_path / "results")
    made.claim(PROTOCOL)
    for one in (arm("uniform", 0, 8), arm("evolution", 0, 4), arm("evolution", 1, 4, (0.7, 0.5))):
        made.add_arm(one)
    made.add_score("refit", DENSE, score(0.001))
    for one, loss in ((arm("uniform", 0, 8), 0.4), (arm("evolution", 0, 4), 0.2)):
        made.add_score("refit", one.policies[0.5].digest, score(loss))
    return made


def test_arms_and_scores_come_back_as_they_were(store: Store) -> None:
    found, made = store.arm("evolution", 1), arm("evolution", 1, 4, (0.7, 0.5))
    assert found is not None
    assert (found.policies, found.seconds, found.measured_on) == (made.policies, made.seconds, made.measured_on)
    assert [tuple(p) for p in found.curve[0.5]] == made.curve[0.5]
    back, word = score(0.2), made.policies[0.5].digest
    store.add_score("tune", word, back)
    read = store.score("tune", word)
    assert read is not None
    assert (read.loss, read.accuracy) == (back.loss, back.accuracy)
    assert np.array_equal(read.losses, back.losses)
    assert store.arm("tpe", 0) is None
    assert store.score("tune", DENSE) is None


def test_tables_show_what_there_is_and_how_many_seeds_it_rests_on(store: Store) -> None:
    tables = Tables(store, NAMES)
    lines = tables.losses("refit").splitlines()
    assert "| uniform | 1 | - | 0.400 / 86.00% | - |" in lines
    assert "| tpe | 0 | - | - | - |" in lines
    assert "| evolution | 2 | - | 0.200 / 88.00% (1) | - |" in lines
    assert tables.losses("tune").count("| - | - | - |") == 3
    assert "KL 0.50" in tables.ratios()
    assert tables.difference("uniform", 0.5, "refit").startswith("+0.2")
    assert tables.difference("tpe", 0.5, "refit") == "-"


def test_seeds_are_paired_with_themselves_and_a_strategy_with_every_seed(store: Store) -> None:
    for one, loss in ((arm("evolution", 1, 4), 0.3), (arm("tpe", 1, 40), 0.5)):
        store.add_arm(one)
        store.add_score("refit", one.policies[0.5].digest, score(loss))
    tables = Tables(store, NAMES)
    assert float(tables.difference("tpe", 0.5, "refit").split()[0]) == pytest.approx(0.2, abs=0.02)
    assert float(tables.difference("uniform", 0.5, "refit").split()[0]) == pytest.approx(0.15, abs=0.02)


def test_a_budget_that_no_seed_met_is_told_from_one_that_is_not_measured(store: Store) -> None:
    store.add_arm(arm("tpe", 0, 40, (0.7,)))
    assert "| tpe | 1 | - | none | none |" in Tables(store, NAMES).losses("refit").splitlines()


def test_results_of_other_settings_are_refused_by_name(store: Store) -> None:
    store.claim(PROTOCOL)
    with pytest.raises(InputError, match="trials is 300 there, 50 here"):
        store.claim({**PROTOCOL, "trials": 50})


def test_partial_results_are_published_with_a_drawing_of_every_curve(
    store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    publish(store, store.path / "curves.svg")
    assert capsys.readouterr().out.strip() == (store.path / "tables.md").read_text(encoding="utf-8").strip()
    drawing = ElementTree.parse(store.path / "curves.svg")
    space = "{http://www.w3.org/2000/svg}"
    assert len(drawing.findall(f"{space}polyline")) == 2  # evolution; one of its seeds never met 30 %
    assert len(drawing.findall(f"{space}polygon")) == 2
    assert "evolution (2)" in {text.text for text in drawing.findall(f"{space}text")}


def test_the_curve_charges_what_ran_and_falls_at_full_evaluations_alone() -> None:
    fact = {"stage": "search", "tier": "refit", "passes": 1.0, "costs": {"macs": 0.5}}
    facts = [
        {**fact, "ask": 2, "fraction": 1.0, "loss": 0.3},
        {**fact, "ask": 0, "fraction": 1.0, "loss": 0.4},
        {**fact, "ask": 1, "fraction": 0.25, "loss": 0.1},
        {**fact, "ask": 3, "fraction": 1.0, "loss": 0.2, "passes": 0.0},
    ]
    curve = best_so_far(facts, Prices(768, 1536, 768, 1024, 0))
    assert curve[0.3] == []
    assert curve[0.5] == [(1.0, 0.4), (2.5, 0.3), (2.5, 0.2)]


def test_seeds_are_a_number_or_a_list() -> None:
    assert parsed(["--seeds", "2"]).seeds == (0, 1)
    assert parsed(["--seeds", "2,"]).seeds == (2,)
