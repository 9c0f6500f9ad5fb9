"""The ledger: prices, what counts, and what ends a search."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest

from autoprune.evaluation import Ask, Evaluation
from autoprune.policy import Policy
from autoprune.run.constraints import Constraint, penalised
from autoprune.run.ledger import REPEATS_PER_TRIAL, Ledger, Plateau, Prices
from tests.synthetic import Hills, chain, make_problem

STRUCTURE = chain(5)
POLICIES = [Policy.from_array(STRUCTURE, [g.grid[-1] for g in STRUCTURE.groups[:-1]] + [i + 1]) for i in range(8)]
PRICES = Prices(statistics=512, fitness=1024, heldback=512, validation=2000, lesson=12_800)


@pytest.mark.parametrize(
    ("ask", "samples"),
    [
        (Ask(POLICIES[0], "stitch"), 1024),
        (Ask(POLICIES[0], "stitch", 0.125), 128),
        (Ask(POLICIES[0], "refit"), 1536),
        (Ask(POLICIES[0], "refit", 0.25), 512 + 256),
        (Ask(POLICIES[0], "stitch", split="heldback"), 1024),
        (Ask(POLICIES[0], "refit", split="validation"), 4512),
        (Ask(POLICIES[0], "tune", split="heldback"), 1024 + 3 * 12_800),
    ],
)
def test_an_ask_costs_the_samples_that_go_forward_and_three_for_each_that_is_trained_on(
    ask: Ask, samples: float
) -> None:
    assert PRICES.samples(ask) == samples
    assert PRICES.full(ask, "refit") == samples / 1536


def test_metrics_cost_another_pass_only_where_they_cannot_read_the_outputs_of_the_loss() -> None:
    watched, by_metric = replace(PRICES, watched=True), replace(PRICES, by_metric=True)
    whole, part = Ask(POLICIES[0], "stitch"), Ask(POLICIES[0], "stitch", 0.5)
    assert (watched.samples(whole), watched.samples(part)) == (1024 + 1024 + 512, 512)
    assert watched.samples(Ask(POLICIES[0], "refit")) == PRICES.samples(Ask(POLICIES[0], "refit"))
    assert (by_metric.samples(whole), by_metric.samples(part)) == (1024 + 512, 512 + 512)
    assert by_metric.samples(Ask(POLICIES[0], "refit", split="validation")) == 2512


def spend(ledger: Ledger, asks: list[Ask]) -> int:
    """How many of `asks` the ledger lets through."""
    for n, ask in enumerate(asks):
        if not ledger.may_ask(recorded=False):
            return n
        ledger.charge(ask)
    return len(asks)


def test_partial_evaluations_buy_more_asks_and_repeats_are_free() -> None:
    full = [Ask(p, "refit") for p in POLICIES]
    partial = [Ask(p, "refit", 0.25) for p in POLICIES]
    price = {1.0: 1.0, 0.25: 0.5}
    assert spend(Ledger(3, lambda a: price[a.fraction]), full) == 3
    assert spend(Ledger(3, lambda a: price[a.fraction]), partial) == 6
    assert spend(Ledger(3, lambda a: 1.0), [full[0], full[0], full[1], full[0], full[2], full[3]]) == 5
    assert spend(Ledger(1, lambda a: 1.0, before=full), full) == 4  # what the seeds evaluated costs nothing


def test_a_sampler_that_only_repeats_itself_is_stopped() -> None:
    ledger = Ledger(5, lambda a: 1.0)
    assert spend(ledger, [Ask(POLICIES[0], "refit")] * 100) == 1 + 5 * REPEATS_PER_TRIAL
    assert "repeats itself" in ledger.stopped


def test_time_ends_the_search_but_not_the_replay_of_what_is_recorded() -> None:
    ledger = Ledger(5, lambda a: 1.0, out_of_time=lambda: True)
    assert ledger.may_ask(recorded=True)
    assert not ledger.may_ask(recorded=False)
    assert "time limit" in ledger.stopped
    assert not ledger.may_ask(recorded=True)


def test_patience_ends_the_search_after_so_many_full_evaluations_without_gain() -> None:
    hills = Hills(STRUCTURE)
    good = hills(Ask(POLICIES[3], "refit"))
    ledger = Ledger(100, lambda a: 1.0, patience=3, plateau=Plateau(make_problem(STRUCTURE)))
    better = replace(good, loss=good.loss * 1e-6, costs={"macs": 0.3})
    worse = [replace(better, ask=Ask(p, "refit"), loss=good.loss) for p in POLICIES[4:7]]
    for answer in (better, *worse[:2], better, worse[0]):  # one that comes again took nothing
        ledger.told(answer)
        assert ledger.may_ask(recorded=False)
    ledger.told(worse[2])
    assert not ledger.may_ask(recorded=False)
    assert "hypervolume" in ledger.stopped


def test_a_gain_of_less_than_a_tenth_of_a_percent_is_none() -> None:
    plateau, ask = Plateau(make_problem(STRUCTURE, seeded=False)), Ask(POLICIES[0], "refit")
    assert plateau.grows(Evaluation(ask, 0.1, {"macs": 0.5}))
    assert not plateau.grows(Evaluation(ask, 0.09999, {"macs": 0.5}))
    assert plateau.grows(Evaluation(ask, 0.09, {"macs": 0.5}))


def test_points_that_miss_a_constraint_make_no_gain_for_the_plateau() -> None:
    floor = (Constraint("accuracy", 1, 0.9),)
    answer = Evaluation(Ask(POLICIES[0], "refit"), 0.1, {"macs": 0.5}, {"accuracy": 0.1})
    assert Plateau(make_problem(STRUCTURE)).grows(answer)
    assert not Plateau(make_problem(STRUCTURE), partial(penalised, floor)).grows(answer)


def test_a_plateau_ignores_partial_and_failed_evaluations() -> None:
    plateau = Plateau(make_problem(STRUCTURE))
    ask = Ask(POLICIES[0], "refit")
    assert not plateau.grows(Evaluation(replace(ask, fraction=0.5), 0.1, {"macs": 0.5}))
    assert not plateau.grows(Evaluation.failed(ask, "broken", {"macs": 0.5}))
    assert plateau.grows(Evaluation(ask, 0.1, {"macs": 0.5}))
    assert not plateau.grows(Evaluation(ask, 0.1, {"macs": 0.6}))
    assert plateau.grows(Evaluation(ask, 0.05, {"macs": 0.6}))
