"""sensitivity.html: what each group costs in loss when it alone is narrowed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from plotly.colors import sample_colorscale

from autoprune.allocation.sensitivity import Table
from autoprune.files.whole import write_whole
from autoprune.report.figures import COLOURS, SMALLEST_LOSS, cost_word, to_html

PAGE = (
    '<!doctype html><html lang="en"><meta charset="utf-8"><title>Sensitivity of {name}</title>'
    "<style>body{{font:15px/1.5 system-ui,sans-serif;max-width:1080px;margin:2em auto;padding:0 1em;color:#1d2530}}"
    "h1{{font-size:1.5em}}p{{color:#4b5a73}}</style><h1>Sensitivity of {name}</h1><p>Loss of the repaired model with "
    "one group alone narrowed; one whose line stays low can be pruned hard. Dark lines are early in the network.</p>"
    "{figure}<h1>What it predicts</h1><p>The summed losses of the knapsack's policies, from which a search starts. "
    "Losses of several groups at once rarely add up: read the order, not the height.</p>{predicted}</html>"
)


def build_sensitivity(table: Table, predicted: Sequence[tuple[float, float]], cost: str, path: Path, name: str) -> Path:
    """Write the plots of a sensitivity table and of its `predicted` (cost, loss) to the file `path`; returns it."""
    first, second = sensitivity_figure(table), predicted_figure(predicted, cost)
    write_whole(path, PAGE.format(name=name, figure=to_html(first, inline_library=True), predicted=to_html(second)))
    return path


def predicted_figure(predicted: Sequence[tuple[float, float]], cost: str) -> Any:
    """Predicted loss (log where it can be) against the budget's cost, without the dense model, which loses nothing."""
    costs, losses = zip(*(predicted[:-1] or predicted), strict=True)
    figure, positive = go.Figure(), min(losses) > 0
    figure.add_scatter(x=costs, y=losses, mode="lines+markers", line={"color": COLOURS["search"], "width": 2})
    figure.update_xaxes(title_text=f"{cost_word(cost)} / dense")
    return _styled(figure, "predicted loss", positive, 420)


def sensitivity_figure(table: Table) -> Any:
    """Loss (log) against the width of each group as a share of its dense width."""
    figure = go.Figure()
    positive = all(loss >= 0 for row in table.values() for loss in row.values())
    shades = sample_colorscale("Viridis", [i / max(1, len(table) - 1) * 0.9 for i in range(len(table))])
    for shade, (name, row) in zip(shades, table.items(), strict=True):
        widths = sorted(w for w in row if w < max(row)) if positive else sorted(row)
        x = [w / max(row) for w in widths]
        y = [max(row[w], SMALLEST_LOSS) if positive else row[w] for w in widths]
        hover = [f"{name}, {w} of {max(row)}" for w in widths]
        line = {"color": shade, "width": 2}
        figure.add_scatter(
            x=x, y=y, text=hover, name=name, mode="lines+markers", line=line, hovertemplate="%{text}: %{y:.4g}"
        )
    figure.update_xaxes(title_text="width / dense width", autorange="reversed")
    return _styled(figure, "loss", positive, 520)


def _styled(figure: Any, what: str, logarithmic: bool, height: int) -> Any:
    scale = "log" if logarithmic else "linear"
    figure.update_yaxes(title_text=f"{what} (log scale)" if logarithmic else what, type=scale)
    figure.update_yaxes(dtick="D2" if logarithmic else None, exponentformat="power")
    figure.update_layout(template="plotly_white", height=height, margin={"t": 20, "r": 10}, font={"size": 13})
    return figure
