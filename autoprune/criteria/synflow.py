"""How much of the flow from inputs to outputs goes through a weight (Tanaka et al. 2020, SynFlow)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from autoprune.criteria._atoms import named_weights, summed_by_atom
from autoprune.criteria._gradients import differentiable, working_copy
from autoprune.errors import InputError
from autoprune.protocols import Task
from autoprune.structure import Group
from autoprune.tracing.inputs import call_model, few_samples, on_device
from autoprune.tracing.outputs import pick_output
from autoprune.tracing.wiring import batch_norms


class Synflow:
    """|w| * dR/d|w|, where R sums the outputs of the absolute weights for ones as inputs; of an atom the sum.

    It needs no data: only shapes and types, of the task's example inputs. Token ids stay as these have them, and the
    absolute rows of the embedding are what goes in. Norms subtract nothing, so that nothing gets negative: running
    means are zero, and what layer and group norms divide by is a constant, the root mean square. In float64, as R grows
    with every layer. Queries and keys only weigh what flows, so nearly nothing of it is theirs.

    The paper scores again after each of 100 rounds, in which it prunes by an exponential schedule. That is no matter of
    one scoring: this is the first round.

    Raises:
        InputError: the outputs or the scores are not finite, or no weight has any flow.
    """

    def __call__(self, model: nn.Module, groups: Sequence[Group], task: Task) -> Mapping[str, Tensor]:
        return summed_by_atom(model, groups, lambda names: self.weights(model, names, task))

    def weights(self, model: nn.Module, names: Sequence[str], task: Task) -> Mapping[str, Tensor]:
        work, stated = working_copy(model), getattr(task, "outputs", None)
        ones = _ones(work, task)
        _make_absolute(work)
        with differentiable(), _Unshifted():
            outputs = call_model(work, ones)
            flow = pick_output(outputs, None if callable(stated) else stated).sum()
            if not flow.requires_grad or not bool(torch.isfinite(flow)):
                raise InputError(
                    "criterion 'synflow': ones as inputs of the absolute weights give outputs that are not finite or "
                    "depend on no weight; take another criterion (l1_norm, snip)"
                )
            flow.backward()
        scores = {
            name: torch.zeros_like(w) if w.grad is None else (w * w.grad).detach().abs()
            for name, w in named_weights(work, names).items()
        }
        return {name: score.detach().cpu() for name, score in scores.items()}


class _Unshifted(TorchFunctionMode):
    """Layer and group norms that subtract no mean, with their divisors as constants: a constant input would vanish."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (F.layer_norm, torch.layer_norm):
            x, shape, *rest = _given(args, kwargs, ("input", "normalized_shape", "weight", "bias", "eps"))
            return _scaled(x, tuple(range(-len(shape), 0)), *rest)
        if func in (F.group_norm, torch.group_norm):
            x, groups, weight, bias, eps = _given(args, kwargs, ("input", "num_groups", "weight", "bias", "eps"))
            apart, spatial = x.unflatten(1, (groups, -1)), (-1,) + (1,) * (x.dim() - 2)
            weight, bias = (None if t is None else t.view(spatial) for t in (weight, bias))
            y = _scaled(apart, tuple(range(2, apart.dim())), None, None, eps).flatten(1, 2)
            return _affine(y, weight, bias)
        return func(*args, **(kwargs or {}))


def _given(args: Any, kwargs: Any, names: Sequence[str]) -> list[Any]:
    given = {"weight": None, "bias": None, "eps": 1e-5, **dict(zip(names, args, strict=False)), **(kwargs or {})}
    return [given[name] for name in names]


def _scaled(x: Tensor, dims: tuple[int, ...], weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    y = x * (x.detach().square().mean(dims, keepdim=True) + eps).rsqrt()
    return _affine(y, weight, bias)


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


def _make_absolute(work: nn.Module) -> None:
    """The absolute values of all parameters in float64, and batch norms that subtract nothing, in place."""
    work.double()
    with torch.no_grad():
        for parameter in work.parameters():
            parameter.abs_()
        for norm in batch_norms(work).values():
            assert norm.running_mean is not None
            norm.running_mean.zero_()


def _ones(work: nn.Module, task: Task) -> Any:
    """Example inputs with ones for their numbers, on the model's device; ids and flags as they are."""
    device = next((p.device for p in work.parameters()), torch.device("cpu"))
    given = few_samples(work, on_device(task.example_inputs(), device), 1).inputs

    def one(value: Any) -> Any:
        floating = isinstance(value, Tensor) and value.is_floating_point()
        return torch.ones_like(value, dtype=torch.float64) if floating else value

    return tree_map(one, given)
