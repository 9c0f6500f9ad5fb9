"""compare.html: verdicts first, then loss and metric against cost with bands over the seeds, then the table."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
import numpy.typing as npt
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from autoprune.files.whole import write_whole
from autoprune.report.figures import COLOURS, OTHER, SMALLEST_LOSS, cost_word, stylesheet, to_html

FloatArray = npt.NDArray[np.float64]
PALETTE = ("#2457d6", "#c2337c", "#7a4fd0", "#0c8ea8", "#8a6d1f", "#c4472d", "#4b5a73", "#5f8f1d")
"""For all that is neither uniform nor global; again from the start where there are more."""
SYMBOLS = ("circle", "triangle-up", "star", "cross", "x", "pentagon", "hexagon", "triangle-down")
CONTROL_SYMBOLS = {"uniform": "square", "global": "diamond"}
N_GRID = 120
AIR = 0.02
CAPTION = (
    "Lines: the mean of the seeds' fronts (of the loss's logarithm where the axis is one), as far as all seeds reach. "
    "Bands: from the lowest seed to the highest; for a strategy that is the same at every seed, the 95 % bootstrap "
    "interval of the loss over the samples. Marks: the points at the asked budgets (dotted), mean over the seeds."
)


def build_comparison(folder: Path, document: Mapping[str, Any]) -> Path:
    """Write FOLDER/compare.html from the document of compare.json; returns its path."""
    document = in_todays_form(document)
    names = list(dict.fromkeys(row["strategy"] for row in document["summary"]))
    budgets = list(dict.fromkeys(row["budget"] for row in document["summary"]))
    seeds = len(dict.fromkeys(arm["seed"] for arm in document["cells"]))
    metric = metric_of(document)
    cost = cost_word(document["cost"])
    asked = ", ".join(f"{b:g}" for b in budgets)
    page = Template((Path(__file__).parent / "comparison.html").read_text(encoding="utf-8"))
    text = page.substitute(
        style=stylesheet(),
        title=html.escape(f"{', '.join(names[:-1])} and {names[-1]}" if len(names) > 1 else names[0]),
        subtitle=html.escape(
            f"{cost} at most {asked} of dense; {seeds} seed{'s' * (seeds > 1)}; {document['trials']} full evaluations "
            f"for every search; fitness tier {document['tier']}"
        ),
        verdicts=_verdicts(document["verdicts"]),
        rule=html.escape(document["rule"]),
        and_metric="" if metric is None else html.escape(f" and {metric}"),
        cost=html.escape(cost),
        figure=to_html(comparison_figure(document), inline_library=True),
        caption=html.escape(CAPTION),
        table=_table(document, looks_of(names)),
        about="".join(f"<dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd>" for k, v in document["about"].items()),
    )
    path = folder / "compare.html"
    write_whole(path, text)
    return path


def in_todays_form(document: Mapping[str, Any]) -> dict[str, Any]:
    """A document as it is written now; version 0.1.0 knew MACs and an accuracy only. Its `cells` are the arms."""
    if "metric" in document:
        return dict(document)

    def named(row: Mapping[str, Any]) -> dict[str, Any]:
        new = {
            "macs_ratio": "cost_ratio",
            "accuracy": "value",
            "macs_ratio_sd": "cost_ratio_sd",
            "accuracy_sd": "value_sd",
        }
        return {**row, **{today: row[old] for old, today in new.items() if old in row}}

    arms = [{**arm, "front": [named(point) for point in arm["front"]]} for arm in document["cells"]]
    about = {"metric": "accuracy", "direction": "maximize", "controls": ["uniform", "global"]}
    return {**document, "cells": arms, "summary": [named(row) for row in document["summary"]], **about}


def metric_of(document: Mapping[str, Any]) -> str | None:
    """The task's first metric, where any point has it."""
    seen = any(row["value"] is not None for row in document["summary"])
    return str(document["metric"]) if seen else None


