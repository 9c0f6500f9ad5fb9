"""Time of one layer with zeros: torch's CSR product (MKL) over the dense one, by density and by columns of the product.

usage: OMP_NUM_THREADS=1 python -m benchmarks.sparse_time [--layers resnet20,minilm,square] [--densities 0.5,0.3,...]
       [--seconds 10] [--threads 1] [--results FILE] [--show]

resnet20: the 3x3 convolutions of its three stages, a single image and 32 at a time (columns: positions of all images).
minilm: query and feed-forward of MiniLM-L6, 1, 32 and 512 tokens. square: 1 024 by 1 024, 1, 32 and 512 columns. Ratios
are medians over rounds in turns, below 1 where the sparse product is faster; the last column is the largest density
from which on it is. Cells are kept in results/sparse_time.json, and what is there is not measured again.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from autoprune.files.whole import write_whole
from autoprune.latency.runtime_here import device_name
from autoprune.latency.sparse_layers import pays_from, sparse_times

RESULTS = Path(__file__).resolve().parent / "results" / "sparse_time.json"
DENSITIES = (0.5, 0.3, 0.2, 0.15, 0.1, 0.05, 0.025, 0.01)
COLUMNS = (1, 32, 512)
Cell = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """A layer and the shape of what it is given."""

    inputs: int
    outputs: int
    shape: tuple[int, ...]
    kernel: int = 0

    def layer(self) -> nn.Module:
        torch.manual_seed(0)
        if not self.kernel:
            return nn.Linear(self.inputs, self.outputs)
        return nn.Conv2d(self.inputs, self.outputs, self.kernel, padding=self.kernel // 2)


def _linear(inputs: int, outputs: int) -> dict[str, Case]:
    return {f"linear {inputs}x{outputs}, {n} rows": Case(inputs, outputs, (n, inputs)) for n in COLUMNS}


CASES: Mapping[str, Mapping[str, Case]] = {
    "resnet20": {
        f"conv {width}x{width} 3x3 at {side}, {n} images": Case(width, width, (n, width, side, side), 3)
        for width, side in ((16, 32), (32, 16), (64, 8))
        for n in (1, 32)
    },
    "minilm": {**_linear(384, 384), **_linear(384, 1536), **_linear(1536, 384)},
    "square": _linear(1024, 1024),
}


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", default=",".join(CASES))
    parser.add_argument("--densities", default=",".join(f"{d:g}" for d in DENSITIES))
    parser.add_argument("--seconds", type=float, default=10.0, help="of each layer, all densities together")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--show", action="store_true", help="the table of what there is")
    args = parser.parse_args(words)
    cells: dict[str, Cell] = json.loads(args.results.read_text(encoding="utf-8")) if args.results.exists() else {}
    densities = [float(d) for d in args.densities.split(",")]
    asked = [] if args.show else [(n, c) for group in args.layers.split(",") for n, c in CASES[group].items()]
    for name, case in asked:
        key = f"{name}, {args.threads} threads"
        kept = cells.get(key, {}).get("ratios", {})
        lacking = [d for d in densities if f"{d:g}" not in kept]
        if lacking:
            cells[key] = measured(case, lacking, args.threads, args.seconds, cells.get(key))
            write_whole(args.results, json.dumps(cells, indent=1, sort_keys=True) + "\n")
            print(key, cells[key], flush=True)
    print(table(cells))


def measured(case: Case, densities: Sequence[float], threads: int, seconds: float, before: Cell | None) -> Cell:
    """The ratios of one layer, those that were there among them."""
    found = sparse_times(case.layer(), torch.randn(case.shape), densities, threads, seconds)
    first = before or {"columns": found[0].columns, "dense_ms": found[0].timing.dense_ms, "ratios": {}, "iqr": {}}
    return {
        **first,
        "ratios": first["ratios"] | {f"{t.density:g}": round(t.timing.ratio, 3) for t in found},
        "iqr": first["iqr"] | {f"{t.density:g}": round(t.timing.iqr, 3) for t in found},
        "device": device_name(torch.device("cpu")),
        "load": round(os.getloadavg()[0], 1),
    }


def table(cells: Mapping[str, Cell]) -> str:
    """Layers down, densities across, and the density from which on a sparse product pays."""
    columns = sorted({float(d) for cell in cells.values() for d in cell["ratios"]}, reverse=True)
    heads = ("layer", "columns", "dense ms", *(f"{d:g}" for d in columns), "pays from")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name, cell in cells.items():
        ratios = [cell["ratios"].get(f"{d:g}") for d in columns]
        shown = ["-" if ratio is None else f"{ratio:.2f}" for ratio in ratios]
        pays = pays_from({float(d): float(ratio) for d, ratio in cell["ratios"].items()})
        row = (name, str(cell["columns"]), f"{cell['dense_ms']:.3g}", *shown, "-" if pays is None else f"{pays:g}")
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
