"""Certificates by experiment: what could hurt is removed, on weights of our own, whatever the model's weights are.

One random set of kept atoms proves little: channels that the forward uses by their number survive it by luck. The
trials below remove every atom at least once, shift every position, and leave one atom or all but one.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from autoprune.allocation.polynomial import macs_polynomial
from autoprune.errors import InputError, one_line
from autoprune.policy import Policy
from autoprune.structure import Group, Op, Structure
from autoprune.tracing.copies import flat_output, private_copy, quiet_random_state, to_double
from autoprune.tracing.inputs import Example, call_model
from autoprune.tracing.observe import Look
from autoprune.tracing.ops import count_macs, with_groups
from autoprune.tracing.scramble import noisy, scramble
from autoprune.tracing.sizes import sizes_held
from autoprune.tracing.slim import Keep, expected_attributes, named_tensors, positions_of, removed_positions, slim
from autoprune.tracing.sound_gradients import SoundGradients
from autoprune.tracing.stand_ins import modules_of, put_back
from autoprune.tracing.verify import relative_error, run

SINGLE = 1e-3
"""Relative error at full size, in fp32, beyond which small inputs are not believed."""

DEAD = "removing its channels changes nothing in the output, so nothing can be proved"
CRASH = "the model does not run once its channels are removed"
LEAST_CHANGE = 1e-12
"""Relative change of the output below which it is rounding."""

MOST_WEIGHTS = 8
"""Sets of weights that are tried until every group matters to the output; half of the units of a ReLU may be dead."""

BLOCK = 256
"""Positions of a weight that are looked at in one go."""

BLOCKS = 3
"""Of so many blocks one is absent in a trial: what lies inside of them must prove itself as well."""

Rule = Callable[[int, int], Sequence[int]]
"""(width, number of the group) -> atoms that stay."""


def _most(width: int, number: int) -> Sequence[int]:
    return range(1, width) if number % 2 else range(width - 1)


def _few(width: int, number: int) -> Sequence[int]:
    """One atom, or two, in turn: what is as wide must be free to be as narrow, or narrower."""
    kept = 2 if width > 2 and number // (width - 1) % 2 else 1
    return range(kept) if number % 2 else range(width - kept, width)


def _some(width: int, number: int) -> Sequence[int]:
    """Atoms by chance, in another number for each group of a width, lest those hold that must be as wide as others."""
    kept = 1 + (width // 2 + number) % (width - 1)
    return sorted(int(a) for a in np.random.default_rng([width, number]).permutation(width)[:kept])


def _kept(group: Group, rule: Rule, trial: int, number: int) -> tuple[int, ...]:
    """Atoms that stay; of three blocks in a row one goes, another one each time."""
    if group.kind == "block":
        return () if (trial + number) % BLOCKS == 0 else (0,)
    return tuple(rule(group.width, number))


RULES: tuple[tuple[Rule, ...], ...] = (
    (lambda width, number: range(width // 2, width), lambda width, number: range(0, width, 2), _most),
    (lambda width, number: range(width // 2), lambda width, number: _most(width, number + 1), _few, _some),
)
"""What stays, by set of weights. The halves come first: every atom goes once and every position holds another one."""


@dataclass(frozen=True, slots=True)
class Proof:
    """Group name -> why it failed, in a user's words; how many passes it took in all, and on which inputs."""

    failed: Mapping[str, str]
    passes: int
    example: Example


