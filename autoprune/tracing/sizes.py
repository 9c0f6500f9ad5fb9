"""Whole numbers in a model's modules by which forwards cut channels: found, read, and set to what is left."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from autoprune.structure import Group, Structure

LEAST = 2
"""A smaller number counts no channels that could be fewer."""


def numbers_in(module: nn.Module) -> Iterator[tuple[str, int | None, int]]:
    """(attribute, index in it, value) of the whole numbers that a module holds plainly or in a list or tuple.

    What torch's own layers hold agrees with their tensors, and `set_attributes` sees to it.
    """
    if type(module).__module__.startswith("torch."):
        return
    for name, held in vars(module).items():
        entries = enumerate(held) if type(held) in (list, tuple) else [(None, held)]
        yield from ((name, i, value) for i, value in entries if type(value) is int and value >= LEAST)


def number_at(model: nn.Module, attribute: str, index: int | None) -> int | None:
    """The number called `attribute` ("layer1.0.width"); None where the model has none there."""
    path, _, name = attribute.rpartition(".")
    module = dict(model.named_modules(remove_duplicate=False)).get(path)
    held: Any = None if module is None else vars(module).get(name)
    if index is not None:
        held = held[index] if type(held) in (list, tuple) and index < len(held) else None
    return held if type(held) is int else None


def set_number(module: nn.Module, name: str, index: int | None, value: int) -> None:
    """Give a module's number a new value; a list or tuple is made anew, for others may hold it too."""
    new: Any = value
    if index is not None:
        held = getattr(module, name)
        new = type(held)(value if i == index else entry for i, entry in enumerate(held))
    setattr(module, name, new)


def set_sizes(model: nn.Module, structure: Structure, widths: Mapping[str, int]) -> None:
    """Make the numbers that follow groups what they are at `widths`; a group that is not named is dense."""
    left: dict[tuple[str, int | None], int] = {}
    for group in structure.groups:
        for size in group.sizes:
            gone = size.each * (group.width - widths.get(group.name, group.width))
            key = (size.attribute, size.index)
            left[key] = left.get(key, size.value) - gone
    for (attribute, index), value in left.items():
        path, _, name = attribute.rpartition(".")
        set_number(model.get_submodule(path), name, index, value)


def sizes_held(model: nn.Module, groups: tuple[Group, ...]) -> Iterator[tuple[nn.Module, str, Any]]:
    """(module, name, value) of every attribute that `set_sizes` may set."""
    for attribute in {size.attribute for group in groups for size in group.sizes}:
        path, _, name = attribute.rpartition(".")
        module = model.get_submodule(path)
        yield module, name, getattr(module, name)
