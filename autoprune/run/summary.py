"""The result table: at each asked budget the search's winner beside the control arms, and a plain word on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from autoprune.costs._latency_words import time_words
from autoprune.evaluation import Ask, Evaluation, Split, Tier
from autoprune.front import Front
from autoprune.policy import Policy
from autoprune.run.after import Controls

GAP: tuple[tuple[str, Split], ...] = (("fitness", "fitness"), ("held back", "heldback"), ("validation", "validation"))


@dataclass(frozen=True)
class Told:
    """What the table is made of: the front, the winner at each asked budget, the arms, all evaluations, their tier.

    `latencies` were measured, with the parts that the table gives them; `parts` are those of the dense model.
    """

    front: Front
    winners: Mapping[float, Policy]
    controls: Controls
    evaluations: Sequence[Evaluation]
    tier: Tier
    latencies: Mapping[Policy, Mapping[str, float]] = field(default_factory=dict)
    parts: Mapping[str, float] | None = None

    def find(self, policy: Policy | None, split: Split, tier: Tier) -> Evaluation | None:
        """The full evaluation of `policy` at `tier` on `split`, if it succeeded."""
        ask = Ask(policy, tier, split=split) if policy is not None else None
        return next((e for e in self.evaluations if e.ok and e.ask == ask), None)


def summarise(told: Told, budgets: Sequence[float]) -> tuple[Mapping[str, Any], ...]:
    """Rows of the result table: at each asked budget the winner and the control arms, and a plain word on them.

    `beat` says whether the search beat the arms there, `note` is that in words. `latency` is the measured one, `rest`
    says where the time goes; None where it was not measured.
    """
    rows = []
    ids = {p.policy: p.id for p in told.front}
    for at in budgets:
        arms = {"search": told.winners[at]} if at in told.winners else {}
        arms |= {arm: policy for (arm, limit), policy in told.controls.items() if limit == at}
        beat, note = _verdict(told, at, arms)
        for arm, policy in arms.items():
            plain, fine = told.find(policy, "validation", told.tier), told.find(policy, "validation", "tune")
            point = ids.get(policy) if arm == "search" else None
            named = {"budget": at, "arm": arm, "point": point}
            timed = _timed(plain, told.latencies.get(policy), told.parts)
            rows.append({**named, **figures(plain, fine), **timed, "beat": beat, "note": note})
    return tuple(rows)


def beat_words(who: str, controls: str, *, beat: bool) -> str:
    """Whether `who` beat the controls, in the words of `search` and of `compare`."""
    return f"{who} {'beat' if beat else 'did NOT beat'} {controls}"


def _verdict(told: Told, at: float, arms: Mapping[str, Policy]) -> tuple[bool | None, str]:
    """Whether the search beat every control arm, after the fine-tune where there was one, and in words; and the gap.

    None where there is nothing to judge.
    """
    if "search" not in arms:
        return None, f"at {at:g}: the search found no point within the budget"
    tuned = told.find(arms["search"], "validation", "tune") is not None
    tier: Tier = "tune" if tuned else told.tier
    losses = {arm: e.loss for arm, p in arms.items() if (e := told.find(p, "validation", tier)) is not None}
    ours = losses.pop("search", float("inf"))
    better = {arm: loss for arm, loss in losses.items() if loss <= ours}
    rest = ", ".join(f"{arm} {loss:.4g}" for arm, loss in (better or losses).items())
    what = f"loss on validation{', fine-tuned' if tuned else ''}"
    seen = [(name, told.find(arms["search"], split, told.tier)) for name, split in GAP]
    gap = ", ".join(f"{name} {e.loss:.4g}" for name, e in seen if e is not None)
    same = [arm for arm in losses if arms[arm] == arms["search"]]
    if same:
        verdict = f"{beat_words('the search', ' and '.join(same), beat=False)}, whose policy it kept: {ours:.4g}"
    elif better:
        verdict = f"{beat_words('the search', rest, beat=False)}: it has {ours:.4g}"
    else:
        verdict = f"search {ours:.4g} against {rest}"
    said = f"at {at:g}: {verdict} ({what}); {'before fine-tuning, ' if tuned else ''}the search's point: {gap}"
    return (not (same or better) if losses else None), said + _idle(told, arms)


def _idle(told: Told, arms: Mapping[str, Policy]) -> str:
    """Which arms the brief fine-tune made no better on validation."""
    both = {arm: (told.find(p, "validation", told.tier), told.find(p, "validation", "tune")) for arm, p in arms.items()}
    idle = [arm for arm, (plain, fine) in both.items() if plain and fine and fine.loss >= plain.loss]
    return f"; the brief fine-tune made {' and '.join(idle)} no better" if idle and told.tier != "tune" else ""


def _timed(
    plain: Evaluation | None, latency: Mapping[str, float] | None, parts: Mapping[str, float] | None
) -> dict[str, Any]:
    if plain is None or latency is None:
        return {"latency": None, "rest": None}
    return {"latency": dict(latency), "rest": time_words(plain.costs["macs"], latency, parts)}


def figures(plain: Evaluation | None, fine: Evaluation | None) -> dict[str, Any]:
    """What a row says of a policy on validation, and after the brief fine-tune where there was one."""
    if plain is None:
        return {"macs_ratio": None, "costs": {}, "loss": None, "metrics": {}, "tuned_loss": None, "finetuned": None}
    tuned = {
        "tuned_loss": None if fine is None else fine.loss,
        "finetuned": None if fine is None else dict(fine.metrics),
    }
    costs = {"macs_ratio": plain.costs["macs"], "costs": dict(plain.costs)}
    return {**costs, "loss": plain.loss, "metrics": dict(plain.metrics), **tuned}