def comparison_figure(document: Mapping[str, Any]) -> Any:
    """Loss and, where the task has one, its first metric against the cost: a line, a band and marks a strategy."""
    document = in_todays_form(document)
    names = list(dict.fromkeys(row["strategy"] for row in document["summary"]))
    fields = ["loss", *([] if metric_of(document) is None else ["value"])]
    figure = make_subplots(rows=1, cols=len(fields), horizontal_spacing=0.09)
    for name, (colour, symbol) in looks_of(names).items():
        arms = [arm for arm in document["cells"] if arm["strategy"] == name]
        rows = [row for row in document["summary"] if row["strategy"] == name]
        for column, field in enumerate(fields, start=1):
            log = field == "loss" and document["log"]
            grid, low, mean, high = curves(arms, field, log)
            _add_band(figure, column, (grid, low, high), (name, colour))
            look = {"legendgroup": name, "name": name, "showlegend": column == 1}
            line = go.Scatter(x=grid, y=mean, mode="lines", line={"color": colour, "width": 2}, **look)
            line.update(showlegend=False, hoverinfo="skip")
            figure.add_trace(line, row=1, col=column)
            marker = {"color": colour, "symbol": symbol, "size": 9, "line": {"color": "white", "width": 1}}
            found = [row for row in rows if row[field] is not None and row["cost_ratio"] is not None]
            marks = go.Scatter(x=[r["cost_ratio"] for r in found], y=[r[field] for r in found], mode="lines+markers")
            marks.update(
                marker=marker,
                line={"color": "rgba(0,0,0,0)"},
                text=[_hover(row, field, document["metric"]) for row in found],
            )
            marks.update(hovertemplate="%{text}<extra></extra>", **look)
            figure.add_trace(marks, row=1, col=column)
    return _dressed(figure, document, fields)


def curves(arms: Sequence[Mapping[str, Any]], field: str, log: bool) -> tuple[FloatArray, ...]:
    """(grid, low, mean, high) of the seeds' fronts on a common grid of cost ratios, between the ends that all reach.

    Seeds that all have the same front are one measurement: its band is the bootstrap interval of the points.
    """
    fronts = [sorted(arm["front"], key=lambda p: p["cost_ratio"]) for arm in arms]
    fronts = [[p for p in front if p[field] is not None and _drawable(p[field], log)] for front in fronts]
    empty = np.array([])
    if not fronts or not all(fronts):
        return empty, empty, empty, empty
    start, end = max(f[0]["cost_ratio"] for f in fronts), min(f[-1]["cost_ratio"] for f in fronts)
    if start > end:
        return empty, empty, empty, empty
    same = all(front == fronts[0] for front in fronts)
    own = [p["cost_ratio"] for p in fronts[0] if start <= p["cost_ratio"] <= end] if same else []
    grid = np.unique([*np.linspace(start, end, N_GRID), *own])
    values = np.stack([_along(front, field, grid, log) for front in fronts])
    low, high = values.min(axis=0), values.max(axis=0)
    if same and field == "loss" and fronts[0][0]["low"] is not None:
        low, high = (_along(fronts[0], end, grid, log) for end in ("low", "high"))
    back = np.exp if log else np.asarray
    return grid, back(low), back(values.mean(axis=0)), back(high)


def looks_of(names: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Colour and symbol of each strategy: the report's own for the control arms, the palette in order for the rest."""
    rest = [name for name in names if name not in CONTROL_SYMBOLS]
    looks = {n: (PALETTE[i % len(PALETTE)], SYMBOLS[i % len(SYMBOLS)]) for i, n in enumerate(rest)}
    looks |= {name: (COLOURS[name], symbol) for name, symbol in CONTROL_SYMBOLS.items()}
    return {name: looks[name] for name in names}


def _along(front: Sequence[Mapping[str, Any]], field: str, grid: FloatArray, log: bool) -> FloatArray:
    y = np.array([p[field] for p in front], dtype=np.float64)
    y = np.log(np.maximum(y, SMALLEST_LOSS)) if log else y
    return np.interp(grid, [p["cost_ratio"] for p in front], y)


def _drawable(value: float, log: bool) -> bool:
    return not log or value >= SMALLEST_LOSS


def _add_band(figure: Any, column: int, band: tuple[FloatArray, ...], look: tuple[str, str]) -> None:
    grid, low, high = band
    if not len(grid) or np.array_equal(low, high):
        return
    name, colour = look
    x, y = np.concatenate([grid, grid[::-1]]), np.concatenate([high, low[::-1]])
    area = go.Scatter(x=x, y=y, fill="toself", mode="lines", line={"width": 0}, legendgroup=name, showlegend=False)
    area.update(fillcolor=_faint(colour), hoverinfo="skip", name=name)
    figure.add_trace(area, row=1, col=column)


def _faint(colour: str) -> str:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.14)"


def _hover(row: Mapping[str, Any], field: str, metric: str) -> str:
    what = metric if field == "value" else field
    return f"{html.escape(row['strategy'])} at {row['budget']:g}<br>{what} {_figure(row[field], row[f'{field}_sd'])}"


