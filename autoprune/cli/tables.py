"""What the command line prints: tables of groups, results and comparisons, as plain text on a pipe."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text

from autoprune.front_table import cost_word, unchanged

PLAIN_WIDTH = 140
NARROW = 80
"""Of a table that is cut into parts, where there is no terminal."""
BETWEEN = 3
"""Blanks between two columns of such a table, and at its edges together."""
PREDICTED_AT = (0.75, 0.5, 0.25)


def console(json_: bool = False) -> Console:
    """stdout, or stderr where stdout is for JSON; of fixed width where it is no terminal."""
    made = Console(stderr=json_)
    return made if made.is_terminal else Console(stderr=json_, width=PLAIN_WIDTH)


KINDS = ("head", "kv_group", "neuron", "channel", "block", "bits", "weight")
WHOLE = ("block", "bits", "weight")
"""Kinds that share their MACs with other groups."""


def print_inspect(facts: Mapping[str, Any]) -> None:
    """Groups, their widths and MACs, and what is frozen and why."""
    out = console()
    out.print(_by_layer(facts["groups"]) if _attends(facts["groups"]) else _by_group(facts["groups"]))
    dense = facts["dense"]
    shown = ", ".join(" x ".join(map(str, shape)) for shape in facts["inputs"])
    said = f"dense: {dense['macs']:,} MACs a sample on inputs of {shown}, {dense['params']:,} parameters"
    out.print(said, highlight=False, soft_wrap=True)
    for reason, names in _by_reason(facts["frozen"]).items():
        out.print(f"frozen: {_few(names)}: {reason}", markup=False, highlight=False, soft_wrap=True)
    for said in facts.get("said", ()):
        out.print(said, markup=False, highlight=False, soft_wrap=True)
    if "sensitivity" in facts:
        _print_sensitivity(facts["sensitivity"])


def _by_group(groups: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(title=f"{len(groups)} groups", title_justify="left")
    for heading in ("group", "kind", "width", "allowed widths", "MACs it scales"):
        table.add_column(heading, justify="left" if heading in ("group", "kind") else "right")
    for g in groups:
        allowed = "there or not" if g["kind"] == "block" else _allowed(g)
        width = "x".join(map(str, g["shape"])) if g["kind"] == "weight" else str(g["width"])
        table.add_row(g["name"], g["kind"], width, allowed, f"{g['macs_share']:.1%}")
    return table


def _by_layer(groups: Sequence[Mapping[str, Any]]) -> Table:
    """A transformer: one row a layer, a column for each kind of group that it has."""
    kinds = [kind for kind in KINDS if any(g["kind"] == kind for g in groups)]
    table = Table(title=f"{len(groups)} groups, by layer", title_justify="left")
    columns = (kind.removesuffix("s") + "s" + ": allowed" * (kind != "block") for kind in kinds)
    for heading in ("layer", *columns, "MACs", "parameters"):
        table.add_column(heading.replace("_", " "), justify="left" if heading == "layer" else "right")
    layers: dict[str, list[Mapping[str, Any]]] = {}
    for g in groups:
        layers.setdefault(_layer(g["name"]), []).append(g)
    for layer, own in layers.items():
        cells = [_cell([_allowed(g) for g in own if g["kind"] == kind]) for kind in kinds]
        # a block holds the others, and weights are theirs: none counts twice
        matrices = [g for g in own if g["kind"] == "weight"]
        narrowed = [g for g in own if g["kind"] not in WHOLE] or matrices or own
        shares = [sum(g[key] for g in narrowed) for key in ("macs_share", "params_share")]
        table.add_row(layer, *cells, *(f"{share:.1%}" for share in shares))
    table.caption = "a group is called " + ", ".join(next(g["name"] for g in groups if g["kind"] == k) for k in kinds)
    return table


def _cell(allowed: Sequence[str]) -> str:
    """What several groups of a layer allow, equals counted."""
    counts = Counter(allowed)
    return ", ".join(what if n == 1 else f"{n} x {what}" for what, n in counts.items())


def _allowed(group: Mapping[str, Any]) -> str:
    """Widths from the least to the dense one, and how many; of a block, there or not, its name in the layer.

    Of weights the shares that may stay.
    """
    grid = group["grid"]
    if group["kind"] == "block":
        return "the layer" if group["name"] == _layer(group["name"]) else str(group["name"].rpartition(".")[2])
    if group["kind"] == "bits":
        return " or ".join(map(str, grid))
    if group["kind"] == "weight":
        least = f"{100 * grid[0] / grid[-1]:.3g}..100 % ({len(grid)})"
        return f"{group['pattern']} or dense" if group["pattern"] else least
    return f"{grid[0]}..{grid[-1]} ({len(grid)})"


def _attends(groups: Sequence[Mapping[str, Any]]) -> bool:
    return any(g["kind"] in ("head", "kv_group") for g in groups)


def _layer(name: str) -> str:
    """The path of a module up to its last number: encoder.layer.3 of encoder.layer.3.attention.self.query.

    A * stands for the numbers of all layers.
    """
    parts = name.split(".")
    last = max((i for i, part in enumerate(parts) if part.isdigit() or part == "*"), default=len(parts) - 1)
    return ".".join(parts[: last + 1])


def _by_reason(frozen: Mapping[str, str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, reason in frozen.items():
        found.setdefault(reason, []).append(name)
    return found


def _few(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{len(names)} modules ({', '.join(names[:2])}{', ..' * (len(names) > 2)})"


def _print_sensitivity(facts: Mapping[str, Any]) -> None:
    """Each group's loss at the widths that were measured, narrowest first."""
    table = Table(title="loss with one group alone narrowed: width loss", title_justify="left")
    table.add_column("group")
    n_widths = max(len(row) for row in facts["table"].values()) - 1
    for _ in range(n_widths):
        table.add_column("", justify="right")
    for name, row in facts["table"].items():
        cells = [f"{w} [bold]{row[w]:.3g}[/bold]" for w in sorted(row)[:-1]]
        table.add_row(name, *cells)
    console().print(table)
    rows = facts["predicted"]
    near = [min(rows, key=lambda row: abs(row["ratio"] - at)) for at in PREDICTED_AT]
    said = ", ".join(f"{row['loss']:.3g} at {row['ratio']:.2f}" for row in near)
    console().print(f"summed, a knapsack is predicted a loss of {said} of the dense {facts['cost']}", soft_wrap=True)
    console().print(
        f"saved in {facts['file']}, which a search in that folder uses; plot: {facts['plot']}", soft_wrap=True
    )


