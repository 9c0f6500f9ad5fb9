"""Masks that move while a model trains: how many weights of each matrix stay, read from the pruned model's zeros."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import astuple, dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from autoprune.database.masking import in_runs, most
from autoprune.database.zeros import masked_weights
from autoprune.errors import InputError
from autoprune.evaluator.finetune import Course, Masks
from autoprune.matrices import numbers_of
from autoprune.policy import Policy
from autoprune.protocols import Progress
from autoprune.recovery._distilled import COUNT, WHERE, Distilled
from autoprune.structure import Group, Structure
from autoprune.tracing.rounding import is_rounded, nearest, output_dim


@dataclass(frozen=True)
class Target:
    """`kept` weights of a matrix stay; with a pattern `each` of every `of` inputs (dimension `dim`), side by side."""

    kept: int
    each: int = 0
    of: int = 0
    dim: int = 1

    def mask(self, weight: Tensor, kept: int, held: Tensor | None = None) -> Tensor:
        """The `kept` largest weights among those that are `held`; what breaks the pattern, if any, goes first."""
        sizes = weight.detach().abs()
        if self.of:
            channels = sizes.movedim(self.dim, -1).contiguous()
            fits = in_runs(channels, self.each, self.of).movedim(-1, self.dim)
            sizes = torch.where(fits, sizes + 2 * sizes.max() + 1.0, sizes)
        return largest(sizes, kept, held)


def targets_of(model: nn.Module, dense: nn.Module, course: Distilled) -> dict[str, Target]:
    """What each masked weight of a pruned model keeps: as the point of `course` says, else by its zeros, patterns none.

    Zeros alone show no pattern: a few that lie by chance look like n of some m.
    """
    point, found, alive = course.point or {}, dict[str, Target](), course.masks_for(model, dense)
    if course.point is None:
        alive = {name: model.get_parameter(name).detach() != 0 for name in masked_weights(model, dense)}
    for name, mask in sorted(alive.items()):
        pattern = point[name].pattern if name in point else ""
        each, of = numbers_of(pattern) if pattern else (0, 0)
        found[name] = Target(int(mask.sum()), each, of, 1 - _outputs(model, name))
    return found


def unmasked(course: Distilled) -> Distilled:
    """The same without the masks of a point, for a model that has all its weights when it begins."""
    return replace(course, point=None)


def _outputs(model: nn.Module, name: str) -> int:
    """The dimension of a weight that counts its outputs."""
    return output_dim(model.get_submodule(name.rpartition(".")[0]))


def largest(scores: Tensor, kept: int, among: Tensor | None = None) -> Tensor:
    """A mask of the `kept` largest scores, of equal ones the first; of those `among`, where that is fewer."""
    flat = scores.flatten()
    if among is not None:
        flat = torch.where(among.flatten(), flat, -torch.inf)
        kept = min(kept, int(among.sum()))
    return most(flat[None], kept).view(scores.shape)


@torch.no_grad()
def keep_masked(model: nn.Module, name: str, mask: Tensor) -> None:
    """Zero what `mask` does not keep of a weight; one that 8 bits hold is made so anew, as its scales may change."""
    weight, side = model.get_parameter(name), _outputs(model, name)
    left = weight.detach().masked_fill(~mask, 0.0)
    weight.copy_(nearest(left, side).weight if is_rounded(weight.detach(), side) else left)


def with_zeros(structure: Structure, policy: Policy, name: str) -> list[Group]:
    """The groups whose weights a policy thins.

    Raises:
        InputError: there are none, so that the recovery called `name` has nothing to do.
    """
    widths = policy.as_dict()
    found = [g for g in structure if g.kind == "weight" and widths[g.name] < g.width]
    if not found:
        raise InputError(needed(name))
    return found


def check_pace(every: int, until: float) -> None:
    """Look at the options that say when masks change: at every `every`-th step, up to the share `until` of all.

    Raises:
        InputError: one is out of its range.
    """
    if not COUNT.takes(every):
        raise InputError(f"{WHERE}: every must {COUNT.words}, not {every!r}")
    if isinstance(until, bool) or not isinstance(until, float | int) or not 0.0 < until <= 1.0:
        raise InputError(f"{WHERE}: until must be a share of the steps, above 0 and up to 1, not {until!r}")


def needed(name: str) -> str:
    """What is said where no weight of a model is zero."""
    return (
        f"recovery.schedule: {name} moves the zeros of weights, and the point has none (space.granularity: weight, "
        "or a pattern such as 2:4); take one_shot"
    )


class Schedule(Protocol):
    """Which weights stay, step by step (`evaluator.finetune.Masking`)."""

    def __call__(
        self, step: int, parameters: Mapping[str, nn.Parameter], held: Masks, targets: Mapping[str, Target]
    ) -> Masks | None:
        """The masks that change at `step`."""


class MaskedCourse:
    """A course whose masks follow a schedule; before `settled` steps are done the model is denser than its targets.

    `start` gives the model the weights that it starts from, `make` its course; neither is called before the first step,
    as what was stopped goes on from the weights that the model has.
    """

    def __init__(
        self,
        name: str,
        make: Callable[[], Course],
        schedule: Schedule,
        targets: Mapping[str, Target],
        settled: int = 0,
        start: Callable[[], object] = lambda: None,
    ) -> None:
        self._name, self._make, self._schedule, self._start = name, make, schedule, start
        self._targets, self._settled = dict(targets), settled
        self._course: Course | None = None

    @property
    def ready(self) -> bool:
        """Whether the model is as sparse as it shall be."""
        return self._course is not None and self._course.done >= self._settled

    def __iter__(self) -> Iterator[Progress]:
        """Train to the end, with a word after every step.

        Raises:
            InputError: the model has no masked weights.
            ArithmeticError: the loss is not finite.
        """
        if not self._targets:
            raise InputError(needed(self._name))
        if self._course is None:
            self._start()
            self._course = self._begun()
        yield from self._course

    def state_dict(self) -> dict[str, Any]:
        """That of the course, and what it aims at."""
        assert self._course is not None
        return {"course": self._course.state_dict(), "targets": stored(self._targets)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where that of `state` stood."""
        self._targets = read(state["targets"])
        self._course = self._begun()
        self._course.load_state_dict(state["course"])

    def _begun(self) -> Course:
        course = self._make()
        course.follow(lambda step, parameters, held: self._schedule(step, parameters, held, self._targets))
        return course


def stored(targets: Mapping[str, Target]) -> dict[str, list[int]]:
    """Targets in plain values."""
    return {name: list(astuple(target)) for name, target in targets.items()}


def read(found: Mapping[str, Any]) -> dict[str, Target]:
    """Targets that were `stored`."""
    return {name: Target(*numbers) for name, numbers in found.items()}
