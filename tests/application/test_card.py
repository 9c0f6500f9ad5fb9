"""What the card says of zeros, from the figures of apply.json."""

from __future__ import annotations

from typing import Any

import pytest

from autoprune.application.card import extent, rows, timing, zeros

LATENCY = {
    "runtime": "eager",
    "device": "cpu",
    "threads": 1,
    "batch_size": 1,
    "dense_ms": 2.0,
    "ratio": 1.02,
    "iqr": 0.01,
    "rounds": 9,
}


def facts(densities: dict[str, float], **others: Any) -> dict[str, Any]:
    """Of a model of the dense shapes, whose weights of 100 numbers have these densities."""
    layers = {name: {"density": d, "nonzeros": round(100 * d)} for name, d in densities.items()}
    kept, count = sum(layer["nonzeros"] for layer in layers.values()), 100 * len(layers)
    told = {"nonzeros": kept, "weights": count, "density": kept / count, "layers": layers}
    costs = {
        "macs": {"dense": 9000, "pruned": 9000},
        "params": {"dense": 1200, "pruned": 1200},
        "nonzeros": {"dense": 1000, "pruned": 300},
        "effective_macs": {"dense": 9000, "pruned": 4000},
    }
    sizes = {"bytes": {"dense": {"plain": 4000}}}
    return {"macs_ratio": 1.0, "costs": costs, "zeros": {**told, **sizes}, "latency": LATENCY, **others}


def test_the_title_has_the_density_by_which_a_point_is_chosen_and_no_macs_that_are_dense() -> None:
    assert extent(facts({"a": 0.5})) == "30.0% of its prunable weights, 102% of its latency"
    costs = {"macs": {"dense": 9000, "pruned": 4500}, "nonzeros": {"dense": 1000, "pruned": 300}}
    said = extent(facts({"a": 0.5}, macs_ratio=0.5, costs=costs, latency=None))
    assert said == "50.0% of its multiply-accumulates, 30.0% of its prunable weights"
    assert extent({"macs_ratio": 1.0, "zeros": {"density": 0.5}}) == (
        "100.0% of its multiply-accumulates, 50.0% of the numbers in its masked weights"
    )


def test_the_table_says_what_became_less_and_that_the_rest_is_the_same() -> None:
    assert list(rows(facts({"a": 0.5}, latency=None))) == [
        ("multiply-accumulates a sample", "9,000", "the same"),
        ("parameters", "1,200", "the same"),
        ("weights that are not zero", "1,000", "300"),
        ("multiply-accumulates a sample with weights that are not zero", "9,000", "4,000"),
    ]


@pytest.mark.parametrize(
    ("runtime", "ends"),
    [
        ("eager", "(interquartile range 0.01, 9 rounds in turns, cpu); eager takes zeros for numbers like others, so"),
        ("sparse_csr", "(interquartile range 0.01, 9 rounds in turns, cpu)."),
    ],
)
def test_no_gain_is_expected_of_zeros_but_on_a_runtime_that_knows_them(runtime: str, ends: str) -> None:
    parts = {"dense": {"fixed": 1.0}, "pruned": {"fixed": 1.0}}
    (said,) = timing(facts({"a": 0.5}, latency={**LATENCY, "runtime": runtime, "parts": parts}))
    assert ends in said
    assert "multiply-accumulates" not in said
    assert "does not shrink" not in said


def test_where_shapes_are_smaller_the_rest_of_the_time_is_explained() -> None:
    costs = {"macs": {"dense": 9000, "pruned": 4500}}
    (said,) = timing(facts({"a": 0.5}, macs_ratio=0.5, costs=costs))
    assert "at 0.50 of the multiply-accumulates; the difference is what does not shrink with them" in said


def test_of_many_weights_the_least_the_middle_and_the_most_dense_are_named() -> None:
    few = " ".join(zeros(facts({"b": 0.5, "a": 0.25, "c": 1.0})))
    assert "By weight: b 0.5, a 0.25, c 1." in few
    many = facts({"b": 0.5, "a": 0.25, "c": 1.0, "d": 0.7, "e": 0.3})
    said = " ".join(zeros(many))
    assert "Of 5 weights the least dense is a 0.25, the middle one b 0.5, the densest c 1." in said
    assert "By weight" not in said
    for name in "abde":
        many["zeros"]["layers"][name]["pattern"] = "2:4"
    assert "side by side are not zero: 4 of the 5 weights." in " ".join(zeros(many))