@dataclass
class Certifier:
    """Holds a private fp64 twin of a model, on which groups must prove themselves; its weights are ours.

    `counted` are the inputs whose MACs the operations and `products` name, `doubtful` the groups that are expected to
    fail; `loaded` numbers the weights that the twin has now.
    """

    model: nn.Module
    example: Example
    ops: tuple[Op, ...]
    counted: Example
    products: Mapping[str, int]
    scrambled: bool
    tolerance: float
    doubtful: frozenset[str] = frozenset()
    loaded: int | None = None
    passes: int = 0

    @staticmethod
    def of(model: nn.Module, example: Example, look: Look) -> Certifier:
        """Certifier of `model`; in fp64, or as it is where the model insists on its own precision, inputs or weights.

        `example` is what experiments run on, `look` what was seen on its own example.

        Raises:
            InputError: the model gives no finite output whatever is tried.
        """
        tries = [(True, True, True), (True, True, False), (False, True, False), (True, False, False)]
        for scrambled, double, noise in [*tries, (False, False, False)]:
            twin, given = private_copy(model), [example, look.example]
            if double:
                twin, given = twin.double(), [replace(e, inputs=to_double(e.inputs)) for e in given]
            tried = replace(given[0], inputs=noisy(given[0].inputs) if noise else given[0].inputs)
            tolerance = 1e-8 if double else 1e-4
            certifier = Certifier(twin, tried, look.ops, given[1], look.products, scrambled, tolerance)
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
            moved = self._that_matter([g for g in left if g.name not in awake])
            awake |= moved
            for i, rule in enumerate(RULES[weights] if first else [r for rules in RULES for r in rules]):
                held = [g for g in left if g.name not in said and (first or g.name in moved)]
                last = len(RULES[-1]) - (BLOCKS if any(g.kind == "block" for g in held) else 1)
                counts = count and first and weights == len(RULES) - 1 and i >= last  # each block absent once
                said |= self._wrong(held, rule, i + weights, numbers, counts)
        return said | {g.name: DEAD for g in groups if g.name not in {*said, *awake}}

    def _wrong(
        self, groups: Sequence[Group], rule: Rule, number: int, numbers: Mapping[str, int], count: bool
    ) -> dict[str, str]:
        """The groups that fail by a rule, the `number`th of these weights; those that are left hold together."""
        keep = {g.name: _kept(g, rule, number, numbers[g.name]) for g in groups}
        said: dict[str, str] = {}
        while found := self._some_wrong([g for g in groups if g.name not in said], keep, count):
            said |= found
        return said

    def _some_wrong(self, groups: Sequence[Group], keep: Keep, count: bool) -> dict[str, str]:
        """Groups that fail, found by halving, the doubtful ones apart; {} only if all hold together."""
        complaint = self.complaint(groups, {g.name: keep[g.name] for g in groups}, count) if groups else ""
        if not complaint:
            return {}
        if len(groups) == 1:
            return {groups[0].name: complaint}
        doubtful = [g for g in groups if g.name in self.doubtful]
        parts = [[g for g in groups if g.name not in self.doubtful], doubtful]
        if not all(parts):
            half = len(groups) // 2
            parts = [list(groups[:half]), list(groups[half:])]
        found = {name: words for part in parts for name, words in self._some_wrong(part, keep, count).items()}
        return found or self._unsociable(groups, keep, count)

    def _unsociable(self, groups: Sequence[Group], keep: Keep, count: bool) -> dict[str, str]:
        """Some do not get along with others: in execution order those that do are kept."""
        said: dict[str, str] = {}
        joint: list[Group] = []
        for group in groups:
            if complaint := self.complaint([*joint, group], {g.name: keep[g.name] for g in [*joint, group]}, count):
                said[group.name] = complaint
            else:
                joint.append(group)
        return said

    def complaint(self, groups: Sequence[Group], keep: Keep, count: bool) -> str:
        """What goes wrong when only `keep` stays of `groups`; "" if that is the same as masking the rest."""
        structure = Structure(tuple(groups), self.ops, fingerprint="experiment")
        with _borrowed(self.model, structure.groups):
            try:
                slim(self.model, structure, keep)
                got = self._run()
            except Exception as crash:  # wrong coupling shows as a shape error anywhere in the user's forward
                return f"{CRASH} ({one_line(crash)})"
            wrong = self._wrong_macs(structure, keep) if count else ""
        with masked_in_place(self.model, structure, keep):
            expected = self._run()
        error = relative_error(got, expected)
        if not error <= self.tolerance:
            return f"removing its channels is not the same as masking them (relative error {error:.2g})"
        return wrong

    def _wrong_macs(self, structure: Structure, keep: Keep) -> str:
        policy = Policy.of({name: len(kept) for name, kept in keep.items()})
        structure = replace(structure, ops=with_groups(structure.ops, structure.groups, self.products))
        expected = int(macs_polynomial(structure)(policy.array(structure)))
        counted = count_macs(self.model, self.counted.inputs, self.counted.samples)
        return "" if expected == counted else f"its MACs do not follow its width ({counted}, expected {expected})"

    def _that_matter(self, groups: Sequence[Group]) -> set[str]:
        """Names of the groups that change the output on these weights."""
        if not groups:
            return set()
        structure = Structure(tuple(groups), self.ops, fingerprint="experiment")
        moving = self._that_move({(s.tensor, s.dim) for g in groups for s in g.slices if s.role == "consume"})
        found = set()
        for group in groups:
            atoms = torch.arange(group.width)
            reads = [s for s in group.slices if (s.tensor, s.dim) in moving]
            if any(bool(moving[s.tensor, s.dim][positions_of(s, atoms)].any()) for s in reads):
                found.add(group.name)
        asleep = [g for g in groups if g.name not in found]
        dense = self._run() if asleep else torch.empty(0)
        for group in asleep:  # a gradient may be stopped where values go on
            with masked_in_place(self.model, structure, {group.name: ()}):
                if relative_error(self._run(), dense) > LEAST_CHANGE:
                    found.add(group.name)
        return found

    def _that_move(self, places: set[tuple[str, int]]) -> dict[tuple[str, int], Tensor]:
        """By (tensor, dim), which positions of weights move the output (bool, CPU); empty without a backward pass."""
        parameters = {n: p for n, p in self.model.named_parameters() if p.requires_grad and n in {t for t, _ in places}}
        if not parameters:
            return {}
        self.passes += 1
        try:
            with quiet_random_state(0), warnings.catch_warnings(), SoundGradients():
                warnings.simplefilter("ignore")
                out = flat_output(call_model(self.model, self.example.inputs))
                mix = torch.randn(out.shape, dtype=out.dtype, device=out.device)
                slopes = torch.autograd.grad((out * mix).sum(), list(parameters.values()), allow_unused=True)
        except Exception:  # reentrant checkpoints and operations in place refuse it; masking decides then
            return {}
        least = LEAST_CHANGE * float(out.detach().norm())
        named = {
            name: (s, p.detach()) for (name, p), s in zip(parameters.items(), slopes, strict=True) if s is not None
        }
        return {(name, dim): _along(*named[name], dim, least) for name, dim in places if name in named}

    def _run(self) -> Tensor:
        self.passes += 1
        return run(self.model, self.example.inputs)

    def _load(self, weights: int) -> None:
        if self.scrambled and self.loaded != weights:
            scramble(self.model, weights)
            self.loaded = weights

    def _runs(self, weights: int) -> bool:
        try:
            self._load(weights)
            out = self._run()
        except Exception:  # a model that builds its own fp32 constants does not run in fp64
            return False
        return bool(out.numel()) and bool(torch.isfinite(out).all()) and float(out.norm()) > 0


