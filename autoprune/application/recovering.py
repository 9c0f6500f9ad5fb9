"""The full recovery of a pruned model: its trainings one after the other, each kept while it runs."""

from __future__ import annotations

import json
import math
import time
import warnings
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from autoprune import plugins
from autoprune.application.bench import REPAIR, Bench, Kept
from autoprune.application.checkpoints import Place, Saved
from autoprune.application.training import Training
from autoprune.database.drawn import samples_in
from autoprune.errors import RunError
from autoprune.evaluator.keep_best import Best, checks, copied, restore
from autoprune.evaluator.material import BATCH_SIZE
from autoprune.evaluator.tiers import TieredEvaluator
from autoprune.policy import Policy
from autoprune.protocols import (
    PathRecovery,
    Progress,
    Resumable,
    RewoundRecovery,
    SparseRecovery,
    Step,
    ThinningRecovery,
)
from autoprune.recovery import Watched, build_recovery, takes
from autoprune.structure import Group
from autoprune.tracing.copies import copied as model_copy
from autoprune.tracing.rounding import round_weights
from autoprune.tracing.slim import slim
from autoprune.tracing.verify import masked

FULL_EPOCHS = 10.0
OFTEN_S = 300.0
"""Seconds after which a training is kept, where its options do not say after how many steps."""
RATE = "learning_rate"


@dataclass(frozen=True)
class Recovered:
    """The model, its kept atoms, what trained it (the recipe), and how it went: for apply.json."""

    model: nn.Module
    keep: Kept
    recipe: Mapping[str, Any]
    course: Mapping[str, Any]


@dataclass(frozen=True)
class _Part:
    """One training: its steps and seed, and the policy that is cut to before it; None trains the dense model."""

    steps: int
    seed: int
    policy: Policy | None


@dataclass
class _State:
    """What is known so far of a recovery, in plain values; a checkpoint holds it, and so says where to go on."""

    part: int = 0
    finished: bool = False
    rate: float | None = None
    keep: Kept | None = None
    before: Mapping[str, Any] | None = None
    history: list[list[float]] = field(default_factory=list)


def recovering(
    evaluator: TieredEvaluator, bench: Bench, policy: Policy, keep: Kept, training: Training, place: Place | None
) -> Generator[Step, None, Recovered]:
    """Cut to `policy` and train as the recovery of `training` says; `keep` are the atoms that `evaluator` keeps.

    What is returned is never worse on the held-back samples than what the last training was given. With a `place` the
    trainings are kept there, and what it holds is gone on from: the weights are those of an uninterrupted call.

    Raises:
        RunError: a training of the dense model diverges, or the disk is full.
        InputError: what the recovery refuses.
    """
    recovery = build_recovery(training.recovery, training.options)
    epochs = training.epochs
    if epochs is None:
        own = None if recovery.course is None else recovery.course.epochs
        epochs = FULL_EPOCHS if own is None else own
    if epochs == 0.0:
        yield Step(REPAIR)
        return Recovered(bench.settled(evaluator, policy, keep), keep, {}, {})
    each, n = BATCH_SIZE, samples_in(bench.task.split("train"))
    if recovery.course is not None:
        each = min(recovery.course.samples_a_step, n)  # a step takes no sample twice
    steps = max(1, round(epochs * n / each))
    found = None if place is None else place.found()
    session = _Session(evaluator, bench, recovery, policy, keep, place, found)
    yield from session.find_rate(training, steps)
    model = yield from session.train(steps)
    state, kept = session.state, session.best.kept
    assert state.keep is not None
    if not kept.helped:
        before = "as it was before them" if len(session.parts) > 1 else "as repaired"
        said = f"{session.parts[-1].steps} steps of training did not make the model better, so it is {before}"
        warnings.warn(said, stacklevel=2)
    told = {"recipe": "full", "schedule": training.recovery, "steps": steps, "epochs": epochs, "seed": session.seed}
    rate = {} if session.rate is None else {RATE: session.rate}
    more = {name: value for name, value in training.options.items() if name not in (RATE, "epochs")}
    options = {"options": json.loads(json.dumps(more, default=str))} if more else {}
    heldback = [[step, loss if math.isfinite(loss) else None] for step, loss in session.best.history]
    course = {"before": state.before, "heldback": heldback, "kept_step": kept.step}
    return Recovered(model, state.keep, {**told, **rate, **options, "helped": kept.helped}, course)


