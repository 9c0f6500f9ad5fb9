"""Evaluations that sleep, in a module of their own so that worker processes can import them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from autoprune.evaluation import Ask, Evaluation
from autoprune.structure import Structure
from tests.synthetic import Hills


@dataclass(frozen=True)
class Nap:
    """A factory of evaluations that sleep and say how long they took: a sleep is longer than asked for."""

    structure: Structure
    seconds: float

    def __call__(self) -> Callable[[Ask], Evaluation]:
        return self.evaluate

    def evaluate(self, ask: Ask) -> Evaluation:
        started = time.perf_counter()
        found = Hills(self.structure, self.seconds)(ask)
        return replace(found, seconds=time.perf_counter() - started)
