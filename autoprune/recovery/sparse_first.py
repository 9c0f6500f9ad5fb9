"""Make it sparse, then cut: a penalty pulls atoms or weights of the dense model to zero before they go."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor, nn

from autoprune.errors import InputError, did_you_mean
from autoprune.protocols import Progress, Task
from autoprune.recovery._distilled import Distilled
from autoprune.structure import Group
from autoprune.tracing.wiring import batch_norms

Penalty = Literal["group_lasso", "bn_l1", "l1"]
STRENGTHS: Mapping[Penalty, float] = {"group_lasso": 0.1, "bn_l1": 0.1, "l1": 0.02}


class SparseFirst:
    """`share` of the steps train the dense model under a penalty, the rest the pruned one; `course` says how both.

    group_lasso: the norm of all that produces an atom (Wen et al. 2016, Learning Structured Sparsity); bn_l1: the size
    of the batch norm scale behind it (Liu et al. 2017, Network Slimming); l1: the size of each weight of the matrices
    whose zeros are searched (Tibshirani 1996), for groups of kind weight. None: group_lasso where atoms are removed, l1
    where only weights go. All act as their proximal step after each step of the optimizer: a norm falls by `strength`
    (None: the penalty's usual one) times the learning rate, and stays at zero once it is there. Weights under the
    penalty are not averaged: in an average nothing would be zero.
    """

    def __init__(
        self,
        penalty: str | None = None,
        strength: float | None = None,
        share: float = 0.5,
        course: Distilled | None = None,
    ) -> None:
        if penalty is not None and penalty not in get_args(Penalty):
            raise InputError(
                f"recovery.options: unknown penalty {penalty!r}; {did_you_mean(penalty, get_args(Penalty))}"
            )
        if strength is not None and not strength > 0.0:
            raise InputError(f"recovery.options: strength must be above 0, not {strength}")
        if not 0.0 < share < 1.0:
            raise InputError(f"recovery.options: share must lie between 0 and 1, not {share}")
        self._penalty, self._strength, self.share = penalty, strength, share
        self.course = course or Distilled()

    def before(
        self, model: nn.Module, dense: nn.Module, groups: Sequence[Group], task: Task, steps: int, seed: int
    ) -> Iterable[Progress]:
        """Train `model`, a copy of the dense one, in place under the penalty on `groups`.

        Raises:
            InputError: no group of `groups` is one for the penalty.
            ArithmeticError: the loss is not finite.
        """
        own = replace(self.course, ema=None)
        penalty = self._penalty or ("group_lasso" if any(g.narrows for g in groups) else "l1")
        usual = next(usual for name, usual in STRENGTHS.items() if name == penalty)
        after_step = _shrinking(_under(model, groups, penalty), usual if self._strength is None else self._strength)
        return own.course(model, dense, task, steps, seed, after_step)

    def __call__(self, model: nn.Module, dense: nn.Module, task: Task, steps: int, seed: int) -> Iterable[Progress]:
        """Train `model` in place, as one_shot does.

        Raises:
            ArithmeticError: the loss is not finite.
        """
        return self.course.course(model, dense, task, steps, seed)


class _Shrinks(Protocol):
    def shrink(self, by: float) -> None:
        """The proximal step of `by` times a penalty."""


def _under(model: nn.Module, groups: Sequence[Group], penalty: str) -> Sequence[_Shrinks]:
    """What of `model` a penalty is on."""
    if penalty == "l1":
        names = [name for g in groups if g.kind == "weight" for name in g.matrices]
        if not names:
            raise InputError(
                "recovery.options: penalty l1 needs weights whose zeros are searched (space.granularity: weight, "
                "or a pattern such as 2:4); take group_lasso"
            )
        return [_Weights(model.get_parameter(name)) for name in names]
    role = "produce" if penalty == "group_lasso" else "carry"
    if not any(g.narrows for g in groups):
        raise InputError(f"recovery.options: penalty {penalty} needs groups whose atoms are removed; take l1")
    atoms = [found for g in groups if g.narrows and (found := _Atoms.of(model, g, role)) is not None]
    if not atoms:
        raise InputError("recovery.options: penalty bn_l1 needs batch norms behind the groups; take group_lasso")
    return atoms


class _Weights:
    """The weights of a matrix, each by itself."""

    def __init__(self, weight: nn.Parameter) -> None:
        self._weight = weight

    def shrink(self, by: float) -> None:
        """The proximal step of `by` times the size of each weight."""
        self._weight.copy_(nn.functional.softshrink(self._weight, by))


class _Atoms:
    """What an atom of a group owns: positions of dimensions of tensors, [width, each]."""

    def __init__(self, width: int, pieces: Sequence[tuple[Tensor, int, Tensor]]) -> None:
        self.width, self.pieces = width, pieces

    @staticmethod
    def of(model: nn.Module, group: Group, role: str) -> _Atoms | None:
        """The group's parameters of a role that all its atoms share; of vectors that are carried, the scales."""
        held, pieces = dict(model.named_parameters()), []
        scales = {f"{name}.weight" for name in batch_norms(model)}
        for part in group.slices:
            fits = part.role == role and part.first == 0 and part.count is None and part.tensor in held
            if fits and (role == "produce" or part.tensor in scales):
                parameter = held[part.tensor]
                where = torch.tensor([list(part.positions(a)) for a in range(group.width)], device=parameter.device)
                pieces.append((parameter, part.dim, where))
        return _Atoms(group.width, pieces) if pieces else None

    def shrink(self, by: float) -> None:
        """The proximal step of `by` times the norm of each atom."""
        squares = sum(_rows(p, dim)[where].square().sum((1, 2)) for p, dim, where in self.pieces)
        norms = torch.as_tensor(squares).sqrt().clamp_min(1e-12)
        left = (1.0 - by / norms).clamp_min(0.0)
        for parameter, dim, where in self.pieces:
            scale = torch.ones(parameter.shape[dim], device=parameter.device)
            scale[where] = left[:, None]
            parameter.mul_(scale.view([-1 if d == dim else 1 for d in range(parameter.dim())]))


def _rows(parameter: Tensor, dim: int) -> Tensor:
    return parameter.movedim(dim, 0).reshape(parameter.shape[dim], -1)


def _shrinking(parts: Sequence[_Shrinks], strength: float) -> Callable[[float], None]:
    def after_step(rate: float) -> None:
        with torch.no_grad():
            for part in parts:
                part.shrink(strength * rate)

    return after_step
