"""What the command line prints: tables of groups, results and comparisons, as plain text on a pipe."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from autoprune.protocols import Task
    from autoprune.structure import Structure

PLAIN_WIDTH = 140


def console(json_: bool = False) -> Console:
    """stdout, or stderr where stdout is for JSON; of fixed width where it is no terminal."""
    made = Console(stderr=json_)
    return made if made.is_terminal else Console(stderr=json_, width=PLAIN_WIDTH)


def inspect_facts(structure: Structure, task: Task) -> dict[str, Any]:
    """What `inspect` shows, as plain values; a group's share is that of the operations that it scales."""
    shapes = {t.name: t.shape for op in structure.ops for t in op.tensors}
    macs = {op.name: op.positions * _numel(shapes[op.weight] if op.weight else ()) for op in structure.ops}
    total = max(sum(macs.values()), 1)
    groups = []
    for group in structure:
        own = {s.tensor for s in group.slices}
        share = sum(macs[op.name] for op in structure.ops if op.weight in own) / total
        facts = {"name": group.name, "kind": group.kind, "width": group.width, "grid": list(group.grid)}
        groups.append({**facts, "macs_share": share})
    params = sum(_numel(t.shape) for op in structure.ops for t in op.tensors if t.is_parameter)
    shapes_in = [list(x.shape) for x in task.example_inputs()]
    return {
        "fingerprint": structure.fingerprint,
        "inputs": shapes_in,
        "dense": {"macs": sum(macs.values()), "params": params},
        "groups": groups,
        "frozen": dict(structure.frozen),
    }


def _numel(shape: Sequence[int]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product


def print_inspect(facts: Mapping[str, Any]) -> None:
    """Groups, their widths and MACs, and what is frozen and why."""
    out = console()
    table = Table(title=f"{len(facts['groups'])} groups", title_justify="left")
    for heading in ("group", "kind", "width", "allowed widths", "MACs it scales"):
        table.add_column(heading, justify="left" if heading in ("group", "kind") else "right")
    for g in facts["groups"]:
        grid = g["grid"]
        allowed = f"{grid[0]}..{grid[-1]} ({len(grid)})"
        table.add_row(g["name"], g["kind"], str(g["width"]), allowed, f"{g['macs_share']:.1%}")
    out.print(table)
    dense = facts["dense"]
    out.print(f"dense: {dense['macs']:,} MACs a sample, {dense['params']:,} parameters", highlight=False)
    for name, reason in facts["frozen"].items():
        out.print(f"frozen: {name}: {reason}", markup=False, highlight=False, soft_wrap=True)


def print_summary(rows: Sequence[Mapping[str, Any]]) -> None:
    """The table of the asked budgets, search beside uniform and global, and what the run says about them."""
    metrics = list(dict.fromkeys(name for row in rows for name in row.get("metrics") or {} if name != "loss"))
    table = Table(title="best point at each asked budget (validation)", title_justify="left")
    headings = ["budget", "arm", "point", "MACs", "loss", *metrics, *(f"{m} tuned" for m in metrics)]
    for heading in headings:
        table.add_column(heading, justify="left" if heading in ("arm", "point") else "right")
    for row in rows:
        ours = row["arm"] == "search"
        plain, tuned = row.get("metrics") or {}, row.get("finetuned") or {}
        cells = [short(row["budget"]), row["arm"], row.get("point") or "", short(row.get("macs_ratio"))]
        cells += [short(row.get("loss")), *(short(plain.get(m)) for m in metrics)]
        cells += [short(tuned.get(m)) for m in metrics]
        table.add_row(*(str(cell) for cell in cells), style="bold" if ours else "")
    out = console()
    out.print(table)
    for note in dict.fromkeys(row["note"] for row in rows if row.get("note")):
        out.print(note, markup=False, highlight=False, soft_wrap=True)


def print_rows(rows: Sequence[Mapping[str, Any]]) -> None:
    """A table of rows with the same keys."""
    table = Table(title="compare", title_justify="left")
    columns = list(dict.fromkeys(key for row in rows for key in row))
    for column in columns:
        table.add_column(column)
    for row in rows:
        table.add_row(*(short(row.get(column)) for column in columns))
    console().print(table)


def print_mapping(values: Mapping[str, Any], indent: str = "") -> None:
    """Nested facts, one line each."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            print(f"{indent}{name}:")
            print_mapping(value, indent + "  ")
        elif isinstance(value, Iterable) and not isinstance(value, str):
            print(f"{indent}{name}: {', '.join(short(v) for v in value)}")
        else:
            print(f"{indent}{name}: {short(value)}")


def short(value: object) -> str:
    """A value in a table cell."""
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