def print_summary(rows: Sequence[Mapping[str, Any]], costs: Sequence[str] = ()) -> None:
    """The table of the asked budgets, search beside uniform and global, and what the run says about them.

    `costs` have a column of their own beside the MACs, as ratios to dense; latencies as measured, where they were. MACs
    that are dense in every row have none unless they are among `costs`.
    """
    metrics = list(dict.fromkeys(name for row in rows for name in row.get("metrics") or {}))
    table = Table(title="best point at each asked budget (validation)", title_justify="left")
    timed = any(row.get("latency") for row in rows)
    more = [cost for cost in dict.fromkeys(costs) if cost != "macs" and not (timed and cost == "latency")]
    clock = ["latency"] if timed else []
    dense = "macs" not in costs and unchanged("macs", (row.get("macs_ratio") for row in rows))
    macs = [] if dense else ["macs"]
    words = map(cost_word, [*macs, *clock, *more])
    headings = ["budget", "arm", "point", *words, "loss", *metrics, *(f"{m} tuned" for m in metrics)]
    for heading in headings:  # a long name of a metric may break where its words do
        table.add_column(heading.replace("_", " "), justify="left" if heading in ("arm", "point") else "right")
    for row in rows:
        ours = row["arm"] == "search"
        plain, tuned = row.get("metrics") or {}, row.get("finetuned") or {}
        cells = [short(row["budget"]), row["arm"], row.get("point") or ""]
        cells += [short(row.get("macs_ratio")) for _ in macs]
        cells += [short((row.get("latency") or {}).get("ratio"))] if timed else []
        cells += [*(short(row["costs"].get(cost)) for cost in more), short(row.get("loss"))]
        cells += [short(plain.get(m)) for m in metrics]
        cells += [short(tuned.get(m)) for m in metrics]
        table.add_row(*(str(cell) for cell in cells), style="bold" if ours else "")
    out = console()
    out.print(table)
    for note in (*dict.fromkeys(row["note"] for row in rows if row.get("note")), *time_notes(rows)):
        out.print(note, markup=False, highlight=False, soft_wrap=True)


