"""Magnitude times norm of the input (Sun et al. 2024, A Simple and Effective Pruning Approach for LLMs: Wanda)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from autoprune.criteria._atoms import named_weights, produced_weights, summed_by_atom
from autoprune.criteria._gradients import SPLIT, calibration
from autoprune.errors import InputError
from autoprune.protocols import Task
from autoprune.structure import Group
from autoprune.tracing.calls import LINEAR, Call, parse_call
from autoprune.tracing.copies import copied, quiet_random_state
from autoprune.tracing.padding import real_rows, real_tokens
from autoprune.tracing.sound_gradients import SoundGradients


class Wanda:
    """|w| * ||x||, with all inputs x of the calibration samples that the weight multiplies; of an atom the sum.

    Of a linear layer x is one feature over all real tokens, of a convolution one channel at one place of the kernel.
    The paper compares the weights of an output with each other, so that each output keeps as many. Here the scores of a
    whole matrix compare, and those of several, as a group is a matrix: outputs may keep more or fewer. Producers that
    are no products of inputs (embeddings, a learned position) count for nothing in an atom.

    Raises:
        InputError: a weight multiplies no inputs, or none of a group's producers does.
    """

    def __call__(self, model: nn.Module, groups: Sequence[Group], task: Task) -> Mapping[str, Tensor]:
        found: dict[str, Tensor] = {}

        def seen(names: Sequence[str]) -> Mapping[str, Tensor]:
            found.update(_scores(model, names, task))
            return found

        scores = summed_by_atom(model, groups, seen)
        for group in groups:
            if group.narrows and not any(piece.tensor in found for piece, _ in produced_weights(model, group)):
                raise InputError(_unread(f"no weight that produces group {group.name!r}", "the group"))
        return scores

    def weights(self, model: nn.Module, names: Sequence[str], task: Task) -> Mapping[str, Tensor]:
        scores = _scores(model, names, task)
        if missing := [name for name in names if name not in scores]:
            raise InputError(_unread(f"the weight {missing[0]!r}", "it"))
        return scores


def _unread(what: str, it: str) -> str:
    return (
        f"criterion 'wanda': {what} is read by no convolution or linear layer on the {SPLIT} data; use another "
        f"criterion (obs, l1_norm) or exclude {it} with space.exclude"
    )


def _scores(model: nn.Module, names: Sequence[str], task: Task) -> dict[str, Tensor]:
    """The scores of those weights that multiply inputs."""
    work = copied(model).eval()
    weights = named_weights(work, names)
    watch = _Squares(weights.values())
    for batch in calibration("wanda", task):
        watch.real = real_tokens(batch)
        with quiet_random_state(0), torch.no_grad(), watch:
            task.outputs(work, batch)
    read = {name: (w.detach().float().abs(), watch.totals.get(id(w))) for name, w in weights.items()}
    return {name: (size * total.sqrt()).cpu() for name, (size, total) in read.items() if total is not None}


class _Squares(TorchFunctionMode):
    """For every element of the weights the sum of the squares of all inputs that it multiplies."""

    def __init__(self, weights: Any) -> None:
        super().__init__()
        self._wanted = {id(weight) for weight in weights}
        self.totals: dict[int, Tensor] = {}
        self.real: Tensor | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        call = parse_call(func, args, kwargs or {})
        if call is not None and id(call.weight) in self._wanted:
            found, key = _squares(call, self.real), id(call.weight)
            self.totals[key] = self.totals[key] + found if key in self.totals else found
        return func(*args, **(kwargs or {}))


def _squares(call: Call, real: Tensor | None) -> Tensor:
    """Sum of x^2 for each element of the weight, in its shape.

    A product is linear in its weight, so the gradient of its summed outputs is, for each element, the sum of all inputs
    that it multiplies, whatever the kernel, the groups, or which dimension is which.
    """
    x = call.x.float().square()
    if call.kind in LINEAR and real is not None:
        rows = real_rows(x.shape, torch.arange(prod(x.shape[1:-1])), real)
        x = x if rows is None else x.reshape(-1, x.shape[-1])[rows]
    weight = torch.zeros_like(call.weight, dtype=torch.float32, requires_grad=True)
    bias = None if call.bias is None else call.bias.detach().float()
    with torch.enable_grad(), SoundGradients():
        outputs = replace(call, x=x, weight=weight, bias=bias).run()
        return torch.autograd.grad(outputs.sum(), weight)[0]
