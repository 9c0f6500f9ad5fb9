"""The pass over the samples: few groups at a time where their Grams are too many, to the same numbers."""

from __future__ import annotations

import pytest
import torch

from autoprune import plugins
from autoprune.database import build as rooms
from autoprune.database.build import Ingredients, Plan, collecting
from autoprune.protocols import Step
from autoprune.tracing.wiring import find_sites
from tests.small import World, world


def made(w: World, most: int | None, done: tuple[str, ...] = ()) -> tuple[dict[str, Ingredients], list[Step]]:
    criterion = plugins.load("criteria", "obs")()
    items = list(collecting(w.model, w.structure, w.seen, criterion, done=done, most=most))
    parts = {item.group.name: item for item in items if isinstance(item, Ingredients)}
    return parts, [item for item in items if isinstance(item, Step)]


@pytest.mark.parametrize("family", ["plain", "mobilenet"])
def test_a_group_at_a_time_has_the_grams_of_all_at_once(family: str) -> None:
    w = world(family)
    (whole, short), (few, long) = made(w, None), made(w, 1)
    assert list(whole) == list(few) == list(w.structure.names)
    for name, part in whole.items():
        assert len(part.consumers) == len(few[name].consumers)
        for a, b in zip(part.consumers, few[name].consumers, strict=True):
            assert torch.equal(a.second, b.second)
            assert torch.equal(a.share, b.share)
        assert part.scores is None or torch.equal(part.scores, few[name].scores)
    batches = w.seen.statistics.cut_to(w.seen.batch_size)
    plan = Plan.of(w.model, w.structure.groups, find_sites(w.model, w.task.example_inputs()))
    passes = len(plan.parts(w.structure.groups, 1))
    assert passes > 2
    assert len(long) - 1 == passes * len(batches), "and the step before all"
    assert len(short) - 1 == len(batches)
    assert (long[-1].done, long[-1].total) == (len(long) - 1, len(long) - 1)


def test_what_is_there_is_not_gathered_again() -> None:
    w = world("plain")
    parts, steps = made(w, 1, done=w.structure.names[:-1])
    assert list(parts) == [w.structure.names[-1]]
    assert len(steps) - 1 == len(w.seen.statistics.cut_to(w.seen.batch_size))


def test_groups_share_a_pass_as_long_as_their_grams_fit() -> None:
    w = world("mobilenet")
    plan = Plan.of(w.model, w.structure.groups, find_sites(w.model, w.task.example_inputs()))
    total = sum(plan.sizes.values())
    for most in (1, total // 3, total // 2, total):
        parts = plan.parts(w.structure.groups, most)
        assert [g.name for part in parts for g in part] == list(w.structure.names)
        for part in parts:
            held = sum(plan.sizes[name] for name in {n for g in part for n in plan.wanted[g.name]})
            assert held <= max(most, *(sum(plan.sizes[n] for n in plan.wanted[g.name]) for g in part), 0)
    assert len(plan.parts(w.structure.groups, total)) == 1
    assert rooms.GRAM_SHARE > 1
