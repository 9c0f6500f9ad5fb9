"""What a run has to do, stage by stage, how far it is, and about how long the rest takes by what was measured so far.

Work counts in samples that go through the network (a backward pass counts two), by tier: a sample of a fine-tune and
one of a refit take different times.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from autoprune.allocation import sensitivity
from autoprune.evaluation import Ask, Evaluation, Labelled, Tier
from autoprune.files.job import Job
from autoprune.policy import Policy
from autoprune.protocols import Problem
from autoprune.run import after
from autoprune.run.before import KNAPSACK_TARGETS, SEED_TARGETS
from autoprune.run.choose_tier import CHEAP, JUDGE, N_CANDIDATES
from autoprune.run.ledger import Prices
from autoprune.run.setting import Setting

Work = Mapping[str, float]
"""Samples by tier."""
PLAIN_PASS = 1.3
"""What a sample of an evaluation takes where nothing was measured yet, in passes of the dense model."""


@dataclass
class _Stage:
    work: dict[str, float]
    asks: int = 0
    done: dict[str, float] = field(default_factory=dict)
    told: int = 0


class Plan:
    """The stages of a run in their order. An ask that was evaluated before is no work.

    `pace_s` is what a sample takes the dense model, as far as somebody has measured it. A view may read while the run
    writes, so that what is read is copied first.
    """

    def __init__(self, prices: Prices, pace_s: float | None = None) -> None:
        self._prices, self._pace_s = prices, pace_s
        self._stages: dict[str, _Stage] = {}
        self._seen: set[Ask] = set()
        self._took: dict[str, list[float]] = {}  # by tier: seconds, samples

    def guess(self, works: Mapping[str, Work]) -> None:
        """What stages will take, before anybody knows their asks."""
        for stage, work in works.items():
            self._stages.setdefault(stage, _Stage(dict(work)))

    def expect(self, stage: str, asks: Labelled) -> None:
        """The asks of a stage that begins."""
        new = dict.fromkeys(ask for _, ask in asks if ask not in self._seen)
        self._stages[stage] = _Stage(work_of(self._prices, new), len(asks))

    def told(self, stage: str, evaluation: Evaluation) -> None:
        """Count an answer."""
        ask, here = evaluation.ask, self._stages[stage]
        here.told += 1
        if ask in self._seen:
            return
        self._seen.add(ask)
        samples = self._prices.samples(ask)
        here.done[ask.tier] = here.done.get(ask.tier, 0.0) + samples
        if evaluation.seconds > 0:
            took = self._took.setdefault(ask.tier, [0.0, 0.0])
            took[0], took[1] = took[0] + evaluation.seconds, took[1] + samples

    def settle(self, stage: str) -> None:
        """A stage is over, whatever was expected of it."""
        self._stages[stage].work = dict(self._stages[stage].done)

    def worth(self, stage: str, tier: Tier) -> float:
        """What a stage takes, in full evaluations at the fitness tier."""
        return self._full(self._stages[stage].work, tier) if stage in self._stages else 0.0

    def total(self, tier: Tier) -> float:
        """What the whole run takes, in full evaluations."""
        return sum(self._full(s.work, tier) for s in tuple(self._stages.values()))

    def done(self, tier: Tier) -> float:
        """What of it is done."""
        return sum(self._full(s.done, tier) for s in tuple(self._stages.values()))

    def counted(self, stage: str, tier: Tier) -> str:
        """How far a stage is, in words; by asks where they are known beforehand."""
        here = self._stages.get(stage)
        if here is None:
            return ""
        if here.asks:
            return f"{here.told} of {here.asks} evaluations"
        done, work = self._full(here.done, tier), self._full(here.work, tier)
        return f"{done:.0f} of {max(done, work):.0f} full evaluations"

    def said(self, tier: Tier) -> str:
        """All of the work in one line."""
        parts = {stage: self._full(s.work, tier) for stage, s in self._stages.items()}
        listed = ", ".join(f"{stage} {worth:.0f}" for stage, worth in parts.items() if worth >= 0.5)
        return f"about {sum(parts.values()):.0f} full evaluations' worth of work: {listed}"

    def left_s(self, parallel: float, stages: Iterable[str] | None = None) -> float | None:
        """Seconds that the rest takes (of some `stages` alone) on so many workers; None where nothing was measured."""
        total = 0.0
        for name in tuple(self._stages) if stages is None else stages:
            here = self._stages.get(name, _Stage({}))
            for tier, work in tuple(here.work.items()):
                rest, rate = max(0.0, work - here.done.get(tier, 0.0)), self._rate(tier)
                if rate is None:
                    return None
                total += rest * rate
        return total / max(parallel, 1e-9)

    def seconds_of(self, asks: Iterable[Ask], parallel: float) -> float | None:
        """Seconds that `asks` take on so many workers."""
        rates = {tier: (self._rate(tier), work) for tier, work in work_of(self._prices, asks).items()}
        known = [rate * work for rate, work in rates.values() if rate is not None]
        return sum(known) / max(parallel, 1e-9) if len(known) == len(rates) else None

    def _rate(self, tier: str) -> float | None:
        """Seconds a sample: of the tier, of all tiers, or by the dense model's own pace."""
        some = [self._took[tier]] if tier in self._took else list(self._took.values())
        if some:
            return sum(s for s, _ in some) / sum(n for _, n in some)
        return None if self._pace_s is None else PLAIN_PASS * self._pace_s

    def _full(self, work: Work, tier: Tier) -> float:
        return sum(tuple(work.values())) / self._prices.samples(Ask(Policy(()), tier))


