"""A whole synthetic front and a run folder around it, for tests of files, report and command line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np

from autoprune.costs.macs import Macs
from autoprune.costs.params import Params
from autoprune.evaluation import Ask, Evaluation
from autoprune.files.policy_file import save_front
from autoprune.front import Base, Front, Point
from autoprune.policy import Policy
from autoprune.record.record import Record
from autoprune.structure import Structure
from tests.synthetic import chain

SHARES = (0.3, 0.45, 0.6, 0.75, 0.9, 1.0)


def synthetic_front(n_groups: int = 4, seed: int = 0) -> Front:
    """Six points from narrow to dense over a chain of `n_groups` groups; two of them with fine-tuned metrics."""
    structure = chain(n_groups, seed)
    macs, params = Macs(structure), Params(structure)
    dense = {"macs": int(macs.dense), "params": int(params.dense)}
    base = Base(
        structure_fingerprint=structure.fingerprint,
        weights_fingerprint="sha256:" + "0" * 64,
        model="mypkg.models:Chain",
        inputs=({"shape": [2, 3, 16, 16], "dtype": "float32"},),
        costs=dense,
        metrics={"validation": {"loss": 0.0, "accuracy": 0.98}},
        groups=structure.groups,
        space={"granularity": "channel", "criterion": "obs", "multiple_of": 1},
        data="sha256:" + "1" * 64,
    )
    points = tuple(_point(f"p{i:02d}", share, structure, base, seed + i) for i, share in enumerate(SHARES))
    provenance = {"autoprune": "0.1.0", "job_sha256": "sha256:" + "2" * 64, "sampler": "evolution", "trials": 40}
    return Front(points, base, {"device": "cpu", "threads": 1}, {**provenance, "seed": 0, "created": "2026-01-01"})


def _point(name: str, share: float, structure: Structure, base: Base, seed: int) -> Point:
    rng = np.random.default_rng(seed)
    widths = {g.name: max(1, round(share * g.width)) for g in structure}
    keep = {g.name: tuple(sorted(int(a) for a in rng.permutation(g.width)[: widths[g.name]])) for g in structure}
    policy = Policy.of(widths)
    ratio = {
        "macs": float(Macs(structure)(policy.array(structure))),
        "params": float(Params(structure)(policy.array(structure))),
    }
    costs = {"macs": round(ratio["macs"] * base.costs["macs"]), "macs_ratio": ratio["macs"]}
    costs["params"] = round(ratio["params"] * base.costs["params"])
    metrics = {"validation": {"loss": 0.8 * (1.0001 - share) ** 2, "accuracy": 0.98 - 0.1 * (1 - share)}}
    if name in ("p01", "p03"):
        metrics["finetuned"] = {"accuracy": 0.98 - 0.02 * (1 - share), "steps": 100}
    return Point(name, policy, keep, costs, metrics, trial=10 * seed, base=base)


def write_run(folder: Path, front: Front, search_wins: bool = True) -> None:
    """policy.json, study.journal and log.jsonl as a finished search leaves them."""
    folder.mkdir(parents=True, exist_ok=True)
    save_front(front, folder / "policy.json")
    structure = Structure(front.base.groups, (), {}, front.base.structure_fingerprint)
    with Record(folder, structure, ("macs",)) as record:
        for i, point in enumerate(front):
            ask, costs = Ask(point.policy, "refit"), {"macs": point.costs["macs_ratio"]}
            if i < 2:
                label = ("uniform@0.5", "global@0.5")[i]
                record.add(i, Evaluation(ask, 0.5, costs, {"accuracy": 0.9}, 1.0, 0.1), "seed", label)
            else:
                record.add(i, Evaluation(ask, 0.3 / i, costs, {"accuracy": 0.9}, 1.0, 0.1), "search")
        failed = Evaluation.failed(Ask(front[0].policy, "refit", 0.5), "loss is NaN", {"macs": 0.3})
        record.add(99, failed, "search")
    lines = [{"event": "start"}, {"event": "summary", "rows": summary_rows(front, search_wins)}]
    (folder / "log.jsonl").write_text("\n".join(json.dumps(line) for line in lines) + "\n", encoding="utf-8")


def summary_rows(front: Front, search_wins: bool) -> list[dict[str, object]]:
    """Rows for the budgets 0.7 and 0.3, search beside uniform and global."""
    rows: list[dict[str, object]] = []
    for budget in (0.7, 0.3):
        for arm, loss in (("search", 0.05 if search_wins else 0.5), ("uniform", 0.3), ("global", 0.2)):
            point = front.select(macs=budget)
            tuned = {"accuracy": 0.975, "steps": 100} if arm == "search" else None
            row = {"budget": f"macs={budget}", "arm": arm, "point": point.id if arm == "search" else None}
            row |= {"macs_ratio": budget - 0.01, "loss": loss, "metrics": {"accuracy": 0.97 - loss / 10}}
            rows.append({**row, "finetuned": tuned, "note": None})
    return rows


def with_points(front: Front, points: tuple[Point, ...]) -> Front:
    return replace(front, points=points)
