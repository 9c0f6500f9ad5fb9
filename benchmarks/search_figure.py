"""The curves of the search benchmark as one SVG: best loss so far against the ledger, a panel a budget, a line an arm.

Written by hand: a figure in a README must show without scripts, and needs no drawing library for a few polylines.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from autoprune.files.whole import write_whole
from benchmarks.search_results import Arm

FloatArray = npt.NDArray[np.float64]
COLOURS = ("#7b8494", "#d97b1c", "#2d9a5f", "#a05ab8", "#c23b4e", "#0f9bb0")
OURS = "#2457d6"
STEPS = 150
TICKS = (1, 1.5, 2, 3, 4, 5, 7)
LEFT, TOP, WIDTH, HEIGHT, GAP = 52, 64, 268, 250, 48


@dataclass(frozen=True)
class Line:
    """An arm at one budget: geometric mean and range of its seeds' best losses along the ledger."""

    name: str
    n_seeds: int
    spent: FloatArray
    mean: FloatArray
    low: FloatArray
    high: FloatArray


def draw(arms: Sequence[Arm], budgets: Sequence[float], trials: int, path: Path) -> None:
    """Write the figure; arms without a curve are left out."""
    names = list(dict.fromkeys(a.name for a in arms if a.curve))
    others = [n for n in names if n != "evolution"]
    colours = {"evolution": OURS} | dict(zip(others, COLOURS * len(others), strict=False))
    panels = [[line for n in names if (line := line_of(arms, n, at, trials))] for at in budgets]
    width, height = LEFT + len(budgets) * (WIDTH + GAP), TOP + HEIGHT + 48
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="system-ui, DejaVu Sans, sans-serif" font-size="12" fill="#1c2430">',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        *legend(arms, names, colours),
    ]
    for i, (at, lines) in enumerate(zip(budgets, panels, strict=True)):
        parts += panel(LEFT + i * (WIDTH + GAP), f"{at:.0%} of the MACs", lines, trials, colours)
    write_whole(path, "\n".join([*parts, "</svg>"]) + "\n")


def line_of(arms: Sequence[Arm], name: str, at: float, trials: int) -> Line | None:
    """From where on the ledger all seeds have a loss; None where some seed never has one."""
    curves = [np.array(a.curve.get(at, ())).reshape(-1, 2) for a in arms if a.name == name]
    if not curves or not all(len(c) for c in curves):
        return None
    spent = np.linspace(max(c[0, 0] for c in curves), trials, STEPS)
    best = [c[np.maximum(0, np.searchsorted(c[:, 0], spent + 1e-9, side="right") - 1), 1] for c in curves]
    logs = np.log(np.array(best))
    return Line(name, len(curves), spent, *(np.exp(f(logs, axis=0)) for f in (np.mean, np.min, np.max)))


def legend(arms: Sequence[Arm], names: Sequence[str], colours: Mapping[str, str]) -> list[str]:
    """One row above the panels, each arm with its number of seeds."""
    words = "least fitness KL so far, log scale; geometric mean of (so many) seeds, band: their range"
    parts, x = [f'<text x="{LEFT}" y="18">{words}</text>'], float(LEFT)
    for name in names:
        text = f"{name} ({sum(a.name == name for a in arms)})"
        parts.append(f'<path d="M{x} 34h18" stroke="{colours[name]}" stroke-width="{thickness(name)}"/>')
        parts.append(f'<text x="{x + 23}" y="38">{text}</text>')
        x = round(x + 40 + 6.6 * len(text), 1)
    return parts


@dataclass(frozen=True)
class Panel:
    """A panel's place and scales; losses run by their logarithm from `low` to `high`."""

    x: float
    trials: int
    low: float
    high: float

    def place(self, spent: FloatArray, loss: FloatArray) -> str:
        """Points of the drawing."""
        share = np.log(np.clip(loss, self.low, self.high) / self.low) / np.log(self.high / self.low)
        across, down = self.x + WIDTH * spent / self.trials, TOP + HEIGHT * (1 - share)
        return " ".join(f"{a:.1f},{d:.1f}" for a, d in zip(across, down, strict=True))

    def axes(self) -> list[str]:
        """Ticks at round multiples of a power of ten; words."""
        parts = []
        for tick in (t for t in (m * 10.0**e for e in range(-6, 3) for m in TICKS) if self.low < t < self.high):
            y = float(self.place(np.zeros(1), np.array([tick])).split(",")[1])
            parts.append(f'<path d="M{self.x} {y}h{WIDTH}" stroke="#e3e7ee"/>')
            parts.append(f'<text x="{self.x - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
        for share in (0.0, 0.5, 1.0):
            spot = f'x="{self.x + share * WIDTH}" y="{TOP + HEIGHT + 18}" text-anchor="middle"'
            parts.append(f"<text {spot}>{share * self.trials:.0f}</text>")
        spot = f'x="{self.x + WIDTH / 2}" y="{TOP + HEIGHT + 38}" text-anchor="middle"'
        parts.append(f"<text {spot}>full evaluations spent</text>")
        return [*parts, f'<path d="M{self.x} {TOP}v{HEIGHT}h{WIDTH}" stroke="#9aa3b2" fill="none"/>']

    def line(self, line: Line, colour: str) -> list[str]:
        """The mean, over a band where there are several seeds."""
        there, back = self.place(line.spent, line.high), self.place(line.spent[::-1], line.low[::-1])
        band = [f'<polygon points="{there} {back}" fill="{colour}" opacity="0.15"/>'] if line.n_seeds > 1 else []
        look = f'stroke="{colour}" stroke-width="{thickness(line.name)}" fill="none"'
        return [*band, f'<polyline points="{self.place(line.spent, line.mean)}" {look}/>']


def panel(x: float, title: str, lines: Sequence[Line], trials: int, colours: Mapping[str, str]) -> list[str]:
    """One budget; the axis leaves out the losses of the first, steep tenth of the ledger."""
    parts = [f'<text x="{x}" y="{TOP - 8}" font-weight="600">{title}</text>']
    if not lines:
        return [*parts, f'<text x="{x + 20}" y="{TOP + HEIGHT / 2}">nothing measured yet</text>']
    low = min(float(line.low.min()) for line in lines) * 0.95
    high = max(float(line.mean[line.spent >= min(trials / 10, line.spent[-1])].max()) for line in lines) * 1.1
    drawn = Panel(x, trials, low, high)
    parts += drawn.axes()
    for line in sorted(lines, key=lambda line: line.name == "evolution"):
        parts += drawn.line(line, colours[line.name])
    return parts


def thickness(name: str) -> float:
    """Ours stands out."""
    return 2.4 if name == "evolution" else 1.6