def failures(
    twin: nn.Module, look: Look, groups: Sequence[Group], count: bool = False, doubtful: Iterable[str] = ()
) -> Proof:
    """Which of `groups` an experiment does not prove, and why; all others are proved, each alone and all together.

    `twin` is a private copy of the model, which has other weights afterwards. What small inputs proved is tried once
    more, all together, at the size that was given. Groups that are called `doubtful` are tried apart, to save time.
    """
    apart = frozenset(doubtful)
    first = replace(Certifier.of(twin, look.tried(groups), look), doubtful=apart)
    said, passes = first.failures(groups, count), first.passes
    del first  # a model of its own, in fp64
    if not look.reduced or _holds(twin, look, [g for g in groups if g.name not in said]):
        return Proof(said, passes, look.small)
    again = replace(Certifier.of(twin, look.example, look), doubtful=apart)
    said = again.failures(groups, count)
    return Proof(said, passes + again.passes, look.example)


def _holds(twin: nn.Module, look: Look, groups: Sequence[Group]) -> bool:
    """Whether removing some of all groups is masking them at the size that was given, in the model's own precision."""
    scramble(twin, 0)
    full = Certifier(twin, look.example, look.ops, look.example, look.products, True, SINGLE)
    return not groups or not full.complaint(
        groups, {g.name: _kept(g, _some, 0, i) for i, g in enumerate(groups)}, False
    )


@contextmanager
def _borrowed(model: nn.Module, groups: tuple[Group, ...]) -> Iterator[None]:
    """Whatever is cut or zeroed inside is whole again afterwards; without a copy, for that would dominate the time."""
    contents = [(tensor, tensor.data) for tensor in named_tensors(model).values()]
    attributes = [(m, name, getattr(m, name)) for m in model.modules() for name, _ in expected_attributes(m)]
    attributes += sizes_held(model, groups)
    modules = modules_of(model, groups)
    try:
        yield
    finally:
        put_back(model, modules)
        for tensor, data in contents:
            tensor.data = data
        for module, name, value in attributes:
            setattr(module, name, value)


@contextmanager
def masked_in_place(model: nn.Module, structure: Structure, keep: Keep) -> Iterator[None]:
    """Consumers read zeros from what `keep` removes inside; only what is zeroed is copied, to be put back."""
    tensors = named_tensors(model)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    zeroed: list[tuple[Tensor, int, Tensor, Tensor]] = []
    try:
        for (name, dim), gone in removed_positions(structure, keep, shapes, "consume").items():
            tensor = tensors[name].data
            where = torch.nonzero(gone).flatten().to(tensor.device)
            zeroed.append((tensor, dim, where, tensor.index_select(dim, where)))
            tensor.index_fill_(dim, where, 0)
        yield
    finally:
        for tensor, dim, where, values in reversed(zeroed):
            tensor.index_copy_(dim, where, values)


def _along(slope: Tensor, weight: Tensor, dim: int, least: float) -> Tensor:
    """Positions of `dim` at which slope * weight exceeds `least` anywhere, bool; by blocks, for weights are large."""
    parts = zip(slope.split(BLOCK, dim), weight.split(BLOCK, dim), strict=True)
    most = [(s * w).abs_().movedim(dim, 0).reshape(s.shape[dim], -1).amax(1) for s, w in parts]
    return (torch.cat(most) > least).cpu()
