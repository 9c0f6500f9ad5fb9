"""Certificates by experiment: what could hurt is removed, on weights of our own, whatever the model's weights are.

One random set of kept atoms proves little: channels that the forward uses by their number survive it by luck. The
trials below remove every atom at least once, shift every position, and leave one atom or all but one.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from autoprune.allocation.polynomial import macs_polynomial
from autoprune.errors import InputError, one_line
from autoprune.policy import Policy
from autoprune.structure import Group, Op, Structure
from autoprune.tracing.copies import copied, flat_output, private_copy, quiet_random_state, to_double
from autoprune.tracing.inputs import Example, call_model
from autoprune.tracing.ops import count_macs
from autoprune.tracing.scramble import noisy, scramble
from autoprune.tracing.slim import Keep, expected_attributes, named_tensors, positions_of, removed_positions, slim
from autoprune.tracing.sound_gradients import SoundGradients
from autoprune.tracing.verify import relative_error, run

DEAD = "removing its channels changes nothing in the output, so nothing can be proved"
CRASH = "the model does not run once its channels are removed"
LEAST_CHANGE = 1e-12
"""Relative change of the output below which it is rounding."""

MOST_WEIGHTS = 8
"""Sets of weights that are tried until every group matters to the output; half of the units of a ReLU may be dead."""

Rule = Callable[[int, int], Sequence[int]]
"""(width, number of the group) -> atoms that stay."""


def _most(width: int, number: int) -> Sequence[int]:
    return range(1, width) if number % 2 else range(width - 1)


def _one(width: int, number: int) -> Sequence[int]:
    return [0] if number % 2 else [width - 1]


def _some(width: int, number: int) -> Sequence[int]:
    """Atoms by chance, an odd number where that can be, lest a fixed split fits by luck."""
    rng = np.random.default_rng([width, number])
    kept = min(int(rng.integers(1, width)) | 1, width - 1)
    return sorted(int(a) for a in rng.permutation(width)[:kept])


RULES: tuple[tuple[Rule, ...], ...] = (
    (lambda width, number: range(width // 2, width), lambda width, number: range(0, width, 2), _most),
    (lambda width, number: range(width // 2), lambda width, number: _most(width, number + 1), _one, _some),
)
"""What stays, by set of weights. The halves come first: every atom goes once and every position holds another one."""


@dataclass(frozen=True)
class Certifier:
    """Holds a private fp64 twin of a model, on which groups must prove themselves; its weights are ours."""

    model: nn.Module
    example: Example
    ops: tuple[Op, ...]
    scrambled: bool
    tolerance: float

    @staticmethod
    def of(model: nn.Module, example: Example, ops: tuple[Op, ...]) -> Certifier:
        """Certifier of `model`; in fp64, or as it is where the model insists on its own precision, inputs or weights.

        Raises:
            InputError: the model gives no finite output whatever is tried.
        """
        plain = private_copy(model)
        tries = [(True, True, True), (True, True, False), (False, True, False), (True, False, False)]
        for scrambled, double, noise in [*tries, (False, False, False)]:
            twin, inputs = copied(plain), example.inputs
            if double:
                twin, inputs = twin.double(), to_double(inputs)
            given = replace(example, inputs=noisy(inputs) if noise else inputs)
            certifier = Certifier(twin, given, ops, scrambled, 1e-8 if double else 1e-4)
            if all(certifier._runs(number) for number in (1, 0)):
                return certifier
        raise InputError(f"{type(model).__name__} gives no finite floating output on its example inputs")

    def failures(self, groups: Sequence[Group], count: bool = False) -> dict[str, str]:
        """Group name -> why it is not proved, in a user's words; all others are, each alone and all together.

        With `count` their MACs are counted too and must follow the polynomial.
        """
        said: dict[str, str] = {}
        awake: set[str] = set()
        numbers = {g.name: i for i, g in enumerate(groups)}
        for weights in range(MOST_WEIGHTS if self.scrambled else len(RULES)):
            first = weights < len(RULES)
            left = [g for g in groups if g.name not in said and (first or g.name not in awake)]
            if not left:
                break
            self._load(weights)
            moved = self._that_matter(left)
            awake |= moved
            for i, rule in enumerate(RULES[weights] if first else [r for rules in RULES for r in rules]):
                held = [g for g in left if g.name not in said and (first or g.name in moved)]
                counts = count and first and weights == len(RULES) - 1 and i == len(RULES[weights]) - 1
                said |= self._wrong(held, rule, numbers, counts)
        return said | {g.name: DEAD for g in groups if g.name not in {*said, *awake}}

    def _wrong(self, groups: Sequence[Group], rule: Rule, numbers: Mapping[str, int], count: bool) -> dict[str, str]:
        """The groups that fail, found by halving: those that are left hold together."""
        if not groups:
            return {}
        keep = {g.name: tuple(rule(g.width, numbers[g.name])) for g in groups}
        complaint = self._complaint(groups, keep, count)
        if not complaint:
            return {}
        if len(groups) == 1:
            return {groups[0].name: complaint}
        half = len(groups) // 2
        found = {
            name: words
            for part in (groups[:half], groups[half:])
            for name, words in self._wrong(part, rule, numbers, count).items()
        }
        if not found:
            return self._unsociable(groups, keep, count)
        return found | self._wrong([g for g in groups if g.name not in found], rule, numbers, count)

    def _unsociable(self, groups: Sequence[Group], keep: Keep, count: bool) -> dict[str, str]:
        """Some do not get along with others: in execution order those that do are kept."""
        said: dict[str, str] = {}
        joint: list[Group] = []
        for group in groups:
            if complaint := self._complaint([*joint, group], {g.name: keep[g.name] for g in [*joint, group]}, count):
                said[group.name] = complaint
            else:
                joint.append(group)
        return said

    def _complaint(self, groups: Sequence[Group], keep: Keep, count: bool) -> str:
        """What goes wrong when only `keep` stays of `groups`; "" if that is the same as masking the rest."""
        structure = Structure(tuple(groups), self.ops, fingerprint="experiment")
        with _borrowed(self.model):
            try:
                slim(self.model, structure, keep)
                got = run(self.model, self.example.inputs)
            except Exception as crash:  # wrong coupling shows as a shape error anywhere in the user's forward
                return f"{CRASH} ({one_line(crash)})"
            wrong = self._wrong_macs(structure, keep) if count else ""
        with _borrowed(self.model):
            _zero_consumers(self.model, structure, keep)
            expected = run(self.model, self.example.inputs)
        error = relative_error(got, expected)
        if not error <= self.tolerance:
            return f"removing its channels is not the same as masking them (relative error {error:.2g})"
        return wrong

    def _wrong_macs(self, structure: Structure, keep: Keep) -> str:
        policy = Policy.of({name: len(kept) for name, kept in keep.items()})
        expected = int(macs_polynomial(structure)(policy.array(structure)))
        counted = count_macs(self.model, self.example.inputs, self.example.samples)
        return "" if expected == counted else f"its MACs do not follow its width ({counted}, expected {expected})"

    def _that_matter(self, groups: Sequence[Group]) -> set[str]:
        """Names of the groups that change the output on these weights."""
        structure = Structure(tuple(groups), self.ops, fingerprint="experiment")
        dense, slopes = run(self.model, self.example.inputs), self._slopes()
        found = set()
        for group in groups:
            atoms = torch.arange(group.width)
            reads = [s for s in group.slices if s.role == "consume" and s.tensor in slopes]
            if any(bool(slopes[s.tensor].index_select(s.dim, positions_of(s, atoms)).any()) for s in reads):
                found.add(group.name)
                continue
            with _borrowed(self.model):  # a gradient may be stopped where values go on
                _zero_consumers(self.model, structure, {group.name: ()})
                if relative_error(run(self.model, self.example.inputs), dense) > LEAST_CHANGE:
                    found.add(group.name)
        return found

    def _slopes(self) -> dict[str, Tensor]:
        """How much each weight moves the output, by name (on the CPU); empty where there is no backward pass."""
        parameters = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        try:
            with quiet_random_state(0), warnings.catch_warnings(), SoundGradients():
                warnings.simplefilter("ignore")
                out = flat_output(call_model(self.model, self.example.inputs))
                mix = torch.randn(out.shape, dtype=out.dtype, device=out.device)
                slopes = torch.autograd.grad((out * mix).sum(), list(parameters.values()), allow_unused=True)
        except Exception:  # reentrant checkpoints and operations in place refuse it; masking decides then
            return {}
        size = float(out.detach().norm())
        named = zip(parameters.items(), slopes, strict=True)
        moves = {name: (slope * p).detach().abs().cpu() for (name, p), slope in named if slope is not None}
        return {name: move > LEAST_CHANGE * size for name, move in moves.items()}

    def _load(self, weights: int) -> None:
        if self.scrambled:
            scramble(self.model, weights)

    def _runs(self, weights: int) -> bool:
        try:
            self._load(weights)
            out = run(self.model, self.example.inputs)
        except Exception:  # a model that builds its own fp32 constants does not run in fp64
            return False
        return bool(out.numel()) and bool(torch.isfinite(out).all()) and float(out.norm()) > 0


@contextmanager
def _borrowed(model: nn.Module) -> Iterator[None]:
    """Whatever is cut or zeroed inside is whole again afterwards; without a copy, for that would dominate the time."""
    contents = [(tensor, tensor.data) for tensor in named_tensors(model).values()]
    attributes = [(m, name, getattr(m, name)) for m in model.modules() for name, _ in expected_attributes(m)]
    try:
        yield
    finally:
        for tensor, data in contents:
            tensor.data = data
        for module, name, value in attributes:
            setattr(module, name, value)


def _zero_consumers(model: nn.Module, structure: Structure, keep: Keep) -> None:
    tensors = named_tensors(model)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for (name, dim), gone in removed_positions(structure, keep, shapes, "consume").items():
        where = torch.nonzero(gone).flatten().to(tensors[name].device)
        tensors[name].data = tensors[name].data.index_fill(dim, where, 0)
