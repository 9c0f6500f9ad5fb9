"""Tensors and their labels during one forward pass, and the operations that are seen in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from autoprune.tracing.labels import Key, Places
from autoprune.tracing.slim import named_tensors
from autoprune.tracing.watch import is_producer

ALONG = (*(nn.modules.conv._ConvNd, nn.Linear, nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.PReLU),)
"""Modules whose tensors of one dimension lie along their output channels."""


@dataclass(frozen=True, slots=True)
class Call:
    """An operation by its name, its arguments by theirs and as they were given, and what it gave."""

    name: str
    func: Any
    named: Mapping[str, Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    outputs: tuple[Tensor, ...]

    @staticmethod
    def of(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> Call:
        """The call of an operator of torch's dispatcher."""
        schema = func._schema
        named = {a.name: x for a, x in zip(schema.arguments, args, strict=False)} | dict(kwargs)
        name = schema.name.split("::")[-1].rstrip("_")
        return Call(name, func, named, args, kwargs, tuple(tensors_in(result)))

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors among its arguments."""
        return tensors_in((self.args, dict(self.kwargs)))

    @property
    def accepts(self) -> set[str]:
        """Names of all its parameters."""
        return {a.name for a in self.func._schema.arguments}


class Labelled:
    """Labels by tensor; all tensors are kept alive, so that identities stay unique."""

    def __init__(self, model: nn.Module) -> None:
        self.places = Places()
        self.names = {id(t): n for n, t in named_tensors(model).items()}
        self._owners: dict[int, tuple[str, nn.Module]] = {}
        for name, module in model.named_modules():
            for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                self._owners.setdefault(id(tensor), (name, module))
        self._known: dict[int, tuple[Tensor, Tensor | None]] = {}

    def set(self, tensor: Tensor, labels: Tensor | None) -> None:
        """From now on `tensor` has these labels, or none."""
        self._known[id(tensor)] = (tensor, labels)

    def of(self, tensor: object) -> Tensor | None:
        """Labels of an activation, or of a tensor of the model that lies along one dimension."""
        if not isinstance(tensor, Tensor):
            return None
        if id(tensor) in self._known:
            return self._known[id(tensor)][1]
        long = [d for d, n in enumerate(tensor.shape) if n > 1]
        if id(tensor) not in self.names or len(long) != 1:
            return None
        labels = self.places.labels(self.key(tensor, long[0]), tensor.shape[long[0]])
        self.set(tensor, labels.view([-1 if d == long[0] else 1 for d in range(tensor.dim())]))
        return self._known[id(tensor)][1]

    def owner(self, tensor: Tensor) -> tuple[str, nn.Module | None]:
        """Name and module that first hold a tensor of the model; ("", None) of all others."""
        return self._owners.get(id(tensor), ("", None))

    def key(self, tensor: Tensor, dim: int) -> Key:
        """The side that a tensor of the model belongs to along `dim`."""
        owner, module = self.owner(tensor)
        held = (getattr(module, a, None) for a in ("weight", "bias", "running_mean", "running_var"))
        if module is not None and isinstance(module, ALONG) and any(t is tensor for t in held):
            return (owner, "out" if is_producer(module) else "carry", None)
        return (self.names[id(tensor)], "carry", dim)

    def lay(self, tensor: object, dim: int, labels: Tensor) -> None:
        """A tensor of the model lies along `labels` [n]: its dimension `dim` goes with them."""
        if isinstance(tensor, Tensor) and id(tensor) in self.names and tensor.shape[dim] == len(labels):
            self.places.tie(labels, self.places.labels(self.key(tensor, dim), len(labels)))

    def channels(self, tensor: Tensor) -> Tensor | None:
        """Labels [channels] of an activation [N, channels, ...]; what lies along the others goes together."""
        labels = self.of(tensor)
        if labels is None:
            return None
        merged = self.places.merge(labels, [d for d in range(tensor.dim()) if d != 1])
        return merged.reshape(-1).expand(tensor.shape[1])


def tensors_in(tree: Any) -> list[Tensor]:
    """All tensors of a tree."""
    return [t for t in tree_leaves(tree) if isinstance(t, Tensor)]