class _Session:
    """One recovery of one point under way."""

    best: Best
    parts: Sequence[_Part]

    def __init__(
        self,
        evaluator: TieredEvaluator,
        bench: Bench,
        recovery: Watched,
        policy: Policy,
        keep: Kept,
        place: Place | None,
        found: Saved | None,
    ) -> None:
        self._evaluator, self._bench, self._policy, self._keep = evaluator, bench, policy, keep
        self._recovery, self._place, self._found = recovery, place, found
        self.seed = bench.settings.seed
        self.state = _State() if found is None else _State(**found.facts)
        self._kept_at = time.monotonic()

    @property
    def rate(self) -> float | None:
        """The peak learning rate, given or found, where there is such a thing."""
        course = self._recovery.course
        return self.state.rate if course is None else course.learning_rate

    def find_rate(self, training: Training, steps: int) -> Generator[Step, None, None]:
        """The peak learning rate that the options leave open, by probes at half of every width."""
        course, evaluator = self._recovery.course, self._evaluator
        if course is not None and course.learning_rate is not None:
            return
        if course is not None:
            if self.state.rate is None:
                yield Step("peak rate")
                lesson = course.lesson(self._bench.dense, self._bench.task, steps, self.seed)
                probe = partial(course.probe, evaluator.stitcher.model, lesson, self.seed)
                self.state.rate = evaluator.probed_rate(probe, course.usual_rate, steps)
            self._recovery.at_rate(self.state.rate)
        elif takes(training.recovery, RATE) and RATE not in training.options:
            yield Step("peak rate")
            self.state.rate = self.state.rate or evaluator.found_rate(steps)
            self._recovery = build_recovery(training.recovery, {**training.options, RATE: self.state.rate})

    def train(self, steps: int) -> Generator[Step, None, nn.Module]:
        """All trainings from where they stand; the model with the best weights of the last one."""
        self.parts, source = self._planned(steps), self._bench.dense
        before, model = sum(part.steps for part in self.parts[: self.state.part]), source
        for number, part in enumerate(self.parts):
            if number < self.state.part:
                continue
            if self._found is None:
                self.state = _State(number, False, self.state.rate, self.state.keep)
                model = yield from self._cut(part, source)
            else:
                model = self._again(part)
            yield from self._part(number, part, model, before)
            self._found, before = None, before + part.steps
            if number < len(self.parts) - 1:
                source = model
                if part.policy is not None:
                    source = masked(self._bench.dense, model, self._bench.structure, self.state.keep or {})
        return model

    def _planned(self, steps: int) -> Sequence[_Part]:
        made, seed = self._recovery.recovery, self.seed
        if callable(getattr(made, "path", None)) and isinstance(made, PathRecovery):
            with self._told():
                path = [*made.path(self._bench.structure, self._policy)]
            each = max(1, steps // len(path))
            parts = [_Part(each, seed + i, policy) for i, policy in enumerate(path[:-1])]
            return [*parts, _Part(max(1, steps - each * len(parts)), seed, path[-1])]
        if callable(getattr(made, "before", None)) and isinstance(made, SparseRecovery):
            first = max(1, int(made.share * steps))
            return [_Part(first, seed, None), _Part(max(1, steps - first), seed, self._policy)]
        return [_Part(steps, seed, self._policy)]

    def _cut(self, part: _Part, source: nn.Module) -> Generator[Step, None, nn.Module]:
        """What a part trains: `source` cut as it says, or as it is."""
        bench, made = self._bench, self._recovery.recovery
        if part.policy is None:
            return model_copy(source)
        if len(self.parts) > 1 or isinstance(made, PathRecovery):
            evaluator, self.state.keep = yield from bench.cutter(source, part.policy, self.state.keep)
            return self._settled(evaluator, part.policy, self.state.keep)
        self.state.keep = self._keep
        thins = callable(getattr(made, "thin", None))  # it is given the early weights beside the model of the point
        if callable(getattr(made, "start", None)) and isinstance(made, RewoundRecovery) and not thins:
            if not self._thinned():
                return self._early(made)
            yield Step(REPAIR)
            self._settled(self._evaluator, part.policy, self._keep)
            early, masks = self._early(made), self._evaluator.stitcher.masks
            with torch.no_grad():
                for name, parameter in early.named_parameters():
                    if name in masks:
                        parameter.masked_fill_(~masks[name], 0.0)
            return early
        yield Step(REPAIR)
        return self._settled(self._evaluator, part.policy, self._keep)

    def _settled(self, evaluator: TieredEvaluator, policy: Policy, keep: Kept) -> nn.Module:
        """The model at `policy`; the recovery is told its masks."""
        model = self._bench.settled(evaluator, policy, keep)
        patterns = {name: g.pattern for g in self._bench.structure if g.kind == "weight" for name in g.matrices}
        self._recovery.at_point(evaluator.stitcher.masks, patterns)
        return model

    def _early(self, made: RewoundRecovery) -> nn.Module:
        """The model with the weights that its recovery goes back to, all those of the atoms that are kept."""
        early = model_copy(self._bench.dense)
        with self._told():
            made.start(early)
        slim(early, self._bench.structure, self._keep)
        round_weights(early, self._bench.structure, self._policy.as_dict())
        return self._bench.bare(self._keep, early)

    def _thinned(self) -> list[Group]:
        """The groups of weights that the point has fewer of."""
        widths = self._policy.as_dict()
        return [g for g in self._bench.structure if g.kind == "weight" and widths[g.name] < g.width]

    def _whole(self) -> nn.Module | None:
        """What a recovery that finds masks of its own starts from; None for others."""
        made = self._recovery.recovery
        if not callable(getattr(made, "thin", None)) or not isinstance(made, ThinningRecovery):
            return None
        if callable(getattr(made, "start", None)) and isinstance(made, RewoundRecovery):
            return self._early(made)
        widths = {**self._policy.as_dict(), **{g.name: g.width for g in self._thinned()}}
        return self._bench.settled(self._evaluator, Policy.of(widths), self._keep)

    def _again(self, part: _Part) -> nn.Module:
        """The model of the part that a checkpoint is of, as it was then."""
        assert self._found is not None
        keep = self.state.keep
        model = model_copy(self._bench.dense) if part.policy is None else self._bench.bare(keep or {})
        restore(model, self._found.tensors["model"])
        return model

    def _part(self, number: int, part: _Part, model: nn.Module, before: int) -> Generator[Step, None, None]:
        """One training, to its end; the model is left with its best weights, but for the dense one's."""
        state, found, total = self.state, self._found, sum(p.steps for p in self.parts)
        if number == len(self.parts) - 1 and state.before is None:
            yield Step("scores")
            state.before = self.figures(model)
        self.best = self._best(part, model)
        if state.finished:
            self.best.finish()
            return
        training = self._begun(part, model)
        if found is not None and isinstance(training, Resumable):
            training.load_state_dict(found.state)
        going = () if self._is_idle() else self._recovery.watched(training, model)
        try:
            for progress in going:
                ready = part.policy is not None and getattr(training, "ready", True)
                scored = ready and self.best.look(progress.step)
                self._keep_it(model, training, scored, progress)
                yield Step("training", before + progress.step, total, "steps", 0.0)
                if scored and self._is_idle():
                    break
        except ArithmeticError as error:
            self._diverged(number, part, error)
        if part.policy is not None:
            self.best.finish()
        model.requires_grad_(False)
        state.finished = True
        self._save(model, {})

    def _begun(self, part: _Part, model: nn.Module) -> Iterable[Progress]:
        bench, made = self._bench, self._recovery.recovery
        if part.policy is not None:
            return self._recovery.begun(model, bench.dense, bench.task, part.steps, part.seed, self._whole())
        assert isinstance(made, SparseRecovery)
        with self._told():
            return made.before(model, bench.dense, bench.structure.groups, bench.task, part.steps, part.seed)

    def _best(self, part: _Part, model: nn.Module) -> Best:
        """What keeps the best weights: of the dense model under a penalty nothing is looked at, as it gets worse."""
        course = self._recovery.course
        stops = checks(part.steps) if course is None else checks(part.steps, course.scorings)
        if part.policy is None:
            return Best(model, lambda: 0.0, ())
        score = partial(self._evaluator.held_back, model)
        if self._found is not None and self.state.history:
            history = [(int(step), loss) for step, loss in self.state.history]
            return Best.of(model, score, stops, history, self._found.tensors["best"])
        return Best(model, score, stops)

    def _is_idle(self) -> bool:
        """Whether the training is to stop: it got no better for as many scorings as its options say."""
        course = self._recovery.course
        return course is not None and course.patience is not None and self.best.idle >= course.patience

    def _keep_it(self, model: nn.Module, training: Iterable[Progress], scored: bool, progress: Progress) -> None:
        """Keep the training where that is due."""
        if self._place is None or not isinstance(training, Resumable):
            return
        every = None if self._recovery.course is None else self._recovery.course.checkpoint_every
        long = time.monotonic() - self._kept_at > OFTEN_S if every is None else progress.step % every == 0
        if scored or long:
            self._save(model, training.state_dict())

    def _save(self, model: nn.Module, state: Mapping[str, Any]) -> None:
        if self._place is None:
            return
        self.state.history = [list(pair) for pair in self.best.history]
        saved = Saved(asdict(self.state), {"model": copied(model), "best": self.best.weights}, state)
        if not self._place.keep(saved):
            self._place = None
        self._kept_at = time.monotonic()

    def _diverged(self, number: int, part: _Part, error: ArithmeticError) -> None:
        """A loss is no number any more: what was best is kept, where there is such a thing."""
        advice = "set a lower recovery.options.learning_rate"
        if part.policy is None:
            raise RunError(f"the training before the cut diverged ({error}); {advice}") from error
        when = f" {number + 1} of {len(self.parts)}" if len(self.parts) > 1 else ""
        said = f"training{when} diverged ({error}), so its best weights before that count; {advice}"
        warnings.warn(said, stacklevel=2)

    def figures(self, model: nn.Module) -> dict[str, Any]:
        """Loss and metrics on validation."""
        score = self._evaluator.standing_of(model, "validation")
        return {"loss": score.loss, "metrics": dict(score.metrics)}

    def _told(self) -> Any:
        """What a recovery does wrong names it."""
        return plugins.calling(
            "recovery", self._recovery.name, "before its last training", spared=(ArithmeticError, RunError)
        )
