"""The evaluator: exact for the dense policy, the same whatever came before, honest about failures."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from autoprune import plugins
from autoprune.database.batches import Parts, digest, take
from autoprune.database.build import build_database
from autoprune.errors import InputError
from autoprune.evaluation import Ask
from autoprune.evaluator.memory import NoRoomError, is_out_of_memory, with_room
from autoprune.evaluator.settings import Settings
from autoprune.evaluator.tiers import TieredEvaluator
from autoprune.policy import Policy
from autoprune.protocols import Batch
from autoprune.run.ledger import Prices
from tests.small import RandomTask, World, world, world_of

SETTINGS = Settings(calibration=64, validation=32, finetune_steps=3, batch_size=16, device="cpu")


def evaluator(w: World, **changes: object) -> TieredEvaluator:
    database = build_database(w.model, w.structure, w.seen, plugins.load("criteria", "obs")())
    return TieredEvaluator(w.task, w.structure, database, replace(SETTINGS, **changes))  # type: ignore[arg-type]


def narrow(w: World, share: float = 0.5) -> Policy:
    return Policy.of({g.name: max(g.grid[0], int(share * g.width)) for g in w.structure.groups})


@pytest.mark.parametrize("loss", plugins.names("losses"))
@pytest.mark.parametrize("tier", ["stitch", "refit"])
def test_the_dense_policy_scores_exactly_as_the_dense_model(tier: str, loss: str) -> None:
    w = world("projection")
    evaluate = evaluator(w, loss=loss)
    for split in ("fitness", "heldback", "validation"):
        e = evaluate(Ask(Policy.dense(w.structure), tier, split=split))  # type: ignore[arg-type]
        assert abs(e.loss) <= 1e-7
        assert set(e.costs.values()) == {1.0}
    assert e.metrics == dict(w.task.metrics(w.model, evaluate.batches("validation")))


def test_an_evaluation_does_not_depend_on_what_was_evaluated_before() -> None:
    w = world("projection")
    evaluate = evaluator(w)
    asks = [
        Ask(narrow(w), "stitch"),
        Ask(narrow(w, 0.7), "tune"),
        Ask(narrow(w), "refit", 0.5),
        Ask(narrow(w, 0.3), "tune", split="validation"),
        Ask(narrow(w), "refit"),
    ]
    first = [evaluate(a).loss for a in asks]
    assert [evaluate(a).loss for a in reversed(asks)][::-1] == first
    assert [evaluator(w)(a).loss for a in asks] == first


class Counting(RandomTask):
    """Notes on how many threads its model runs."""

    seen: ClassVar[set[int]] = set()

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        self.seen.add(torch.get_num_threads())
        return super().outputs(model, batch)


def test_everything_is_computed_on_one_thread_and_the_callers_number_comes_back() -> None:
    w = world("projection")
    w = replace(w, task=Counting(w.task.model, w.task.shape))
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        seen = replace(w.seen, task=w.task)
        database = build_database(w.model, w.structure, seen, plugins.load("criteria", "obs")())
        evaluate = TieredEvaluator(w.task, w.structure, database, SETTINGS)
        for ask in (Ask(narrow(w), "stitch"), Ask(narrow(w), "tune", split="validation")):
            assert evaluate(ask).ok
        evaluate.standing("heldback")
        assert (Counting.seen, torch.get_num_threads()) == ({1}, 2)
    finally:
        torch.set_num_threads(before)


def test_passes_count_samples_and_a_backward_pass_counts_two() -> None:
    w = world("projection")
    evaluate = evaluator(w)
    assert evaluate(Ask(narrow(w), "stitch")).passes == 0.5
    assert evaluate(Ask(narrow(w), "stitch", 0.5)).passes == 0.25
    assert evaluate(Ask(narrow(w), "refit")).passes == 0.75
    assert evaluate(Ask(narrow(w), "tune")).passes == 0.75 + 3 * 3 * 64 / 64 + 4 * 16 / 64, "held-back samples too"


def test_a_task_metric_can_be_the_loss_in_either_direction() -> None:
    w = world("projection")
    best = evaluator(w, metric="accuracy", direction="maximize")
    assert best(Ask(Policy.dense(w.structure), "refit")).loss == -1.0
    assert evaluator(w, metric="accuracy", direction="minimize")(Ask(Policy.dense(w.structure), "stitch")).loss == 1.0
    with pytest.raises(InputError, match="the task has no metric 'acuracy'; did you mean 'accuracy'"):
        evaluator(w, metric="acuracy", direction="maximize")(Ask(Policy.dense(w.structure), "refit"))


def test_a_loss_that_is_not_a_number_fails_that_candidate_and_no_other() -> None:
    w = world("plain")
    evaluate = evaluator(w)
    good = evaluate(Ask(narrow(w), "refit"))
    evaluate.stitcher.dense["fc1.weight"][0, 0] = float("nan")
    evaluate.stitcher.mark_dirty({"fc1.weight"})
    bad = evaluate(Ask(Policy.dense(w.structure), "stitch"))
    assert (bad.ok, bad.loss) == (False, float("inf"))
    assert "nan" in str(bad.error)
    evaluate.stitcher.dense["fc1.weight"].copy_(w.model.state_dict()["fc1.weight"])
    assert evaluate(Ask(narrow(w), "refit")).loss == good.loss


def test_the_calibration_parts_are_disjoint_and_cover_the_samples() -> None:
    task = world("plain").task
    parts = Parts.of(task, 64, 16)
    rows = [digest([take(b, torch.tensor([i]))]) for b in parts.all() for i in range(len(b[0]))]
    assert (parts.statistics.sizes, parts.fitness.samples) == ((16,), 32)
    assert len(rows) == len(set(rows)) == 64


def test_a_calibration_split_that_is_too_small_is_one_clear_line() -> None:
    w = world("plain")
    with pytest.raises(InputError, match="the calibration split has 4 samples; at least 8 are needed"):
        Parts.of(RandomTask(w.model, w.task.shape, samples=4), 64)


def test_fine_tuning_is_seeded_and_trains_every_parameter() -> None:
    w = world("projection")
    evaluate = evaluator(w, finetune_steps=5)
    ask = Ask(narrow(w), "tune")
    loss = evaluate(ask).loss
    tuned = {n: p.detach().clone() for n, p in evaluate.stitcher.model.named_parameters()}
    evaluate.repaired(Ask(narrow(w), "refit"))
    assert all(not torch.equal(p, tuned[n]) for n, p in evaluate.stitcher.model.named_parameters())
    assert not any(p.requires_grad for p in evaluate.stitcher.model.parameters())
    assert evaluator(w, finetune_steps=5)(ask).loss == loss


def test_dropout_in_the_fine_tune_is_seeded_and_global_chance_is_left_alone() -> None:
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 4))
    w = world_of(model.eval(), (6,), 64)
    evaluate, ask = evaluator(w, finetune_steps=5), Ask(narrow(w), "tune")
    chance = torch.get_rng_state()
    first = evaluate(ask).loss
    torch.rand(3)
    assert evaluate(ask).loss == first
    torch.set_rng_state(chance)
    evaluate(ask)
    assert torch.equal(torch.get_rng_state(), chance)


def test_a_metric_that_is_not_finite_fails_the_candidate() -> None:
    class Infinite(RandomTask):
        def metrics(self, model: nn.Module, batches: Iterable[Batch]) -> Mapping[str, float]:
            return {"perplexity": float("inf")}

    w = world("plain")
    w = replace(w, task=Infinite(w.task.model, w.task.shape, 64))
    e = evaluator(w)(Ask(narrow(w), "refit", split="validation"))
    assert e.error == "the metric perplexity is inf"


@pytest.mark.parametrize("loss", ["kl", "mse", "cosine"])
def test_on_validation_the_losses_of_single_samples_are_kept_in_order(loss: str) -> None:
    w = world("projection")
    evaluate = evaluator(w, loss=loss)
    e = evaluate(Ask(narrow(w), "refit", split="validation"))
    assert len(e.sample_losses) == 32
    assert np.mean(e.sample_losses) == pytest.approx(e.loss, rel=1e-5)
    with torch.no_grad():
        last = evaluate.batches("validation")[-1][0]
        outputs, dense = evaluate.stitcher.model(last), w.model(last)
    expected = plugins.load("losses", loss)(outputs, dense, classes=-1).tolist()
    assert e.sample_losses[-len(last) :] == pytest.approx(expected, rel=1e-3, abs=1e-6)
    assert not evaluate(Ask(narrow(w), "refit")).sample_losses
    assert not evaluate(Ask(narrow(w), "refit", split="heldback")).sample_losses
    metric = evaluator(w, metric="accuracy", direction="maximize")
    assert not metric(Ask(narrow(w), "refit", split="validation")).sample_losses


@pytest.mark.parametrize("tier", ["stitch", "refit"])
def test_constraints_see_metrics_of_full_fitness_evaluations_and_pay_for_them(tier: str) -> None:
    w = world("projection")
    plain, watched = evaluator(w), evaluator(w, metrics_on_fitness=True)
    ask, part = Ask(narrow(w), tier), Ask(narrow(w), tier, 0.5)  # type: ignore[arg-type]
    a, b = plain(ask), watched(ask)
    assert (a.loss, dict(a.metrics), set(b.metrics)) == (b.loss, {}, {"accuracy"})
    assert b.passes - a.passes == (0.0 if tier == "refit" else 0.75)
    assert watched(part).metrics == {}
    assert set(watched(Ask(narrow(w), tier, split="heldback")).metrics) == {"accuracy"}  # type: ignore[arg-type]


class Stubborn(RandomTask):
    """Metrics over inputs that the loss has not seen."""

    def metrics(self, model: nn.Module, batches: Iterable[Batch]) -> Mapping[str, float]:
        return super().metrics(model, [(x + 0.0 * x.mean() + 1e-3, y) for x, y in batches])


@pytest.mark.parametrize("split", ["fitness", "heldback"])
def test_metrics_read_the_outputs_of_the_loss_and_are_what_a_pass_of_their_own_would_find(split: str) -> None:
    w = world("projection")
    watched = evaluator(w, metrics_on_fitness=True)
    e = watched(Ask(narrow(w), "refit", split=split))  # type: ignore[arg-type]
    assert e.metrics == watched._metrics(watched.batches(split), split)  # type: ignore[arg-type]
    assert e.loss == watched.fidelity(watched.batches(split), split)  # type: ignore[arg-type]
    assert watched.stitcher.model.forward.__func__ is type(watched.stitcher.model).forward
    other = evaluator(replace(w, task=Stubborn(w.task.model, w.task.shape)), metrics_on_fitness=True)
    again = other(Ask(narrow(w), "refit", split=split))  # type: ignore[arg-type]
    assert again.loss == e.loss
    assert again.passes == e.passes + (0.5 if split == "fitness" else 0.25), "what ran again is counted"


@pytest.mark.parametrize("loss", ["kl", "accuracy"])
@pytest.mark.parametrize("tier", ["stitch", "refit"])
@pytest.mark.parametrize("split", ["fitness", "heldback", "validation"])
def test_the_ledger_prices_what_an_evaluation_sends_through_the_network(loss: str, tier: str, split: str) -> None:
    w = world("projection")
    searched = {} if loss == "kl" else {"metric": loss, "direction": "maximize"}
    watched = evaluator(w, metrics_on_fitness=True, **searched)
    price = Prices(16, 32, 16, 32, 3 * 64, True, bool(searched))
    for fraction in (1.0, 0.5):
        ask = Ask(narrow(w), tier, fraction, split)  # type: ignore[arg-type]
        assert watched(ask).passes * 64 == price.samples(ask)


class Greedy(RandomTask):
    """Runs out of memory where more than `most` samples go through at once."""

    most = 64

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        if len(batch[0]) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return super().outputs(model, batch)


def greedy(w: World, most: int) -> World:
    task = Greedy(w.task.model, w.task.shape, w.task.samples)
    object.__setattr__(task, "most", most)
    return replace(w, task=task)


def test_where_memory_runs_out_smaller_batches_give_the_same_result() -> None:
    w = world("projection", samples=128)
    database = build_database(w.model, w.structure, w.seen, plugins.load("criteria", "obs")())
    settings = replace(SETTINGS, calibration=128, batch_size=64)
    roomy = TieredEvaluator(w.task, w.structure, database, settings)
    tight = TieredEvaluator(greedy(w, 32).task, w.structure, database, settings)
    for ask in (Ask(narrow(w), "refit"), Ask(narrow(w), "refit", split="validation"), Ask(narrow(w, 0.7), "tune")):
        assert tight(ask).loss == pytest.approx(roomy(ask).loss, rel=1e-2)
    assert (tight.samples.batch_size, len(tight.batches("fitness"))) == (32, 2)
    assert (roomy.samples.batch_size, len(roomy.batches("fitness"))) == (64, 1)


def test_samples_that_belong_together_go_in_parts_where_memory_runs_out_and_results_stay() -> None:
    w = world("projection", samples=128)
    database = build_database(w.model, w.structure, w.seen, plugins.load("criteria", "obs")())
    settings = replace(SETTINGS, calibration=128, batch_size=64)
    asks = [Ask(narrow(w), "refit"), Ask(narrow(w), "stitch"), Ask(narrow(w), "stitch", split="heldback")]
    roomy = TieredEvaluator(w.task, w.structure, database, settings)
    expected = [roomy(ask) for ask in asks]
    tight = TieredEvaluator(greedy(w, 20).task, w.structure, database, settings)
    found = [tight(ask) for ask in asks]
    assert [e.loss for e in found] == pytest.approx([e.loss for e in expected], rel=1e-3)
    assert [e.passes for e in found] == [e.passes for e in expected]
    assert (tight.samples.at_once, len(tight.samples.seen.batches), tight.samples.statistics.samples) == (16, 2, 32)
    assert tight(Ask(Policy.dense(w.structure), "refit")).loss <= 1e-7


def test_what_fits_into_the_evaluators_memory_goes_through_at_once() -> None:
    w = world("projection", samples=128)
    database = build_database(w.model, w.structure, w.seen, plugins.load("criteria", "obs")())
    roomy, tight = (
        TieredEvaluator(w.task, w.structure, database, replace(SETTINGS, calibration=128, memory=memory))
        for memory in (1 << 30, 1 << 19)
    )
    assert (len(roomy.samples.seen.batches), len(tight.samples.seen.batches)) == (1, 4)
    assert (roomy.samples.batch_size, tight.samples.batch_size) == (16, 8)
    for tier in ("stitch", "refit"):
        ask = Ask(narrow(w), tier)  # type: ignore[arg-type]
        assert tight(ask).loss == pytest.approx(roomy(ask).loss, rel=1e-3)
        assert tight(Ask(Policy.dense(w.structure), tier)).loss <= 1e-7  # type: ignore[arg-type]


def test_statistics_that_do_not_fit_are_halved_and_that_is_said() -> None:
    w = world("projection", samples=128)
    database = build_database(w.model, w.structure, w.seen, plugins.load("criteria", "obs")())
    evaluate = TieredEvaluator(greedy(w, 64).task, w.structure, database, replace(SETTINGS, calibration=128))
    object.__setattr__(evaluate.task, "most", 7)  # less room than there was at the start
    said = (f"the {n} statistics samples do not fit in memory at once: the first {n // 2}" for n in (16, 32))
    with pytest.warns(UserWarning, match=next(said)), pytest.warns(UserWarning, match=next(said)):
        e = evaluate(Ask(narrow(w), "refit"))
    assert "the smallest batch does not fit in memory: OutOfMemoryError: CUDA out of memory" in str(e.error)


class Moody(RandomTask):
    """Runs a model twice where the first value of a batch is above nothing."""

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        if batch[0].flatten()[0] > 0:
            super().outputs(model, batch)
        return super().outputs(model, batch)


def test_a_model_that_does_not_run_alike_on_all_samples_is_repaired_by_one_batch_and_that_is_said() -> None:
    w = world("projection", samples=128)
    w = replace(w, task=Moody(w.task.model, w.task.shape, 128))
    database = build_database(w.model, w.structure, w.seen, plugins.load("criteria", "obs")())
    evaluate = TieredEvaluator(w.task, w.structure, database, replace(SETTINGS, calibration=128, memory=1 << 19))
    starts = [float(batch[0].flatten()[0]) > 0 for batch in evaluate.samples.seen.batches]
    assert len(set(starts)) == 2
    with pytest.warns(UserWarning, match="the model does not run alike on all statistics samples: 32 of one"):
        assert evaluate(Ask(narrow(w), "refit")).ok
    assert len(evaluate.samples.seen.batches) == 1


def test_only_a_lack_of_memory_is_met_with_smaller_batches() -> None:
    assert is_out_of_memory(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to"))
    assert is_out_of_memory(RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes."))
    assert is_out_of_memory(RuntimeError("GET was unable to find an engine to execute this computation"))
    assert is_out_of_memory(RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(NoRoomError):
        with_room(lambda: torch.empty(1 << 60), lambda: False)
    with pytest.raises(RuntimeError, match="shapes"):
        with_room(lambda: torch.ones(2, 3) @ torch.ones(2, 3), lambda: True)


def test_memory_is_flat_over_many_candidates() -> None:
    w, rng = world("projection"), np.random.default_rng(0)
    evaluate, held = evaluator(w), []
    for group in w.structure:  # what is made once and kept
        for width in group.grid:
            evaluate.stitcher.stitch(Policy.of({**dict(Policy.dense(w.structure).widths), group.name: width}))
    for i in range(1, 161):
        policy = Policy.of({g.name: int(rng.choice(g.grid)) for g in w.structure.groups})
        evaluate(Ask(policy, "refit" if i % 3 else "stitch", 0.5))
        if i in (40, 160):
            gc.collect()
            held.append(sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects()))
    assert held[1] <= held[0] + 5
