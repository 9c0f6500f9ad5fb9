"""A fine-tune never returns less than it was given, and its peak rate is found."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from autoprune.evaluation import Ask
from autoprune.evaluator.finetune import Course, Recipe, usual_rate
from autoprune.evaluator.keep_best import Best, Kept, checks, find_rate, keep_best, probe_lengths, scorings
from autoprune.protocols import Progress
from tests.evaluator.test_tiers import evaluator, narrow
from tests.small import World, world, world_of


class Enlarge(nn.Module):
    """The kind of a super-resolution net: it adds what it computes to its input."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 12, 3, padding=1)
        self.last = nn.Conv2d(12, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.last(self.inner(self.first(x).relu()).relu())


def enlarge(scale: float = 1.0) -> World:
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = Enlarge().eval()
        for parameter in model.parameters():
            parameter.mul_(scale)
        return world_of(model, (1, 8, 8), 256)


def walk(model: nn.Linear, values: list[float]) -> Iterator[Progress]:
    """A training that sets the weight to one value after the other; nan fails."""
    for step, value in enumerate(values, 1):
        if math.isnan(value):
            raise ArithmeticError("the fine-tuning loss is nan")
        model.weight.data.fill_(value)
        yield Progress(step, value, step)


@pytest.mark.parametrize(
    ("values", "best", "step"),
    [
        ([3.0, 1.0, 0.5, 2.0], 0.5, 3),
        ([3.0, 4.0, 5.0, 6.0], 2.0, 0),
        ([3.0, 1.0, math.nan, 0.0], 1.0, 2),
        ([1.0, 0.5, 0.25, 0.125], 0.125, 4),
    ],
)
def test_the_best_weights_of_the_way_are_kept_the_start_among_them(values: list[float], best: float, step: int) -> None:
    model = nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(2.0)
    kept = keep_best(model, walk(model, values), lambda: abs(float(model.weight.detach())), checks(4))
    assert (kept.start, kept.loss, kept.step, kept.helped) == (2.0, best, step, step > 0)
    assert float(model.weight.detach()) == best


def test_only_the_asked_steps_are_scored() -> None:
    model, seen = nn.Linear(1, 1, bias=False), list[float]()

    def score() -> float:
        seen.append(float(model.weight.detach()))
        return seen[-1]

    model.weight.data.fill_(100.0)
    keep_best(model, walk(model, [float(100 - s) for s in range(1, 41)]), score, checks(40))
    assert seen == [100.0, 90.0, 80.0, 70.0, 60.0]
    assert len(seen) == scorings(40)
    assert (checks(40), checks(3), checks(0), scorings(0)) == ((10, 20, 30, 40), (1, 2, 3), (), 0)


def test_the_best_so_far_goes_on_elsewhere_and_knows_how_long_nothing_got_better() -> None:
    model, score = nn.Linear(1, 1, bias=False), [0.0]
    model.weight.data.fill_(2.0)
    best = Best(model, lambda: score[0], checks(10, 5))
    assert checks(10, 5) == (2, 4, 6, 8, 10)
    for step, loss in ((2, 3.0), (4, -1.0), (6, 5.0)):
        score[0] = loss
        model.weight.data.fill_(float(step))
        assert best.look(step - 1) is False, "not due"
        assert best.look(step) is True
    assert (best.idle, best.kept) == (1, Kept(0.0, -1.0, 4))
    again = Best.of(model, lambda: 7.0, checks(10, 5), best.history, best.weights)
    assert again.look(6) is False
    assert again.look(8) is True
    assert (again.idle, again.finish()) == (2, Kept(0.0, -1.0, 4))
    assert float(model.weight.detach()) == 4.0


@pytest.mark.parametrize("peak", [3.0, 1.0, 1 / 3, 1 / 81])
def test_the_rate_of_least_loss_is_found_in_few_probes(peak: float) -> None:
    asked: list[float] = []

    def probe(rate: float, steps: int) -> float:
        asked.append(rate)
        return abs(math.log(rate / (0.02 * peak)))

    for lengths in ((15,), (15, 80)):
        asked.clear()
        assert find_rate(probe, 0.02, 9.0, lengths) == pytest.approx(0.02 * peak, rel=1e-3)
        assert len(asked) <= 3 + max(0, round(-math.log(peak, 3)))
    assert find_rate(lambda rate, _: math.inf if rate > 1e-3 else 1.0, 0.02, 2.0, (15,)) < 1e-3


def test_probes_that_better_nothing_give_way_to_longer_ones() -> None:
    """At first each step harms, the larger the more, as from a start that a refit has made good."""
    asked: list[tuple[float, int]] = []

    def probe(rate: float, steps: int) -> float:
        asked.append((rate, steps))
        return 1.0 + rate if steps < 80 else 1.0 - 20 * rate + 400 * rate**2

    assert find_rate(probe, 0.02, 1.0, probe_lengths(1240)) == pytest.approx(0.02)
    assert [steps for _, steps in asked] == [15, 15, 80, 80, 80]
    assert find_rate(probe, 0.02, 1.0, (15,)) < 0.001
    assert (probe_lengths(8), probe_lengths(40), probe_lengths(100)) == ((8,), (15,), (15, 25))


@pytest.mark.parametrize("kind", ["enlarge", "projection"])
def test_a_tuned_model_is_never_worse_than_the_repaired_one_on_the_held_back_samples(kind: str) -> None:
    w = enlarge() if kind == "enlarge" else world("projection", samples=256)
    evaluate = evaluator(w, calibration=256, finetune_steps=10)
    for share in (0.9, 0.5):
        plain, tuned = (evaluate(Ask(narrow(w, share), tier, split="heldback")) for tier in ("refit", "tune"))  # type: ignore[arg-type]
        assert tuned.ok
        assert tuned.loss <= plain.loss * (1 + 1e-6)


def test_the_usual_rate_that_would_harm_is_not_taken_and_the_found_one_depends_on_no_ask() -> None:
    w = enlarge(scale=0.1)  # a step of the usual size is a large part of such weights
    given = {"calibration": 256, "finetune_steps": 10}
    fresh, used = evaluator(w, **given), evaluator(w, **given)
    used(Ask(narrow(w, 0.9), "refit", split="heldback"))
    used.repaired(Ask(narrow(w, 0.5), "refit"))
    before = {k: v.clone() for k, v in used.stitcher.model.state_dict().items()}
    assert fresh.found_rate(10) == used.found_rate(10) < usual_rate(convolutional=False)
    assert all(torch.equal(before[k], v) for k, v in used.stitcher.model.state_dict().items()), "the probes left traces"
    told = evaluator(w, **given, learning_rate=fresh.found_rate(10))
    ask = Ask(narrow(w, 0.7), "tune")
    assert told(ask).loss == fresh(ask).loss


def test_a_training_that_diverges_leaves_the_repaired_model() -> None:
    w = enlarge()
    evaluate = evaluator(w, calibration=256, finetune_steps=10, learning_rate=10.0)
    evaluate.repaired(Ask(narrow(w), "refit"))
    before = {k: v.clone() for k, v in evaluate.stitcher.model.state_dict().items()}
    model, course = (
        evaluate.stitcher.model,
        Course(evaluate.stitcher.model, evaluate.lesson(10), 10, 0, recipe=Recipe(10)),
    )
    kept = keep_best(model, course, lambda: evaluate.held_back(model), checks(10))
    assert (kept.helped, kept.loss) == (False, kept.start)
    evaluate.stitcher.mark_dirty()
    model.requires_grad_(False)
    assert all(torch.equal(before[k], v) for k, v in evaluate.stitcher.model.state_dict().items())
    assert evaluate(Ask(narrow(w), "tune", split="validation")).ok