def _dressed(figure: Any, document: Mapping[str, Any], fields: Sequence[str]) -> Any:
    """Axes, the asked budgets, the dense model's metric, one legend above both panels."""
    cost, metric = cost_word(document["cost"]), metric_of(document)
    for column, field in enumerate(fields, start=1):
        log = field == "loss" and document["log"]
        figure.update_yaxes(
            title_text=f"{metric if field == 'value' else field}{' (log scale)' * log}", row=1, col=column
        )
        figure.update_xaxes(title_text=f"{cost} / dense", range=_span(document), row=1, col=column)
        if log:
            figure.update_yaxes(type="log", dtick="D2", exponentformat="power", row=1, col=column)
        for budget in dict.fromkeys(row["budget"] for row in document["summary"]):
            figure.add_vline(x=budget, line={"dash": "dot", "color": "#c9ced6", "width": 1}, row=1, col=column)
    if metric in document["dense"]:
        dense = document["dense"][metric]
        look = {"line_dash": "dash", "line_color": OTHER, "line_width": 1, "annotation_position": "right"}
        figure.add_hline(y=dense, annotation_text=f"dense<br>{dense:.4g}", **look, row=1, col=2)
    legend = {"orientation": "h", "y": 1.04, "yanchor": "bottom", "x": 0}
    font = {"family": 'system-ui, "DejaVu Sans", sans-serif', "size": 13}
    figure.update_layout(template="plotly_white", height=470, legend=legend, font=font)
    figure.update_layout(margin={"l": 60, "r": 60, "t": 50, "b": 55})
    return figure


def _span(document: Mapping[str, Any]) -> list[float] | None:
    """The range of the x axis: all points, and some air beside them."""
    ratios = [point["cost_ratio"] for arm in document["cells"] for point in arm["front"]]
    return [min(ratios) - AIR, max(ratios) + AIR] if ratios else None


def _verdicts(verdicts: Sequence[Mapping[str, Any]]) -> str:
    if not verdicts:
        return "<p>No control arm was compared with a layer-wise searcher, so there is nothing to judge.</p>"
    lines = []
    for verdict in verdicts:
        said, _, rest = verdict["text"].partition(": ")
        kind = verdict["outcome"].replace(" ", "-")
        lines.append(f'<li class="{kind}"><strong>{html.escape(said)}</strong>: {html.escape(rest)}</li>')
    return f'<ul class="verdicts">{"".join(lines)}</ul>'


def _table(document: Mapping[str, Any], looks: Mapping[str, tuple[str, str]]) -> str:
    rows, metric = document["summary"], metric_of(document)
    timed = ["latency_ratio"] if any(row.get("latency_ratio") is not None for row in rows) else []
    fields = ["cost_ratio", *timed, "loss", *([] if metric is None else ["value"]), "hypervolume"]
    words = {"cost_ratio": cost_word(document["cost"]), "value": html.escape((metric or "").replace("_", " "))}
    words |= {"latency_ratio": "latency"}
    headings = [words.get(f, f) for f in fields]
    lines = ['<table><tr><th>budget</th><th class="left">strategy</th>', *(f"<th>{h}</th>" for h in headings)]
    lines.append("<th>evaluations</th><th>seconds</th></tr>")
    seen: set[float] = set()
    for row in rows:
        first = row["budget"] not in seen
        seen.add(row["budget"])
        best = best_of([r for r in rows if r["budget"] == row["budget"]], document["direction"])
        swatch = f'<span class="swatch" style="background:{looks[row["strategy"]][0]}"></span>'
        asked = f"{row['budget']:g}" if first else ""
        lines.append(f"<tr{' class=first' if first else ''}><td>{asked}</td>")
        lines.append(f'<td class="left">{swatch}{html.escape(row["strategy"])}</td>')
        for field in fields:
            mark = ' class="best"' if row[field] is not None and row[field] == best.get(field) else ""
            spread = None if row["closed_form"] else row[f"{field}_sd"]
            lines.append(f"<td{mark}>{_figure(row[field], spread, ' <span class=spread>± {}</span>')}</td>")
        lines.append(f"<td>{row['evaluations']:.4g}</td><td>{row['seconds']:.3g}</td></tr>")
    rest = document.get("rest")
    return "".join([*lines, "</table>", f'<p class="note">{html.escape(rest)}</p>' if rest else ""])


def best_of(rows: Sequence[Mapping[str, Any]], direction: str) -> dict[str, float]:
    """The best mean loss, metric (which way says `direction`) and hypervolume of one budget's rows."""
    best: dict[str, float] = {}
    for field, choose in (("loss", min), ("value", min if direction == "minimize" else max), ("hypervolume", max)):
        values = [row[field] for row in rows if row[field] is not None]
        best |= {field: choose(values)} if values else {}
    return best


def _figure(mean: float | None, spread: float | None, pattern: str = " ± {}") -> str:
    if mean is None:
        return "-"
    return f"{mean:.4g}" + ("" if spread is None else pattern.format(f"{spread:.2g}"))
