"""What goes down to the evaluator (Ask) and what comes up from it (Evaluation). Numbers and names only."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal, get_args

from autoprune.errors import InputError
from autoprune.policy import Policy

Tier = Literal["table", "stitch", "refit", "tune", "full"]
Split = Literal["fitness", "heldback", "validation"]


@dataclass(frozen=True, slots=True)
class Ask:
    """A request to evaluate `policy` at `tier`, on the first `fraction` of the samples of `split`.

    Samplers ask on `fitness` only; the final stage alone asks on `heldback` and `validation`.
    """

    policy: Policy
    tier: Tier
    fraction: float = 1.0
    split: Split = "fitness"

    def __post_init__(self) -> None:
        if self.tier not in get_args(Tier):
            raise InputError(f"tier must be one of {get_args(Tier)}, not {self.tier!r}")
        if self.split not in get_args(Split):
            raise InputError(f"split must be one of {get_args(Split)}, not {self.split!r}")
        if not 0.0 < self.fraction <= 1.0:
            raise InputError(f"fraction must be in (0, 1], not {self.fraction}")


Labelled = list[tuple[str, Ask]]
"""Asks with the words that the record keeps beside them."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The answer to an Ask. `loss` is minimised, inf if it failed; `costs` are ratios to the dense model.

    `passes` counts passes over the calibration set (a backward pass counts two), `seconds` the wall time.
    A failure is a value: `error` says why in one line. `sample_losses` are those of the single samples of the
    validation split in their order, for bootstraps and paired tests; empty on other splits. `masks` are the hashes of
    the zeros that weights were given, by their groups, on the validation split as well. `penalised` if the loss counts
    what a constraint misses, as samplers are told it; no record holds such a one.
    """

    ask: Ask
    loss: float
    costs: Mapping[str, float] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    passes: float = 0.0
    seconds: float = 0.0
    error: str | None = None
    sample_losses: tuple[float, ...] = ()
    masks: Mapping[str, str] = field(default_factory=dict)
    penalised: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "costs", MappingProxyType(dict(self.costs)))
        object.__setattr__(self, "metrics", MappingProxyType(dict(self.metrics)))
        object.__setattr__(self, "masks", MappingProxyType(dict(self.masks)))
        if math.isnan(self.loss):
            raise InputError("an evaluation's loss must not be NaN; a failure has loss=inf and says why in `error`")
        if (self.error is not None) != math.isinf(self.loss):
            raise InputError(f"an evaluation fails (loss=inf) exactly if it has an error: {self.loss}, {self.error!r}")

    @staticmethod
    def failed(ask: Ask, error: str, costs: Mapping[str, float] | None = None, seconds: float = 0.0) -> Evaluation:
        return Evaluation(ask, math.inf, costs or {}, {}, 0.0, seconds, error or "unknown")

    @property
    def ok(self) -> bool:
        return self.error is None

    def __reduce__(self) -> Any:  # mapping proxies do not pickle, and evaluations cross process borders
        values = (self.ask, self.loss, dict(self.costs), dict(self.metrics), self.passes, self.seconds, self.error)
        return (Evaluation, (*values, self.sample_losses, dict(self.masks)))
