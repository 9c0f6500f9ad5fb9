"""The report's figures: the front beside its control arms, the sparsity heatmap, the cloud of trials."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from autoprune.front import Front, Point
from autoprune.front_table import cost_word as cost_word
from autoprune.report.read import Trial

COLOURS = {"search": "#2457d6", "uniform": "#d97b1c", "global": "#2d9a5f"}
SYMBOLS = {"uniform": "square", "global": "diamond"}
OTHER_ARMS = (("#c2337c", "triangle-up"), ("#7a4fd0", "star"), ("#0c8ea8", "cross"), ("#8a6d1f", "pentagon"))
"""Colour and symbol of control arms that are neither; again from the start where there are more."""
OTHER = "#7b8494"
SMALLEST_LOSS = 1e-6


def stylesheet() -> str:
    """The look that all pages share."""
    return (Path(__file__).parent / "style.css").read_text(encoding="utf-8")


def front_figure(front: Front, rows: Sequence[Mapping[str, Any]]) -> Any:
    """Loss (log) and the first metric against the first cost; control arms at the asked budgets, dense as a line."""
    cost = front.cost
    one_cost = len(front.provenance.get("objectives", ())) < 2  # points of a surface are not joined by a line
    dense = front.base.metrics.get("validation", {})
    metric = next(iter(dense), None)
    panels = [None, *([metric] if metric else [])]  # the loss first: a metric may bear any name, "loss" too
    figure = make_subplots(rows=1, cols=len(panels), horizontal_spacing=0.09)
    x = [point.ratio(cost) for point in front]
    hover = [f"{point.id}, trial {point.trial}{_timed(point, ', ')}" for point in front]
    for column, name in enumerate(panels, start=1):
        y = [_drawable(p.loss()) if name is None else p.metrics["validation"].get(name) for p in front]
        look = {"name": "search", "text": hover, "line": {"color": COLOURS["search"], "width": 2}}
        _add(figure, column, x, y, {**look, "mode": "lines+markers" if name is None and one_cost else "markers"})
        _add_arms(figure, column, rows, name, cost)
        figure.update_yaxes(title_text=name or "loss (log scale)", row=1, col=column)
        figure.update_xaxes(title_text=f"{cost_word(cost)} / dense", row=1, col=column)
    figure.update_yaxes(type="log", dtick="D2", exponentformat="power", row=1, col=1)
    if metric:
        _add_tuned(figure, len(panels), front, cost, metric)
        text = f"dense {dense[metric]:.4g}"
        figure.add_hline(y=dense[metric], line_dash="dot", line_color=OTHER, annotation_text=text, row=1, col=2)
    return _styled(figure, 430)


def heatmap_figure(front: Front) -> Any:
    """Sparsity of every group (rows, in execution order) at every point (columns, ascending in the first cost)."""
    cost = front.cost
    groups = front.base.groups
    widths = [point.policy.as_dict() for point in front]
    z = [[1.0 - w[group.name] / group.width for w in widths] for group in groups]
    text = [[f"{w[group.name]} of {group.width}" for w in widths] for group in groups]
    labels = [f"{point.id}<br>{point.ratio(cost):.2f}{_timed(point, '<br>')}" for point in front]
    hover = "%{y}<br>point %{x}<br>%{text} wide<br>sparsity %{z:.2f}<extra></extra>"
    bar = {"title": {"text": "sparsity"}, "thickness": 14}
    heat = go.Heatmap(z=z, x=labels, y=[g.name for g in groups], text=text, hovertemplate=hover)
    heat.update(colorscale="Blues", zmin=0, zmax=1, colorbar=bar, xgap=1, ygap=1)
    figure = go.Figure(heat)
    figure.update_yaxes(autorange="reversed", automargin=True)
    figure.update_xaxes(title_text=f"point and its {cost_word(cost)} / dense", type="category")
    return _styled(figure, 170 + 24 * len(groups))


def _timed(point: Point, before: str) -> str:
    """The measured latency beside a cost, where there is one."""
    return f"{before}latency {point.ratio('latency'):.2f}" if "latency" in point.costs else ""


def trials_figure(trials: Sequence[Trial], cost: str) -> Any:
    """Fitness loss against `cost` for all full evaluations, coloured by their order; None without any."""
    shown = [t for t in trials if t.loss is not None and t.full and t.split == "fitness" and t.stage != "final"]
    if not shown:
        return None
    found = [t for t in shown if t.stage == "search"]
    bar = {"title": {"text": "trial"}, "thickness": 14}
    marker = {"color": [t.index for t in found], "colorscale": "Viridis", "size": 6, "colorbar": bar, "opacity": 0.8}
    figure = make_subplots()
    _add(figure, 1, *_points(found, cost), {"name": "search", "marker": marker})
    arms = dict.fromkeys(_arm_of(t) for t in shown if t.stage == "seed" and "@" in t.label)
    for arm, (colour, symbol) in arm_looks(arms).items():
        seeds = [t for t in shown if t.stage == "seed" and _arm_of(t) == arm]
        mark = {"color": colour, "symbol": symbol, "size": 9}
        _add(figure, 1, *_points(seeds, cost), {"name": arm, "marker": mark, "text": [t.label for t in seeds]})
    figure.update_yaxes(type="log", dtick="D2", exponentformat="power", title_text="fitness loss (log scale)")
    figure.update_xaxes(title_text=f"{cost_word(cost)} / dense")
    return _styled(figure, 400)


def to_html(figure: Any, inline_library: bool = False) -> str:
    """The figure as a piece of HTML; the first one of a page carries plotly itself, so that the page stands alone."""
    library = "inline" if inline_library else False
    config = {"displayModeBar": False, "responsive": True}
    return str(figure.to_html(full_html=False, include_plotlyjs=library, config=config))


def arm_looks(arms: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Colour and symbol of each control arm."""
    others = [arm for arm in arms if arm not in SYMBOLS]
    looks = {arm: OTHER_ARMS[i % len(OTHER_ARMS)] for i, arm in enumerate(others)}
    looks |= {arm: (COLOURS[arm], symbol) for arm, symbol in SYMBOLS.items()}
    return {arm: looks[arm] for arm in arms}


