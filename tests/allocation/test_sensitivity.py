"""The sensitivity table: what is asked, how it is read, how it is kept."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from autoprune.allocation.sensitivity import PLANS, TablePlan, affordable, load_table, save_table, table_asks, table_of
from autoprune.errors import InputError
from autoprune.evaluation import Ask, Evaluation
from autoprune.policy import Policy
from autoprune.run.ledger import Prices
from tests.synthetic import Hills, chain, true_loss

STRUCTURE = chain(5)


def test_every_group_is_narrowed_alone_from_its_narrowest_width_up() -> None:
    asks = table_asks(STRUCTURE, TablePlan(5))
    dense = Policy.dense(STRUCTURE).as_dict()
    assert asks[0][1].policy == Policy.dense(STRUCTURE)
    assert all(ask.tier == "refit" and ask.fraction == 0.5 for _, ask in asks)
    for group in STRUCTURE:
        widths = []
        for label, ask in asks[1:]:
            changed = {n: w for n, w in ask.policy.widths if w != dense[n]}
            assert len(changed) == 1
            if group.name in changed:
                widths.append(changed[group.name])
                assert label == f"{group.name}={changed[group.name]}"
        assert len(widths) == 5
        assert widths[0] == group.grid[0]
        assert widths == sorted(widths)


def test_auto_takes_the_best_plan_that_costs_no_more_than_the_search() -> None:
    prices = Prices(statistics=600, fitness=600, heldback=200, validation=100, lesson=0)

    def price(asks: Sequence[Ask]) -> float:
        return prices.worth(asks, "refit")

    groups = chain(40)
    assert affordable(groups, price, 300) == TablePlan(), "200 asks of .75 each are less"
    assert affordable(groups, price, 100) == TablePlan(3)
    assert affordable(groups, price, 60) == TablePlan(5, "stitch", 0.5), "a quarter of a refit each"
    assert affordable(groups, price, 1) == PLANS[-1]
    costs = [price([ask for _, ask in table_asks(groups, plan)]) for plan in PLANS]
    assert costs == sorted(costs, reverse=True)


def test_a_group_with_few_widths_is_asked_at_each_once() -> None:
    two = chain(2, grid_step=100)
    assert len(table_asks(two, TablePlan(5))) == 1  # only the dense widths are allowed: nothing can be narrowed
    assert len(table_asks(chain(2, grid_step=8), TablePlan(5))) == 1 + sum(
        len(g.grid) - 1 for g in chain(2, grid_step=8)
    )


def test_the_table_holds_what_was_measured_and_the_dense_loss() -> None:
    hills = Hills(STRUCTURE)
    asks = table_asks(STRUCTURE, TablePlan(3))
    answers = [hills(ask) for _, ask in asks]
    table = table_of(STRUCTURE, answers)
    for group in STRUCTURE:
        assert len(table[group.name]) == 4
        assert table[group.name][group.width] == pytest.approx(true_loss(STRUCTURE, Policy.dense(STRUCTURE)), rel=0.1)


def test_a_width_that_fails_counts_as_far_worse_and_a_dense_model_that_fails_is_an_error() -> None:
    hills = Hills(STRUCTURE)
    asks = [ask for _, ask in table_asks(STRUCTURE, TablePlan(2))]
    answers = [hills(ask) for ask in asks]
    broken = [answers[0], Evaluation.failed(asks[1], "not finite"), *answers[2:]]
    first = STRUCTURE.groups[0]
    assert table_of(STRUCTURE, broken)[first.name][first.grid[0]] > 5 * max(e.loss for e in answers[2:])
    with pytest.raises(InputError, match="the dense model cannot be evaluated: no memory"):
        table_of(STRUCTURE, [Evaluation.failed(asks[0], "no memory"), *answers[1:]])


def test_a_saved_table_comes_back_and_a_damaged_one_is_one_clear_line(tmp_path: Path) -> None:
    path = tmp_path / "database" / "table.json"
    answers = [Hills(STRUCTURE)(ask) for _, ask in table_asks(STRUCTURE, TablePlan(2))]
    table = table_of(STRUCTURE, answers)
    assert load_table(path) is None
    save_table(path, table, TablePlan(2), answers)
    assert load_table(path) == table
    path.write_text(path.read_text()[:50])
    with pytest.raises(InputError, match="is no sensitivity table"):
        load_table(path)