def spent_of(
    s: Setting, plan: Plan, order: Sequence[str], table: str, tabled: sensitivity.TablePlan | None
) -> dict[str, float]:
    """What the stages in `order` took, in full evaluations; the one called `table` also where its file was there."""
    found = {stage: plan.worth(stage, s.tier) for stage in order}
    if tabled is not None and s.problem.table is not None:
        found[table] = s.worth(ask for _, ask in sensitivity.table_asks(s.structure, tabled))
    return {stage: found[stage] for stage in order if found[stage] > 0}


def work_of(prices: Prices, asks: Iterable[Ask]) -> dict[str, float]:
    """Samples of `asks` by tier."""
    found: dict[str, float] = {}
    for ask in asks:
        found[ask.tier] = found.get(ask.tier, 0.0) + prices.samples(ask)
    return found


def planned(s: Setting, controls: Sequence[str], table: sensitivity.TablePlan | None) -> Plan:
    """The plan of a search, with this `table` where it has one: right enough for an estimate of time."""
    plan = Plan(s.prices, s.pace_s)
    there = s.problem.table is not None or table is None or s.table_path(table).exists()
    plan.guess(expected(s.job, s.problem, s.prices, len(controls), None if there else table))
    return plan


def expected(
    job: Job, problem: Problem, prices: Prices, controls: int, table: sensitivity.TablePlan | None
) -> dict[str, Work]:
    """What the stages of a search will roughly take, by their names: `controls` arms beside it, a `table` before it.

    Right enough for an estimate of time; each stage is counted as soon as its asks are known.
    """
    part, tier, n_at = job.evaluator, problem.tier, len(problem.budget.at)
    dense = Policy.dense(problem.structure)
    full, tune = prices.samples(Ask(dense, tier)), prices.samples(Ask(dense, "tune"))
    held = prices.samples(Ask(dense, tier, split="heldback"))
    valid = prices.samples(Ask(dense, tier, split="validation"))
    finalists = after.n_finalists(part.tuned_finalists, problem, prices, job.search.trials)
    seeds = 1 + controls * (SEED_TARGETS + n_at) + (KNAPSACK_TARGETS + n_at) * (table is not None) if controls else 0
    proxies: Work = {t: N_CANDIDATES * prices.samples(Ask(dense, t)) for t in (*CHEAP, JUDGE)}
    narrowed = () if table is None else (ask for _, ask in sensitivity.table_asks(problem.structure, table))
    return {
        **({"sensitivity table": work_of(prices, narrowed)} if table is not None else {}),
        **({"choice of the tier": proxies} if part.leaves_tier else {}),
        "control arms and seeds": {tier: full * seeds},
        "search": {tier: full * job.search.trials},
        "held back": {tier: held * after.MAX_POINTS},
        "finalists": {"tune": tune * finalists * n_at},
        "validation": {tier: valid * (after.MAX_POINTS + controls * n_at)},
        "fine-tuned": {"tune": tune * (1 + controls) * n_at * min(finalists, 1)},
    }
