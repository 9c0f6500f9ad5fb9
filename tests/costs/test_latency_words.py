"""One line on where the time goes."""

from __future__ import annotations

import pytest

from autoprune.costs._latency_words import UNKNOWN, rest_words, same_shape_words, time_words

DENSE = {"fixed": 0.1, "untouched": 0.003, "written": 0.2, "narrowed": 0.697}
PRUNED = {"ratio": 0.79, "iqr": 0.01, "fixed": 0.1, "untouched": 0.003, "written": 0.15, "narrowed": 0.52}


def test_the_parts_of_both_models_stand_beside_each_other_and_what_is_nothing_is_left_out() -> None:
    assert time_words(0.498, PRUNED, DENSE) == (
        "0.50 of the MACs take 0.79 of the time; by the latency table, in shares of the dense time: operations that "
        "groups narrow 0.70 -> 0.52, values written (norms, activations, sums) 0.20 -> 0.15, what no width changes "
        "(starting operations) 0.10 as before; together 0.77"
    )


@pytest.mark.parametrize(("pruned", "dense"), [(None, DENSE), (PRUNED, None), ({"ratio": 0.79}, DENSE)])
def test_without_figures_no_figure_is_invented(pruned: dict[str, float] | None, dense: dict[str, float] | None) -> None:
    assert rest_words(pruned, dense) == UNKNOWN
    assert not any(letter.isdigit() for letter in UNKNOWN)


def test_where_no_shape_changed_no_rest_of_the_time_is_explained() -> None:
    assert time_words(1.0, PRUNED, DENSE) == "with the shapes of the dense model it takes 0.79 of the time"
    said = same_shape_words("eager", zeros=True)
    assert said == "eager takes zeros for numbers like others, so that no gain is expected"
    assert same_shape_words("sparse_csr", zeros=True) == same_shape_words("mine:runtime", zeros=True) == ""
    said = "its shapes are those of the dense model, so that no gain is expected"
    assert same_shape_words("eager", zeros=False) == same_shape_words("sparse_csr", zeros=False) == said
