"""Lottery tickets of weights: train, prune, go back, and again (Frankle & Carbin 2019, Frankle et al. 2020)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from autoprune.errors import InputError
from autoprune.evaluator.finetune import Course
from autoprune.policy import Policy
from autoprune.protocols import Progress, Task
from autoprune.recovery._distilled import WHERE, Distilled
from autoprune.recovery._early import Early
from autoprune.recovery._masking import Target, keep_masked, needed, read, stored, targets_of, unmasked, with_zeros
from autoprune.structure import Structure
from autoprune.tracing.copies import copied


class Lottery:
    """`rounds` times: train, keep by magnitude the same share of what is left of a matrix, and go back to `weights`.

    These are the early checkpoint of the dense model. After the last round each matrix has as many weights as the point
    keeps; the ticket so found is trained from the checkpoint too. All `rounds` + 1 trainings have an equal share of the
    steps, a course of their own and the same seed. Batch norms gather anew (norm_statistics: running).
    """

    def __init__(self, weights: Path | None = None, rounds: int = 3, course: Distilled | None = None) -> None:
        if isinstance(rounds, bool) or not isinstance(rounds, int) or not 1 <= rounds <= 100:
            raise InputError(f"{WHERE}: rounds must be a whole number from 1 to 100, not {rounds!r}")
        self._early, self._rounds = Early("lottery", weights), rounds
        self.course = replace(course or Distilled(), norm_statistics="running")

    def check(self, dense: nn.Module) -> None:
        """Read the checkpoint once, before any work.

        Raises:
            InputError: the file is damaged, or of another model than `dense`.
        """
        self._early.check(dense)

    def check_policy(self, structure: Structure, policy: Policy) -> None:
        """InputError where the policy leaves no zeros in any weight."""
        with_zeros(structure, policy, "lottery")

    def start(self, model: nn.Module) -> None:
        """Give a copy of the dense model the weights of the checkpoint, in place.

        Raises:
            InputError: the file is missing or of another model.
        """
        self._early.start(model)

    def __call__(self, model: nn.Module, dense: nn.Module, task: Task, steps: int, seed: int) -> Iterable[Progress]:
        """Train `model`, whose shapes are those of `dense`, in place, from the checkpoint on.

        Raises:
            ArithmeticError: the loss is not finite.
        """
        whole = copied(dense)
        self.start(whole)
        return self.thin(model, whole, dense, task, steps, seed)

    def thin(
        self, model: nn.Module, whole: nn.Module, dense: nn.Module, task: Task, steps: int, seed: int
    ) -> Iterable[Progress]:
        """Train `model` in place, from the weights of `whole` on: those of the checkpoint that it shares atoms with.

        Raises:
            ArithmeticError: the loss is not finite.
        """

        def make(steps: int) -> Course:
            return unmasked(self.course).course(model, dense, task, steps, seed)

        rounds = min(self._rounds, steps - 1)
        lengths = [steps // (rounds + 1)] * rounds
        return _Rounds(model, whole, make, [*lengths, steps - sum(lengths)], targets_of(model, dense, self.course))


class _Rounds:
    """Trainings of so many steps as `lengths` say, each from the weights of `whole` that are left."""

    def __init__(
        self,
        model: nn.Module,
        whole: nn.Module,
        make: Callable[[int], Course],
        lengths: Sequence[int],
        targets: Mapping[str, Target],
    ) -> None:
        self._model, self._whole, self._make, self._lengths = model, whole, make, lengths
        self._targets, self._masks = dict(targets), dict[str, Tensor]()
        self._round, self._samples = 0, 0
        self._course: Course | None = None

    @property
    def ready(self) -> bool:
        """Whether it is the ticket that trains."""
        return self._round == len(self._lengths) - 1

    def __iter__(self) -> Iterator[Progress]:
        """Train to the end of the last round, with a word after every step.

        Raises:
            InputError: the model has no masked weights.
            ArithmeticError: the loss is not finite.
        """
        if not self._targets:
            raise InputError(needed("lottery"))
        if self._course is None:
            self._go_back()
        while True:
            assert self._course is not None
            before = sum(self._lengths[: self._round])
            for progress in self._course:
                yield Progress(before + progress.step, progress.loss, self._samples + progress.samples)
            if self.ready:
                return
            self._samples += self._course.seen
            self._round += 1
            self._go_back()

    def state_dict(self) -> dict[str, Any]:
        """All but the weights that the model holds."""
        assert self._course is not None
        told = {"round": self._round, "samples": self._samples, "masks": self._masks}
        return {**told, "course": self._course.state_dict(), "targets": stored(self._targets)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where that of `state` stood."""
        self._round, self._samples, self._targets = state["round"], state["samples"], read(state["targets"])
        held = dict(self._model.named_parameters())
        self._masks = {name: mask.to(held[name].device) for name, mask in state["masks"].items()}
        self._course = self._begun()
        self._course.load_state_dict(state["course"])

    def _go_back(self) -> None:
        """Prune by the weights as they are now, before the first round by those of the start, and go back to that."""
        rounds = len(self._lengths) - 1
        if rounds == 0:
            self._model.load_state_dict(self._whole.state_dict())
        done = self._round / rounds if rounds else 1.0
        parameters = dict(self._model.named_parameters())
        if done > 0.0:
            for name, target in self._targets.items():
                n = parameters[name].numel()
                kept = target.kept if done == 1.0 else round(n * (target.kept / n) ** done)
                self._masks[name] = target.mask(parameters[name], kept, self._masks.get(name))
        self._model.load_state_dict(self._whole.state_dict())
        for name, mask in self._masks.items():
            keep_masked(self._model, name, mask)
        self._course = self._begun()

    def _begun(self) -> Course:
        course, masks = self._make(self._lengths[self._round]), dict(self._masks)
        course.follow(lambda step, *_: masks if step == 0 else None)
        return course