def time_notes(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Where the time goes that the MACs do not account for, of the search's point nearest to half of them."""
    told = [row for row in rows if row.get("arm") == "search" and row.get("rest")]
    return [min(told, key=lambda row: abs(row["macs_ratio"] - 0.5))["rest"]] if told else []


def print_spent(spent: Mapping[str, float], database_s: float) -> None:
    """What the stages of a search took, and the level database where this call built it."""
    parts = ", ".join(f"{stage} {short(worth)}" for stage, worth in spent.items())
    built = f"; the level database took {database_s:.1f} s" if database_s else ""
    console().print(f"spent, in full evaluations: {parts}{built}", highlight=False, soft_wrap=True)


def print_finetune(rows: Sequence[Mapping[str, Any]]) -> None:
    """Each fine-tuned point with its best recipe, its scores on validation and what it had before."""
    metrics = list(dict.fromkeys(m for row in rows for m in row["metrics"]["validation"]))
    table = Table(title="best recipe of each point (validation)", title_justify="left")
    timed = any(row.get("latency") is not None for row in rows)
    clock = ["latency"] if timed else []
    headings = ("point", "MACs", *clock, "epochs", "rate", "distillation", "loss before", "loss", *metrics)
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "point" else "right")
    for row in rows:
        recipe, scores, losses = row["recipe"], row["metrics"]["validation"], row["losses"]
        cells = [row["macs_ratio"], *([row.get("latency")] if timed else [])]
        cells += [recipe["epochs"], recipe["learning_rate"], recipe["distillation"]]
        cells += [losses["before"]["loss"], losses["validation"]["loss"], *(scores.get(m) for m in metrics)]
        table.add_row(row["point"], *(short(cell) for cell in cells), style="bold" if row["better"] else "")
    console().print(table)


def print_comparison(document: Mapping[str, Any]) -> None:
    """Mean and spread of each strategy at each budget, the best in bold, and the verdicts."""
    rows = document["summary"]
    measured = any(row["value"] is not None for row in rows)
    timed = ["latency_ratio"] if any(row.get("latency_ratio") is not None for row in rows) else []
    fields = ["cost_ratio", *timed, "loss", *(["value"] if measured else []), "hypervolume"]
    titles = {"cost_ratio": cost_word(document["cost"]), "value": document["metric"] or ""}
    titles |= {"latency_ratio": "latency"}
    n_seeds = max(row["seeds"] for row in rows)
    title = f"compare, on validation: mean ± sd over {n_seeds} seed{'s' * (n_seeds > 1)}"
    table = Table(title=title, title_justify="left")
    for heading in ("budget", "strategy", *fields, "evaluations", "seconds"):
        table.add_column(titles.get(heading, heading).replace("_", " "), justify=_side(heading))
    for budget in dict.fromkeys(row["budget"] for row in rows):
        here = [row for row in rows if row["budget"] == budget]
        for row in here:
            cells = [_spread(row, field, _best(here, field, document["direction"])) for field in fields]
            work = (f"{row['evaluations']:.4g}", f"{row['seconds']:.3g}")
            table.add_row(short(budget) if row is here[0] else "", row["strategy"], *cells, *work)
        table.add_section()
    out = console()
    out.print(table)
    end = {name: value for name, value in document["reference"].items() if name != "of"}
    out.print(f"hypervolume: of the front on validation, {reference_words(end)}", highlight=False)
    if (table := document["table"]) is not None:
        out.print(f"sensitivity table, shared and on nobody's ledger: {short(table['passes'])} passes", highlight=False)
    for line in (*filter(None, [document.get("rest")]), *(verdict["text"] for verdict in document["verdicts"])):
        out.print(line, markup=False, highlight=False, soft_wrap=True)


