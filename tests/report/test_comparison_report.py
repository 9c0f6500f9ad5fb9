"""compare.html: self-contained, verdicts as they are, lines with bands for every strategy."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from autoprune.report.comparison import best_of, build_comparison, comparison_figure, curves, in_todays_form, looks_of

BUDGETS, SEEDS = (0.7, 0.5, 0.3), (0, 1, 2)
QUALITY = {"uniform": 1.6, "global": 1.0, "knapsack": 0.6, "evolution": 0.35, "random": 1.3}
CLOSED = ("uniform", "global", "knapsack")


def document(names: Sequence[str] = tuple(QUALITY), **changes: Any) -> dict[str, Any]:
    """A made-up comparison in the form of compare.json."""
    cells = [cell(name, seed) for name in names for seed in SEEDS]
    rows = [summary(name, budget) for budget in BUDGETS for name in names]
    verdicts = [
        {"outcome": kind, "text": f"layer-wise {words} global at {b:g}: evolution, 0.01 against 0.02 <b>"}
        for b, (kind, words) in zip(
            BUDGETS, (("beat", "beat"), ("no difference shown", "did NOT beat"), ("worse", "did NOT beat")), strict=True
        )
    ]
    facts = {"rule": "the rule & more", "about": {"seconds": "summed"}, "trials": 300, "tier": "refit", "cost": "macs"}
    facts |= {"metric": "accuracy", "direction": "maximize", "controls": ["uniform", "global"]}
    made = {"cells": cells, "summary": rows, "verdicts": verdicts, "log": True, "dense": {"accuracy": 0.98}, **facts}
    return {**made, **changes}


def cell(name: str, seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(0 if name in CLOSED else 10 + seed)
    front = []
    for ratio in np.linspace(0.2, 0.9, 15) + (0.0 if name in CLOSED else 0.01 * seed):
        loss = float(QUALITY[name] * np.exp(-7 * ratio + rng.normal(0, 0.12)))
        point = {"cost_ratio": float(ratio), "loss": loss, "low": loss * 0.85, "high": loss * 1.18}
        front.append({**point, "policy": "0" * 12, "value": max(0.1, 0.98 - loss + rng.normal(0, 0.004))})
    return {"strategy": name, "seed": seed, "front": front}


def summary(name: str, budget: float) -> dict[str, Any]:
    loss = QUALITY[name] * float(np.exp(-7 * budget))
    row: dict[str, Any] = {"strategy": name, "budget": budget, "seeds": 3, "closed_form": name in CLOSED}
    figures = {"cost_ratio": budget - 0.004, "loss": loss, "value": max(0.1, 0.98 - loss), "hypervolume": 4 - loss}
    for field, value in figures.items():
        row |= {field: value, f"{field}_sd": value / 30}
    return {**row, "evaluations": 320.0, "seconds": 41.5}


def test_the_page_stands_alone_and_says_the_verdicts(tmp_path: Path) -> None:
    text = build_comparison(tmp_path, document()).read_text()
    assert not re.search(r'<(script|link)[^>]+(src|href)="http', text)
    assert text.count('class="plotly-graph-div"') == 1
    assert "<strong>layer-wise beat global at 0.7</strong>" in text
    assert '<li class="worse"><strong>layer-wise did NOT beat global at 0.3</strong>' in text
    assert "&lt;b&gt;" in text
    assert "the rule &amp; more" in text


def test_a_document_of_an_earlier_version_is_read() -> None:
    text = json.dumps(document()).replace("cost_ratio", "macs_ratio").replace('"value', '"accuracy')
    old = {k: v for k, v in json.loads(text).items() if k not in ("metric", "direction", "controls")}
    assert in_todays_form(old)["summary"][0].items() >= document()["summary"][0].items()
    assert comparison_figure(old) == comparison_figure(document())


def test_every_strategy_has_a_line_a_band_and_marks_in_both_panels() -> None:
    figure = comparison_figure(document())
    for name in QUALITY:
        own = [trace for trace in figure.data if trace.legendgroup == name]
        panels = {(t.xaxis, t.fill, t.mode) for t in own}
        assert len(panels) == (5 if name in CLOSED else 6), "accuracy has no bootstrap interval"
        assert sum(bool(t.showlegend) for t in own) == 1


def test_the_band_spans_the_seeds_and_the_line_is_their_mean() -> None:
    cells = [c for c in document()["cells"] if c["strategy"] == "evolution"]
    grid, low, mean, high = curves(cells, "loss", log=True)
    assert grid[0] == pytest.approx(0.22)
    assert grid[-1] == pytest.approx(0.9)
    assert np.all(low <= mean)
    assert np.all(mean <= high)
    nodes = [
        np.log(np.interp(0.5, *zip(*((p["cost_ratio"], p["loss"]) for p in c["front"]), strict=True))) for c in cells
    ]
    assert np.log(np.interp(0.5, grid, mean)) == pytest.approx(np.mean(nodes), abs=0.02)


def test_the_band_of_a_strategy_without_chance_is_its_bootstrap_interval() -> None:
    cells = [c for c in document()["cells"] if c["strategy"] == "global"]
    _, low, mean, high = curves(cells, "loss", log=True)
    assert high / mean == pytest.approx(np.full(len(mean), 1.18))
    assert low / mean == pytest.approx(np.full(len(mean), 0.85))


def test_a_seed_without_points_leaves_the_line_out_and_the_page_whole(tmp_path: Path) -> None:
    made = document(("global", "random"))
    made["cells"][-1]["front"] = []
    made["summary"][-1] |= {"loss": None, "loss_sd": None, "value": None, "value_sd": None, "cost_ratio": None}
    assert not len(curves(made["cells"][3:], "loss", log=True)[0])
    assert "<td>-</td>" in build_comparison(tmp_path, made).read_text()


def test_a_task_without_accuracy_has_one_panel(tmp_path: Path) -> None:
    made = document(("uniform", "evolution"), dense={}, verdicts=[])
    for row in made["summary"]:
        row |= {"value": None, "value_sd": None}
    assert not any(trace.xaxis == "x2" for trace in comparison_figure(made).data)
    text = build_comparison(tmp_path, made).read_text()
    assert "Loss against MACs" in text
    assert "there is nothing to judge" in text


def test_control_arms_keep_their_colours_and_no_two_strategies_look_alike() -> None:
    looks = looks_of([*QUALITY, "tpe", "nsga2", "gp"])
    assert len(set(looks.values())) == len(looks)
    assert looks["global"] == looks_of(["global"])["global"]


def test_the_best_is_the_least_loss_and_the_most_of_everything_else() -> None:
    best = best_of([row for row in document()["summary"] if row["budget"] == 0.5], "maximize")
    assert best["loss"] == summary("evolution", 0.5)["loss"]
    assert best["value"] == summary("evolution", 0.5)["value"]
