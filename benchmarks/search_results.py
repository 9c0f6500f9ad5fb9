"""What the search benchmark has measured, in small files that travel between machines, and the tables made of it.

arms/NAME-SEED.json: an arm's policies at the budgets, its validation front, its curve and what it took.
scores/TIER-POLICY.npz: a policy on the test images: the mean loss, the accuracy, and the loss of each image (float16).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from autoprune.errors import InputError
from autoprune.estimates import crossed
from autoprune.files.whole import whole, write_whole
from autoprune.pareto import front_volume, reference_point
from autoprune.policy import Policy

TIERS = ("refit", "tune")
TITLES = {"refit": "before fine-tuning", "tune": "after the fine-tune"}
DENSE = "dense"
MISSING = "-"
PASSES = 0.75
"""Over the calibration data, in a full evaluation: a quarter repairs, half is scored."""
USERS = "fastnas, knapsack, amc and evolution"


@dataclass(frozen=True)
class Arm:
    """What an arm found with one seed: a policy at each budget, its front on validation, its curve.

    The curve holds, at each budget, (ledger spent, least full fitness loss) whenever that falls; a strategy has none.
    """

    name: str
    seed: int
    policies: Mapping[float, Policy]
    front: Sequence[tuple[float, float]]
    curve: Mapping[float, Sequence[tuple[float, float]]]
    seconds: float
    passes: float
    measured_on: Mapping[str, Any]


@dataclass(frozen=True)
class Score:
    """A policy on the test images; `losses` [images] are rounded, `loss` and `accuracy` are not."""

    loss: float
    accuracy: float
    seconds: float
    losses: npt.NDArray[np.float16]


class Store:
    """The folder of results of one protocol; what is in it need not be measured again, wherever it was measured."""

    def __init__(self, folder: Path) -> None:
        self.path = folder

    @property
    def protocol(self) -> dict[str, Any]:
        """The settings that all results share."""
        found: dict[str, Any] = json.loads((self.path / "protocol.json").read_text(encoding="utf-8"))
        return found

    def claim(self, protocol: Mapping[str, Any]) -> None:
        """Say what will be added; InputError where the folder holds results of other settings."""
        if (self.path / "protocol.json").exists():
            held = self.protocol
            other = [f"{k} is {held.get(k)} there, {v} here" for k, v in protocol.items() if held.get(k) != v]
            if other:
                raise InputError(f"{self.path} holds other results: {'; '.join(other)}; choose another --results")
        write_whole(self.path / "protocol.json", json.dumps(protocol, indent=1) + "\n")

    def share(self, table: Mapping[str, float | None]) -> None:
        """Keep what the sensitivity table took, which arms share."""
        write_whole(self.path / "table.json", json.dumps(table, indent=1) + "\n")

    @property
    def table(self) -> dict[str, float] | None:
        """Evaluations, passes and seconds of the sensitivity table."""
        path = self.path / "table.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    def arm(self, name: str, seed: int) -> Arm | None:
        """The arm, where it is finished."""
        path = self._arm(name, seed)
        return _arm_from(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None

    def arms(self) -> list[Arm]:
        """All finished arms."""
        paths = sorted((self.path / "arms").glob("*.json"))
        return [_arm_from(json.loads(p.read_text(encoding="utf-8"))) for p in paths]

    def add_arm(self, arm: Arm) -> None:
        """Keep a finished arm."""
        policies = {str(at): policy.as_dict() for at, policy in arm.policies.items()}
        text = json.dumps({**asdict(arm), "policies": policies}, default=str)
        write_whole(self._arm(arm.name, arm.seed), text + "\n")

    def score(self, tier: str, word: str) -> Score | None:
        """The score of a policy, by its digest or "dense", where it is known."""
        path = self._score(tier, word)
        if not path.exists():
            return None
        with np.load(path) as held:
            return Score(float(held["loss"]), float(held["accuracy"]), float(held["seconds"]), held["losses"])

    def add_score(self, tier: str, word: str, score: Score) -> None:
        """Keep a score."""
        with whole(self._score(tier, word)) as draft, draft.open("wb") as file:
            np.savez_compressed(file, **vars(score))

    def _arm(self, name: str, seed: int) -> Path:
        return self.path / "arms" / f"{name}-{seed}.json"

    def _score(self, tier: str, word: str) -> Path:
        return self.path / "scores" / f"{tier}-{word}.npz"


def _arm_from(a: dict[str, Any]) -> Arm:
    policies = {float(at): Policy.of(widths) for at, widths in a["policies"].items()}
    return Arm(**{**a, "policies": policies, "curve": {float(at): points for at, points in a["curve"].items()}})


class Tables:
    """The results of a store as Markdown; arms in the order of `names`, what is not measured yet as "-"."""

    def __init__(self, store: Store, names: Sequence[str]) -> None:
        self.budgets: list[float] = store.protocol["budgets"]
        self.trials: int = store.protocol["trials"]
        self.table = store.table
        arms = store.arms()
        self.names = list(dict.fromkeys([*names, *sorted(a.name for a in arms)]))
        self.arms = {name: [a for a in arms if a.name == name] for name in self.names}
        words = {DENSE, *(p.digest for a in arms for p in a.policies.values())}
        found = {(tier, word): store.score(tier, word) for tier in TIERS for word in words}
        self.scores = {key: score for key, score in found.items() if score is not None}

    def text(self) -> str:
        """All tables."""
        parts = [self.overview(), *map(self.losses, TIERS), self.volumes(), self.ratios(), self.differences()]
        return "\n\n".join(parts) + "\n"

    def overview(self) -> str:
        """What the README shows."""
        heads = ["arm (seeds)", *(f"{b:.0%}" for b in self.budgets), "50%, fine-tuned", "hypervolume"]
        lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
        for name, own in self.arms.items():
            cells = [*self._cells(name, "refit"), self._cell(name, 0.5, "tune"), self._volume(own)]
            lines.append(f"| {name} ({len(own)}) | {' | '.join(cells)} |")
        return "\n".join(lines)

    def losses(self, tier: str) -> str:
        """KL and accuracy at the budgets; (k) where only k of the row's seeds are scored."""
        dense = self.scores.get((tier, DENSE))
        whole_ = f"; dense {dense.accuracy:.2%}" if dense else ""
        title = f"**{TITLES[tier]}** (test KL / accuracy, each ± sd over seeds{whole_})"
        return self._table(title, ("seeds",), lambda name: [str(len(self.arms[name])), *self._cells(name, tier)])

    def _cells(self, name: str, tier: str) -> list[str]:
        return [self._cell(name, at, tier) for at in self.budgets]

    def _cell(self, name: str, at: float, tier: str) -> str:
        own, scores = self.arms[name], list(self._scores(name, at, tier).values())
        if own and not any(at in a.policies for a in own):
            return "none"
        if not scores:
            return MISSING
        losses, accuracies = [s.loss for s in scores], [s.accuracy for s in scores]
        kl, right = f"{np.mean(losses):.3f}", f"{np.mean(accuracies):.2%}"
        if len(scores) > 1:
            kl += f" ± {np.std(losses, ddof=1):.3f}"
            right += f" ± {100 * np.std(accuracies, ddof=1):.2f}"
        partly = f" ({len(scores)})" if len(scores) < len(own) else ""
        return f"{kl} / {right}{partly}"

    def volumes(self) -> str:
        """The hypervolume of each arm, and what its search spent."""
        end = ", ".join(f"{x:.4g}" for x in reference_point(1))
        title = (
            f"**hypervolume** of the validation front (MACs ratio and log KL, reference {end}), the points on it, and "
            f"the full evaluations that the search spent of its {self.trials}"
        )
        lines = [title, "", "| arm | seeds | hypervolume ± sd | points | spent |", "|---|---|---|---|---|"]
        for name, own in self.arms.items():
            points = ", ".join(str(len(a.front)) for a in own)
            spent = ", ".join(f"{a.passes / PASSES:.0f}" for a in own if a.passes) or MISSING
            lines.append(f"| {name} | {len(own)} | {self._volume(own)} | {points} | {spent} |")
        if self.table is not None:
            worth = self.table["passes"] / PASSES
            lines += ["", f"The sensitivity table that {USERS} share took {worth:.0f} more, once for all of them."]
        return "\n".join(lines)

    @staticmethod
    def _volume(own: Sequence[Arm]) -> str:
        volumes = [volume(a) for a in own]
        spread = f" ± {np.std(volumes, ddof=1):.3f}" if len(volumes) > 1 else ""
        return f"{np.mean(volumes):.3f}{spread}" if own else MISSING

    def ratios(self) -> str:
        """Ours over uniform at 50 %: KL, and the fall of accuracy."""
        lines = ["**evolution / uniform at 50 %**", ""]
        for tier in TIERS:
            dense = self.scores.get((tier, DENSE))
            ours, base = (list(self._scores(n, 0.5, tier).values()) for n in ("evolution", "uniform"))
            if ours and base and dense:
                kl = np.mean([s.loss for s in ours]) / base[0].loss
                fell = dense.accuracy - np.mean([s.accuracy for s in ours])
                drop = fell / (dense.accuracy - base[0].accuracy)
                lines.append(f"- {TITLES[tier]}: KL {kl:.2f}, accuracy drop {drop:.2f} ({len(ours)} seeds)")
        return "\n".join(lines if len(lines) > 2 else [*lines, MISSING])

    def differences(self) -> str:
        """Each arm's KL less ours, paired over test images and the seeds that both have, with its interval."""
        title = "**arm less evolution** (test KL, paired over images and seeds, 95 % interval; above 0: ours is better)"
        parts: list[str] = []
        for tier in TIERS:
            rows = self._table(
                f"{title if not parts else ''}\n\n{TITLES[tier]}:".strip(),
                (),
                lambda name, tier=tier: [self.difference(name, at, tier) for at in self.budgets],  # type: ignore[misc]
            )
            parts.append(rows)
        return "\n\n".join(parts)

    def difference(self, name: str, at: float, tier: str) -> str:
        """One cell; a closed form, which has one seed, stands against each of ours."""
        ours, theirs = self._scores("evolution", at, tier), self._scores(name, at, tier)
        single = next(iter(theirs.values())) if len(theirs) == 1 and not self._searched(name) else None
        pairs = [(single or theirs[seed], ours[seed]) for seed in ours if single or seed in theirs]
        if name == "evolution" or not pairs:
            return MISSING
        rows = [t.losses.astype(np.float64) - o.losses.astype(np.float64) for t, o in pairs]
        mean, low, high = crossed(np.array(rows))
        return f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]"

    def _searched(self, name: str) -> bool:
        return any(a.curve for a in self.arms[name])

    def _scores(self, name: str, at: float, tier: str) -> dict[int, Score]:
        """By seed."""
        keys = {a.seed: (tier, a.policies[at].digest) for a in self.arms[name] if at in a.policies}
        return {seed: self.scores[key] for seed, key in sorted(keys.items()) if key in self.scores}

    def _table(self, title: str, columns: Sequence[str], cells: Callable[[str], Sequence[str]]) -> str:
        head = ["arm", *columns, *(f"{b:.0%}" for b in self.budgets)]
        lines = [title, "", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
        return "\n".join([*lines, *(f"| {name} | {' | '.join(cells(name))} |" for name in self.names)])


def volume(arm: Arm) -> float:
    """The hypervolume of an arm's validation front."""
    return front_volume(((ratio,), loss) for ratio, loss in arm.front)