def reference_words(point: Mapping[str, float]) -> str:
    """Where a hypervolume ends."""
    return f"reference point {', '.join(f'{cost_word(name)} {short(value)}' for name, value in point.items())}"


def _side(heading: str) -> Literal["left", "right"]:
    return "left" if heading == "strategy" else "right"


def _best(rows: Sequence[Mapping[str, Any]], field: str, direction: str) -> float | None:
    """The best mean of a column; less is better for the loss, no cost is best, the metric has its `direction`."""
    values = [row[field] for row in rows if row[field] is not None]
    if not values or field in ("cost_ratio", "latency_ratio"):
        return None
    least = field == "loss" or (field == "value" and direction == "minimize")
    return float(min(values) if least else max(values))


def _spread(row: Mapping[str, Any], field: str, best: float | None) -> Text:
    """A cell such as 0.031 ± 0.002; what is the same at every seed has no spread."""
    mean, sd = row[field], row[f"{field}_sd"]
    same = sd is None or row["closed_form"] or sd <= 1e-9 * abs(mean or 0.0)
    spread = "" if mean is None or same else f" ± {sd:.2g}"
    return Text(short(mean) + spread, style="bold" if mean is not None and mean == best else "")


def print_applied(report: Mapping[str, Any]) -> None:
    """What `apply` left for each point: dense beside pruned, how it was made, and where it lies."""
    from autoprune.application.card import extent, rows, timing, transferred

    out = console()
    for facts in report["points"].values() if "points" in report else [report]:
        table = Table(title=f"point {facts['point']}: {extent(facts)}", title_justify="left")
        for heading in ("", "dense", "pruned"):
            table.add_column(heading, justify="right" if heading else "left")
        for row in rows(facts):
            table.add_row(*row)
        out.print(table)
        recipe = ", ".join(f"{k} {short(v)}" for k, v in facts["recipe"].items() if k != "recipe")
        said = f"atoms {facts['atoms']}; training {facts['recipe']['recipe']}{f' ({recipe})' if recipe else ''}"
        for line in (*timing(facts), said, *transferred(facts), f"files: {', '.join(facts['files'])}"):
            out.print(line, markup=False, highlight=False, soft_wrap=True)
    folder = str(facts["files"][0]).rpartition("/")[0]
    out.print(f'load it: autoprune.load("{folder}")', markup=False, highlight=False, soft_wrap=True)


def print_columns(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table whose first column names the rows, in as many parts below each other as the width asks for.

    That is the terminal's, or 80 columns elsewhere; a heading may break where its words do.
    """
    made = Console()
    out = made if made.is_terminal else Console(width=NARROW)
    out.print(title, markup=False, highlight=False)
    headings = [heading.replace("_", " ") for heading in headings]
    widths = [max(map(len, [*headings[i].split(), *(row[i] for row in rows)])) for i in range(len(headings))]
    for part in _parts(widths, out.width):
        table = Table(box=SIMPLE, pad_edge=False)
        for i in part:
            table.add_column(headings[i], justify="right" if i else "left", min_width=widths[i])
        for row in rows:
            table.add_row(*(Text(row[i]) for i in part))
        out.print(table)


def _parts(widths: Sequence[int], most: int) -> list[list[int]]:
    """Which columns of these least widths each part has: the first of all in each."""
    parts: list[list[int]] = []
    room = 0
    for i, width in list(enumerate(widths))[1:]:
        if not parts or width + BETWEEN > room:
            parts.append([0])
            room = most - widths[0] - BETWEEN
        parts[-1].append(i)
        room -= width + BETWEEN
    return parts


def short(value: object) -> str:
    """A value in a table cell."""
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def shown(show: Callable[[Any], None], document: object) -> dict[str, Any] | None:
    """What a verb returns that has printed its document instead of handing it over as JSON."""
    show(document)
    return None