def _arm_of(trial: Trial) -> str:
    """The arm of a label such as "uniform@0.5"."""
    return trial.label.rpartition("@")[0]


def _points(trials: Sequence[Trial], cost: str) -> tuple[list[float], list[float | None]]:
    return [t.costs[cost] for t in trials], [t.loss for t in trials]


def _add(figure: Any, column: int, x: Sequence[Any], y: Sequence[Any], look: Mapping[str, Any]) -> None:
    """One trace with plotly's properties `look`; an empty one is left out, one name appears once in the legend."""
    if x:
        trace = go.Scatter(x=list(x), y=list(y), legendgroup=look["name"], mode="markers")
        trace.update(showlegend=look["name"] not in {other.name for other in figure.data}, **look)
        figure.add_trace(trace, row=1, col=column)


def _add_arms(figure: Any, column: int, rows: Sequence[Mapping[str, Any]], name: str | None, cost: str) -> None:
    """The control arms of the summary: at each asked budget a mark, an open one for the fine-tuned metric.

    `name` is a metric; None for the loss.
    """
    arms = dict.fromkeys(str(row["arm"]) for row in rows if row.get("arm") != "search")
    for arm, (colour, symbol) in arm_looks(arms).items():
        own = [row for row in rows if row.get("arm") == arm and cost_ratio(row, cost) is not None]
        y = [row.get("loss") if name is None else (row.get("metrics") or {}).get(name) for row in own]
        marker = {"color": colour, "symbol": symbol, "size": 10}
        _add(figure, column, [cost_ratio(row, cost) for row in own], y, {"name": arm, "marker": marker})
        tuned = [row for row in own if name is not None and name in (row.get("finetuned") or {})]
        y = [row["finetuned"][name] for row in tuned]
        look = {"name": f"{arm}, fine-tuned", "marker": {**marker, "symbol": f"{symbol}-open"}}
        _add(figure, column, [cost_ratio(row, cost) for row in tuned], y, look)


def _add_tuned(figure: Any, column: int, front: Front, cost: str, metric: str) -> None:
    tuned = [point for point in front if metric in point.metrics.get("finetuned", {})]
    y = [point.metrics["finetuned"][metric] for point in tuned]
    marker = {"color": COLOURS["search"], "symbol": "circle-open", "size": 10}
    x = [point.ratio(cost) for point in tuned]
    _add(figure, column, x, y, {"name": "search, fine-tuned", "marker": marker})


def _drawable(loss: float) -> float | None:
    """A loss for a log axis; one of zero (the dense model) has no place there, and a gap is honest."""
    return None if loss < SMALLEST_LOSS else loss


def cost_ratio(row: Mapping[str, Any], cost: str) -> float | None:
    """A cost of a row of the summary over the dense model's; None where nothing stands there, as in older logs."""
    found = (row.get("costs") or {}).get(cost)
    return row.get("macs_ratio") if found is None and cost == "macs" else found


def _styled(figure: Any, height: int) -> Any:
    legend = {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0}
    margin = {"l": 60, "r": 20, "t": 40, "b": 55}
    font = {"family": 'system-ui, "DejaVu Sans", sans-serif', "size": 13}
    figure.update_layout(template="plotly_white", height=height, legend=legend, margin=margin, font=font)
    return figure
