"""A run folder as one self-contained page, report.html: figures, tables, and plain words on who won."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any

from autoprune.errors import InputError
from autoprune.files.job import Job
from autoprune.files.policy_file import load_front
from autoprune.files.whole import write_whole
from autoprune.front import Front
from autoprune.front_table import count_words, unchanged
from autoprune.report.figures import (
    cost_ratio,
    cost_word,
    front_figure,
    heatmap_figure,
    stylesheet,
    to_html,
    trials_figure,
)
from autoprune.report.read import Trial, read_summary, read_trials


def build_report(run_dir: str | Path) -> Path:
    """Write RUN_DIR/report.html from policy.json, the study and log.jsonl; returns its path.

    Raises:
        InputError: the folder is no finished run, or a file of it is damaged.
    """
    folder = Path(run_dir)
    if not (folder / "policy.json").exists():
        raise InputError(f"{folder} holds no policy.json: not a run folder, or its search has not finished")
    front = load_front(folder / "policy.json")
    rows, trials = read_summary(folder / "log.jsonl"), read_trials(folder / "study.journal", _storage_of(folder))
    page = Template((Path(__file__).parent / "page.html").read_text(encoding="utf-8"))
    text = page.substitute(
        style=stylesheet(),
        title=html.escape(f"{_short_name(front.base.model)}: {len(front)} points from dense to small"),
        subtitle=html.escape(_subtitle(front)),
        table=_table(rows, front.provenance.get("objectives") or [front.cost]),
        verdicts=_list(_verdicts(rows)),
        front=to_html(front_figure(front, rows), inline_library=True),
        heatmap=to_html(heatmap_figure(front)),
        trials=_trials_section(trials, front.cost),
        facts=_facts(front, trials),
    )
    path = folder / "report.html"
    write_whole(path, text)
    return path


def _storage_of(folder: Path) -> str | None:
    """The database that the run's job keeps its record in, where it is not the journal."""
    job = folder / "job.yaml"
    return Job.load(job).storage_url if job.exists() else None


def _short_name(model: str) -> str:
    return model.rsplit(":", 1)[-1].rsplit(".", 1)[-1]


def _subtitle(front: Front) -> str:
    costs, dense = front.base.costs, front.base.metrics.get("validation", {})
    scores = ", ".join(f"{name} {value:.4g}" for name, value in dense.items())
    words = {name: cost_word(name) + " a sample" * name.endswith("macs") for name in costs}
    sizes = ", ".join(f"{count_words(value)} {words[name]}" for name, value in costs.items())
    return f"Dense model: {sizes}; on validation: {scores}. MACs count matrix products and convolutions only."


def _table(rows: Sequence[Mapping[str, Any]], objectives: Sequence[str]) -> str:
    if not rows:
        return "<p>The log holds no summary of this run.</p>"
    metrics = list(dict.fromkeys(name for row in rows for name in row.get("metrics") or {}))
    timed = any(row.get("latency") for row in rows)
    costs = [c for c in dict.fromkeys(["macs", *objectives]) if not (timed and c == "latency")]
    costs = [c for c in costs if c in objectives or not unchanged(c, (cost_ratio(row, c) for row in rows))]
    headings = ["budget", "arm", "point", *map(cost_word, costs), *(["latency"] if timed else [])]
    headings += ["loss", *metrics, *(f"{m}, tuned" for m in metrics)]
    lines = ["<table><tr>", *(_cell("th", h.replace("_", " "), h in ("arm", "point")) for h in headings), "</tr>"]
    for row in rows:
        plain, tuned = row.get("metrics") or {}, row.get("finetuned") or {}
        cells = [row.get("budget"), row.get("arm"), row.get("point"), *(cost_ratio(row, c) for c in costs)]
        cells += [(row.get("latency") or {}).get("ratio")] if timed else []
        cells += [row.get("loss"), *(plain.get(m) for m in metrics), *(tuned.get(m) for m in metrics)]
        lines.append('<tr class="ours">' if row.get("arm") == "search" else "<tr>")
        lines += [_cell("td", _number(value), i in (1, 2)) for i, value in enumerate(cells)]
        lines.append("</tr>")
    rests = [f"{row['budget']}: {row['rest']}" for row in rows if row.get("arm") == "search" and row.get("rest")]
    return "".join([*lines, "</table>", *(f"<p>{html.escape(rest)}</p>" for rest in rests)])


def _verdicts(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, bool]]:
    """What the run said at each budget, and whether it is bad news; logs of 0.1.0 say that in words alone."""
    notes = {str(row["note"]): row for row in rows if row.get("note")}
    return [(note, row.get("beat", "NOT beat" not in note) is False) for note, row in notes.items()]


def _list(items: Iterable[tuple[str, bool]]) -> str:
    lines = [f"<li{' class=bad' if bad else ''}>{html.escape(text)}</li>" for text, bad in items]
    return f"<ul>{''.join(lines)}</ul>" if lines else ""


def _trials_section(trials: Sequence[Trial], cost: str) -> str:
    figure = trials_figure(trials, cost)
    if figure is None:
        return ""
    return f"<section><h2>Every full evaluation of the search</h2>{to_html(figure)}</section>"


def _facts(front: Front, trials: Sequence[Trial]) -> str:
    failed = sum(trial.error is not None for trial in trials)
    stages = dict.fromkeys(trial.stage for trial in trials)
    passes = {stage: sum(trial.passes for trial in trials if trial.stage == stage) for stage in stages}
    spent = ", ".join(f"{stage} {n:.4g}" for stage, n in passes.items())
    counts = f"{len(trials)} recorded, {failed} failed; passes over the calibration set: {spent}"
    facts: dict[str, Any] = {"evaluations": counts}
    told = {name: value for name, value in front.provenance.items() if name != "price"}  # the table has it
    facts |= told | dict(front.measured_on) | {"space": dict(front.base.space)}
    pairs = ((name, v if isinstance(v, str) else json.dumps(v)) for name, v in facts.items())
    return "".join(f"<dt>{html.escape(name)}</dt><dd>{html.escape(text)}</dd>" for name, text in pairs)


def _cell(tag: str, text: object, left: bool) -> str:
    return f"<{tag}{' class=left' if left else ''}>{html.escape(str(text))}</{tag}>"


def _number(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
