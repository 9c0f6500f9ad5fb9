"""A whole synthetic front and a run folder around it, for tests of files, report and command line."""

from __future__ import annotations

import json
from collections.abc import Iterator
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
from autoprune.run.summary import beat_words
from autoprune.structure import Group, Slice, Structure
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
        metrics={"validation": {"accuracy": 0.98}},
        groups=structure.groups,
        space={"granularity": "channel", "criterion": "obs", "multiple_of": 1},
        data="sha256:" + "1" * 64,
        order={g.name: _order(g, seed) for g in structure if g.name != "layer3"},
    )
    points = tuple(_point(f"p{i:02d}", share, structure, base, seed + i) for i, share in enumerate(SHARES))
    provenance = {"autoprune": "0.1.0", "job_sha256": "sha256:" + "2" * 64, "sampler": "evolution", "trials": 40}
    return Front(points, base, {"device": "cpu", "threads": 1}, {**provenance, "seed": 0, "created": "2026-01-01"})


def _point(name: str, share: float, structure: Structure, base: Base, seed: int) -> Point:
    rng = np.random.default_rng(seed)
    widths = {g.name: max(1, round(share * g.width)) for g in structure}
    keep = {g.name: tuple(sorted(base.order.get(g.name, _order(g, seed))[: widths[g.name]])) for g in structure}
    if name == "p02":  # ranked anew, as after an apply to other weights
        keep["layer1"] = tuple(sorted(int(a) for a in rng.permutation(structure.group("layer1").width)))[
            : widths["layer1"]
        ]
    policy = Policy.of(widths)
    ratio = {
        "macs": float(Macs(structure)(policy.array(structure))),
        "params": float(Params(structure)(policy.array(structure))),
    }
    costs = {"macs": round(ratio["macs"] * base.costs["macs"]), "macs_ratio": ratio["macs"]}
    costs["params"] = round(ratio["params"] * base.costs["params"])
    losses = {"validation": {"name": "kl", "loss": 0.8 * (1.0001 - share) ** 2}}
    metrics = {"validation": {"accuracy": 0.98 - 0.1 * (1 - share)}}
    tuned = {"recipe": "proxy", "steps": 100, "seed": 0} if name in ("p01", "p03") else {}
    if tuned:
        losses["finetuned"] = {"name": "kl", "loss": 0.4 * (1.0001 - share) ** 2, "low": 0.0, "high": 1.0}
        metrics["finetuned"] = {"accuracy": 0.98 - 0.02 * (1 - share)}
    return Point(name, policy, keep, costs, losses, metrics, trial=10 * seed, base=base, finetuned=tuned)


def _order(group: Group, seed: int) -> tuple[int, ...]:
    return tuple(int(a) for a in np.random.default_rng((seed, group.width)).permutation(group.width))


def resnet50_front(n_points: int) -> Front:
    """As many points over groups as in a ResNet-50: every width allowed, kept atoms the first of a random order."""
    rng = np.random.default_rng(0)
    groups = tuple(_resnet50_groups())
    order = {g.name: tuple(int(a) for a in rng.permutation(g.width)) for g in groups}
    shapes = {
        s.tensor: (2048, 512, 3, 3) if s.tensor.endswith("conv.weight") else (2048,) for g in groups for s in g.slices
    }
    base = replace(synthetic_front().base, groups=groups, order=order, shapes=shapes)
    points = []
    for i in range(n_points):
        widths = {g.name: int(rng.integers(1, g.width + 1)) for g in groups}
        keep = {name: tuple(sorted(order[name][:w])) for name, w in widths.items()}
        first = replace(synthetic_front()[1], id=f"p{i:02d}", policy=Policy.of(widths), keep=keep, base=base, trial=i)
        points.append(first)
    return replace(synthetic_front(), base=base, points=tuple(points))


def _resnet50_groups() -> Iterator[Group]:
    """The stem, two inner groups a block, and a residual stream a stage, each with norms and readers."""
    yield _made("conv1", 64, 5)
    for stage, (planes, blocks) in enumerate(((64, 3), (128, 4), (256, 6), (512, 3)), start=1):
        yield _made(f"layer{stage}.0.conv3", 4 * planes, 7 * blocks)
        for block in range(blocks):
            for conv in ("conv1", "conv2"):
                yield _made(f"layer{stage}.{block}.{conv}", planes, 6)


def _made(name: str, width: int, n_slices: int) -> Group:
    tensors = [f"{name}.{i}.{'conv' if i % 2 else 'bn'}.weight" for i in range(n_slices)]
    slices = tuple(Slice(t, i % 2, "consume" if i else "produce") for i, t in enumerate(tensors))
    return Group(name, "channel", width, slices, tuple(range(1, width + 1)))


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
            words = beat_words("the search", "global 0.2", beat=search_wins)
            rows.append({**row, "finetuned": tuned, "beat": search_wins, "note": f"at {budget}: {words}"})
    return rows


def with_points(front: Front, points: tuple[Point, ...]) -> Front:
    return replace(front, points=points)
