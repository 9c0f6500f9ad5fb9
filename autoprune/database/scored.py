"""Where a criterion is called: what it raises names it, its scores are looked at, and so is the model afterwards."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from autoprune import plugins
from autoprune.database.consumers import Consumer
from autoprune.errors import InputError
from autoprune.protocols import Criterion, GramCriterion, Task, WeightCriterion
from autoprune.structure import Group


def scored(criterion: Criterion, model: nn.Module, groups: Sequence[Group], task: Task) -> Mapping[str, Tensor]:
    """The criterion's scores by group, as it gives them.

    Raises:
        InputError: it fails, gives no mapping, or leaves the model changed.
    """
    return _called(criterion, criterion, model, groups, task)


def check_weights(criterion: Criterion | GramCriterion) -> None:
    """InputError where no mask can be made by a criterion."""
    if not isinstance(criterion, WeightCriterion | GramCriterion):
        able = [n for n in plugins.names("criteria") if hasattr(plugins.load("criteria", n), "weights")]
        raise InputError(
            f"criterion {plugins.name_of('criteria', criterion)} scores no single weights, and the space has some: "
            f"take {', '.join(('obs', *able))}"
        )


def scored_weights(
    criterion: Criterion | GramCriterion, model: nn.Module, groups: Sequence[Group], task: Task
) -> Mapping[str, Tensor]:
    """The criterion's scores of single weights, flat, by the groups of kind `weight`.

    Raises:
        InputError: it scores none, or not all of them, or what `scored` refuses.
    """
    if not groups:
        return {}
    check_weights(criterion)
    assert isinstance(criterion, WeightCriterion)
    found = _called(criterion, criterion.weights, model, [g.name for g in groups], task)
    shapes = {g.name: model.get_parameter(g.name).shape for g in groups}
    for g in groups:
        if isinstance(mine := found.get(g.name), Tensor) and mine.shape != shapes[g.name]:
            raise InputError(
                f"criterion {plugins.name_of('criteria', criterion)} must score {g.name} in its shape "
                f"{tuple(shapes[g.name])}, not {tuple(mine.shape)}"
            )
    return {name: scores.detach().flatten() for name, scores in found.items()}


def _called(
    criterion: Criterion | GramCriterion, ask: Callable[..., Any], model: nn.Module, what: Sequence[Any], task: Task
) -> Mapping[str, Tensor]:
    """What `ask` of a criterion gives; an error of it names the criterion."""
    name = plugins.name_of("criteria", criterion)
    before = _traces(model)
    with plugins.before_work(), plugins.calling("criteria", name, "on this model"):
        scores = ask(model, what, task)
        if not isinstance(scores, Mapping):
            raise TypeError(f"it gives a {type(scores).__name__}, not scores by group")
        after = _traces(model)
        if changed := [key for key in (*before, *after) if before.get(key) != after.get(key)]:
            raise ValueError(f"it changed {changed[0]} of the model that it was lent")
    return scores


def scored_by_grams(criterion: Criterion | None, group: Group, consumers: Sequence[Consumer]) -> Tensor:
    """The scores of one group by a criterion that works on the consumers' Grams."""
    assert isinstance(criterion, GramCriterion)
    name = plugins.name_of("criteria", criterion)
    with plugins.before_work(), plugins.calling("criteria", name, f"on group {group.name!r}"):
        scores = criterion.from_consumers(group, consumers)
    return checked(criterion, group, scores)


def checked(criterion: Criterion | GramCriterion, group: Group, scores: Tensor | None) -> Tensor:
    """The scores of a group; InputError unless they are finite and one for each atom."""
    if not isinstance(scores, Tensor) or scores.shape != (group.width,) or not bool(torch.isfinite(scores).all()):
        got = "nothing" if scores is None else f"a {type(scores).__name__}"
        if isinstance(scores, Tensor):
            got = f"shape {tuple(scores.shape)}, finite: {bool(torch.isfinite(scores).all())}"
        raise InputError(
            f"criterion {plugins.name_of('criteria', criterion)} must give {group.width} finite scores for group "
            f"{group.name!r}; it gave {got}"
        )
    return scores


def _traces(model: nn.Module) -> dict[str, tuple[object, ...]]:
    """What a change of weights, buffers or mode would show in, in one look at each: sum and ends, as text for NaN."""
    found: dict[str, tuple[object, ...]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        values = tensor.detach()
        countable = (
            values.numel() and not values.is_complex() and not values.is_quantized and values.layout == torch.strided
        )
        seen = (values.sum(), *values.aminmax()) if countable and values.dtype != torch.bool else ()
        found[name] = (*(repr(v.item()) for v in seen), tuple(values.shape), values.dtype, tensor.requires_grad)
    return {**found, "the training mode": tuple(m.training for m in model.modules())}
