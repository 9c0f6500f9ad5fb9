"""A front as rows of figures: what the command line, CSV files, data frames and notebooks show of it."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from autoprune.front import Base, Front, Point

DENSE = "dense"
"""What the row of the dense model is called."""
TUNED = {"validation": "", "finetuned": " tuned"}
"""What is known of a point: as it was cut and repaired, and after its fine-tune."""
WORDS = {"macs": "MACs", "nonzeros": "nonzero weights", "effective_macs": "effective MACs"}
"""Costs whose name in files is not the word for people."""
OF_SHAPES = ("macs", "params")
"""Costs that stay as they are where no shape changes."""
TOLD = 4
"""Figures that one line names."""


@dataclass(frozen=True)
class FrontTable:
    """The dense model and the points: `headings` and, for each row, its id and as many figures; None where unknown.

    Costs are ratios to the dense model; MACs and parameters that are dense in every point have no column unless they
    are an objective. Losses and metrics are those on validation, and "tuned" those after the fine-tune that the point
    was given. The dense model has no loss of its own: the others are measured against it.
    """

    headings: tuple[str, ...]
    rows: tuple[tuple[str, tuple[float | None, ...]], ...]


def front_table(front: Front) -> FrontTable:
    """The points of `front` in its own order, below the dense model."""
    asked = front.provenance.get("objectives") or [front.cost]
    costs = [c for c in costs_of(front) if c in asked or not unchanged(c, (ratio_of(p, c) for p in front))]
    dense = front.base.metrics.get("validation", {})
    metrics = list(dict.fromkeys([*dense, *_names(p.metrics.get("validation", {}) for p in front)]))
    tuned = _names(p.metrics.get("finetuned", {}) for p in front)
    has_tuned = any("finetuned" in p.losses for p in front)
    headings = [*(cost_word(c) for c in costs), "loss", *metrics]
    headings += [*(["loss tuned"] if has_tuned else []), *(f"{m} tuned" for m in tuned)]
    rows = []
    for point in front:
        figures = [ratio_of(point, c) for c in costs] + [_loss(point, "validation")]
        figures += [point.metrics.get("validation", {}).get(m) for m in metrics]
        figures += [_loss(point, "finetuned")] if has_tuned else []
        figures += [point.metrics.get("finetuned", {}).get(m) for m in tuned]
        rows.append((point.id, tuple(figures)))
    first = [*(1.0 for _ in costs), None, *(dense.get(m) for m in metrics)]
    padded = (*first, *(None for _ in headings[len(first) :]))
    return FrontTable(tuple(headings), ((DENSE, padded), *rows))


def costs_of(front: Front) -> list[str]:
    """The costs that a ratio to the dense model is known of: the one that the points ascend in first."""
    timed = ["latency"] if any("latency" in p.costs for p in front) else []
    known = [*front.base.costs, *timed]
    return sorted(known, key=lambda cost: cost != front.cost)


def ratio_of(point: Point, cost: str) -> float | None:
    """The ratio of a cost to the dense model; None where the point or the dense model has none."""
    known = cost in point.costs and (cost == "latency" or cost in point.base.costs)
    return point.ratio(cost) if known else None


def flat_row(point: Point) -> dict[str, Any]:
    """A point as a row of front.csv: id, costs, losses (`loss.validation`), metrics (`validation.accuracy`), widths."""
    row: dict[str, Any] = {"id": point.id, "trial": point.trial}
    for name, value in point.costs.items():
        if isinstance(value, Mapping):
            row |= {f"{name}.{k}": v for k, v in value.items()}
        else:
            row[name] = value
    for split, loss in point.losses.items():
        row |= {f"loss.{split}{'' if k == 'loss' else f'.{k}'}": v for k, v in loss.items() if k != "name"}
    for split, values in point.metrics.items():
        row |= {f"{split}.{k}": v for k, v in values.items()}
    return row | {f"width.{name}": width for name, width in point.policy.widths}


def cost_word(cost: str) -> str:
    """How a cost is written for people."""
    return WORDS.get(cost, cost)


def unchanged(cost: str, ratios: Iterable[float | None]) -> bool:
    """Whether a table of these points need not show MACs or parameters: wherever they are known they are dense."""
    known = {ratio for ratio in ratios if ratio is not None}
    return cost in OF_SHAPES and known == {1.0}


def figure(value: float | None) -> str:
    """A figure of a table."""
    return "-" if value is None else f"{value:.4g}"


def front_words(front: Front) -> str:
    """A front in one line: how many points of which model, and what they range over."""
    said = f"Front: {len(front)} point{'s' * (len(front) != 1)} of {front.base.model}"
    ratios = [ratio for p in front if (ratio := ratio_of(p, front.cost)) is not None]
    if ratios:
        said += f", {cost_word(front.cost)} {figure(min(ratios))} to {figure(max(ratios))} of dense"
    losses = [loss for p in front if (loss := _loss(p, "validation")) is not None]
    if losses:
        said += f", {_loss_name(front[0])} {figure(max(losses))} to {figure(min(losses))}"
    return f"<{said}>"


def point_words(point: Point) -> str:
    """A point in one line: its costs as ratios to dense, and how it scores."""
    ratios = ((cost, ratio_of(point, cost)) for cost in (*point.base.costs, "latency"))
    costs = ", ".join(f"{cost_word(cost)} {figure(ratio)}" for cost, ratio in ratios if ratio is not None)
    splits = [split for split in TUNED if split in point.losses]
    told = "".join(f";{TUNED[split]} {_scores(point, split)}" for split in splits)
    return f"<Point {point.id}: {costs} of dense{told}>"


def base_words(base: Base) -> str:
    """The dense model in one line."""
    costs = ", ".join(f"{cost_word(name)} {count_words(value)}" for name, value in base.costs.items())
    scores = _few(base.metrics.get("validation", {}))
    return f"<Base: {base.model}, {len(base.groups)} groups, {costs}{'; ' * bool(scores)}{scores}>"


def front_html(front: Front) -> str:
    """The table of a front for a notebook."""
    table = front_table(front)
    rows = [(name, *map(figure, figures)) for name, figures in table.rows]
    return _html(front_words(front)[1:-1], ("point", *table.headings), rows)


def point_html(point: Point) -> str:
    """A point beside the dense model for a notebook, and the width of each group."""
    base = point.base
    there = [name for name in base.costs if name in point.costs]
    rows = [
        (cost_word(n), count_words(base.costs[n]), count_words(point.costs[n]), figure(point.ratio(n))) for n in there
    ]
    if "latency" in point.costs:
        rows.append(("latency", "", "", figure(point.ratio("latency"))))
    for split, word in TUNED.items():
        if split in point.losses:
            rows.append((f"{_loss_name(point)}{word}", "", figure(_loss(point, split)), ""))
        dense = base.metrics.get("validation", {})
        for name, value in point.metrics.get(split, {}).items():
            rows.append((f"{name}{word}", figure(dense.get(name)), figure(value), ""))
    widths = [(g.name, str(g.width), str(point.policy.as_dict()[g.name])) for g in base.groups]
    groups = _html("", ("group", DENSE, point.id), widths)
    shown = _html(f"Point {point.id} of {base.model}", ("", DENSE, point.id, "ratio"), rows)
    return f"{shown}<details><summary>widths of {len(widths)} groups</summary>{groups}</details>"


def _html(caption: str, headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(h.replace('_', ' '))}</th>" for h in headings)
    body = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    said = f"<caption>{html.escape(caption)}</caption>" if caption else ""
    return f"<table>{said}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _scores(point: Point, split: str) -> str:
    return _few({_loss_name(point): _loss(point, split), **point.metrics.get(split, {})})


def _few(figures: Mapping[str, float | None]) -> str:
    """The first of them with their names, and how many more there are."""
    told = [f"{name} {figure(value)}" for name, value in list(figures.items())[:TOLD]]
    return ", ".join([*told, *([f"and {more} more"] if (more := len(figures) - TOLD) > 0 else [])])


def _loss(point: Point, split: str) -> float | None:
    return point.loss(split) if split in point.losses else None


def _loss_name(point: Point) -> str:
    return str(point.losses.get("validation", {}).get("name") or "loss")


def count_words(value: Any) -> str:
    """An absolute cost for people."""
    return f"{value:,.0f}" if float(value).is_integer() else figure(value)


def _names(tables: Iterable[Mapping[str, float]]) -> list[str]:
    return list(dict.fromkeys(name for table in tables for name in table))
