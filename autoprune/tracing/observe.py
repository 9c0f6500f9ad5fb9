"""One look at a model: how few and how small inputs show what it is made of, and what it costs on those it is given."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from autoprune.errors import InputError
from autoprune.structure import Group, Op
from autoprune.tracing.copies import shadow
from autoprune.tracing.inputs import Example, batch_size, example_tuple, few_samples, first_samples, on_device
from autoprune.tracing.ops import count_macs, macs_of, operations, products_of
from autoprune.tracing.watch import Trace, watch

SIDES = (64, 96, 128)
"""Heights and widths that are tried, in pixels; networks halve their maps five times."""

ENOUGH = 8
"""Places at which a weight works on small inputs, over all samples; a unit that is dead at all shows nothing."""


@dataclass(frozen=True, slots=True)
class Look:
    """What is known of a model before any experiment.

    `example` holds a few of the samples that were given, `small` the same ones at the smallest size at which the model
    runs alike (`example` itself where there is none); `trace` is of `small`, `ops` of `example`; `places` says by
    weight at how many it multiplies in `small`, over all samples; `products` by module which MACs a sample of `example`
    it spends without a weight.
    """

    example: Example
    small: Example
    trace: Trace
    ops: tuple[Op, ...]
    places: Mapping[str, int]
    products: Mapping[str, int]

    def tried(self, groups: Sequence[Group]) -> Example:
        """The least that experiments with `groups` may run on: one sample where that shows their channels often."""
        reads = {s.tensor for g in groups for s in g.slices if s.role == "consume"}
        least = min((self.places[t] for t in reads if t in self.places), default=0)
        if self.small.samples < 2 or least < 2 * ENOUGH * self.small.samples:
            return self.small
        return Example(first_samples(self.small.inputs, 1), 1)

    @property
    def reduced(self) -> bool:
        """Whether `small` is smaller than `example`."""
        return self.small is not self.example


def observe(twin: nn.Module, example_inputs: Any) -> Look:
    """Run the private copy `twin` on the smallest inputs that show the same as `example_inputs` do.

    Raises:
        InputError: the model does not run on `example_inputs`.
    """
    given, unreal = example_tuple(example_inputs), _unreal(twin)
    found = None if unreal is None else _reduced(twin, unreal, given)
    if found is not None:
        return found
    example = few_samples(twin, given)
    trace = watch(twin, example.inputs)
    macs = count_macs(twin, example.inputs, example.samples)
    ops = operations(twin, trace, example.samples, macs)
    products = products_of(twin, example.inputs, example.samples, ops)
    return Look(example, example, trace, ops, _places(twin, trace), products)


def _reduced(twin: nn.Module, unreal: nn.Module, given: tuple[Any, ...]) -> Look | None:
    """The look at the smallest images on which the model runs as its shadow does on the given ones; None without."""
    for inputs in _smaller(given):
        small = few_samples(twin, inputs)
        example = Example(first_samples(given, batch_size(small.inputs)), small.samples)
        try:
            trace, full = watch(twin, small.inputs), watch(unreal, on_device(example.inputs, "meta"))
        except InputError:  # too small, or of sizes that it was not built for; or it needs numbers
            continue
        places = _places(twin, trace)
        if _alike(trace, places, full, _places(unreal, full)):
            macs = macs_of(unreal, example.inputs, example.samples)
            ops = operations(unreal, full, example.samples, macs)
            products = products_of(unreal, example.inputs, example.samples, ops)
            return Look(example, small, trace, ops, places, products)
    return None


def _unreal(twin: nn.Module) -> nn.Module | None:
    try:
        return shadow(twin)
    except Exception:  # some modules cannot leave their device
        return None


def _smaller(inputs: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    """The same inputs with their images cut to each of SIDES, the smallest first; none where no image is larger."""
    images = [x for x in tree_leaves(inputs) if _is_image(x)]
    least = min((min(x.shape[2:]) for x in images), default=0)
    for side in SIDES:
        share = Fraction(side, max(least, 1))
        if 3 * side > 2 * least or any((size * share).denominator > 1 for x in images for size in x.shape[2:]):
            continue
        yield tree_map(lambda x, share=share: _cut(x, share) if _is_image(x) else x, inputs)


def _is_image(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point() and x.dim() == 4


def _cut(x: Tensor, share: Fraction) -> Tensor:
    height, width = (int(size * share) for size in x.shape[2:])
    return x[:, :, :height, :width]


def _places(model: nn.Module, trace: Trace) -> dict[str, int]:
    return {name: trace.uses[id(p)].positions for name, p in model.named_parameters() if id(p) in trace.uses}


def _alike(small: Trace, few: Mapping[str, int], full: Trace, all_: Mapping[str, int]) -> bool:
    """Whether both traces show the same modules, weights and suspects, and the small one enough places of each."""
    seen = [
        (list(trace.order), trace.decisions, [words for _, words, _ in trace.suspects], places.keys())
        for trace, places in ((small, few), (full, all_))
    ]
    return seen[0] == seen[1] and all(n >= min(ENOUGH, all_[name]) for name, n in few.items())
