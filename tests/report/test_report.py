"""report.html: self-contained, honest, and rebuilt from the run folder alone."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from autoprune.errors import InputError
from autoprune.report import build_report
from autoprune.report.figures import COLOURS, trials_figure
from autoprune.report.read import Trial, read_summary, read_trials
from tests.fronts import synthetic_front, write_run


def test_the_report_stands_alone_and_shows_every_part(tmp_path: Path) -> None:
    write_run(tmp_path, synthetic_front())
    text = build_report(tmp_path).read_text()
    assert not re.search(r'<(script|link)[^>]+(src|href)="http', text)
    assert "layer3" in text
    assert "uniform" in text
    assert "accuracy, tuned" in text
    assert "7 recorded, 1 failed; passes over the calibration set: seed 2, search 4<" in text
    assert text.count('class="plotly-graph-div"') == 3


def test_the_report_says_plainly_when_search_did_not_beat_a_control(tmp_path: Path) -> None:
    write_run(tmp_path, synthetic_front(), search_wins=False)
    text = build_report(tmp_path).read_text()
    assert text.count("<li class=bad>at 0.7: the search did NOT beat global 0.2</li>") == 1
    assert text.count("<li class=bad>") == 2


def test_without_smaller_shapes_there_are_no_macs_in_the_table_and_costs_have_words(tmp_path: Path) -> None:
    front = synthetic_front()
    base = replace(front.base, costs={**front.base.costs, "nonzeros": 43584.0, "effective_macs": 414528.0})
    points = tuple(replace(p, base=base, costs={**p.costs, "nonzeros": 9, "effective_macs": 9}) for p in front)
    provenance = {**front.provenance, "objectives": ["nonzeros"]}
    write_run(tmp_path, replace(front, base=base, points=points, provenance=provenance))
    (tmp_path / "study.journal").unlink()  # its trials have no such costs
    text = build_report(tmp_path).read_text()
    assert "43,584 nonzero weights, 414,528 effective MACs a sample;" in text
    assert "<th>MACs</th><th>nonzero weights</th>" in text
    log = tmp_path / "log.jsonl"
    log.write_text(re.sub(r'"macs_ratio": [\d.]+', '"macs_ratio": 1.0', log.read_text()))
    text = build_report(tmp_path).read_text()
    assert "<th>MACs</th>" not in text
    assert "<th class=left>point</th><th>nonzero weights</th><th>loss</th>" in text


def test_the_report_says_plainly_when_search_won(tmp_path: Path) -> None:
    write_run(tmp_path, synthetic_front())
    text = build_report(tmp_path).read_text()
    assert text.count("<li>at 0.7: the search beat global 0.2</li>") == 1
    assert "<li class=bad>" not in text


def test_a_verdict_is_read_and_not_guessed_from_its_words_but_in_older_logs(tmp_path: Path) -> None:
    write_run(tmp_path, synthetic_front(), search_wins=False)
    log = tmp_path / "log.jsonl"
    other = log.read_text().replace("the search did NOT beat", "worse than")
    log.write_text(other)
    assert build_report(tmp_path).read_text().count("<li class=bad>at 0.7: worse than global 0.2</li>") == 1
    log.write_text(other.replace('"beat": false, ', ""))
    assert "<li class=bad>" not in build_report(tmp_path).read_text()
    write_run(tmp_path / "old", synthetic_front(), search_wins=False)
    old = tmp_path / "old" / "log.jsonl"
    old.write_text(old.read_text().replace('"beat": false, ', ""))
    assert build_report(tmp_path / "old").read_text().count("<li class=bad>") == 2


def test_the_cloud_of_evaluations_shows_every_control_arm_by_its_name() -> None:
    def trial(index: int, stage: str, label: str = "") -> Trial:
        return Trial(index, stage, label, "fitness", True, 0.1, {"macs": 0.5}, 1.0, None)

    names = ("uniform", "owl", "mine:tapered")
    seeds = [trial(i, "seed", f"{name}@0.5") for i, name in enumerate(names)]
    figure = trials_figure([trial(9, "seed", "dense"), *seeds, trial(10, "search")], "macs")
    assert [trace.name for trace in figure.data] == ["search", *names]
    looks = {(trace.marker.color, trace.marker.symbol) for trace in figure.data[1:]}
    assert len(looks) == len(names)
    assert (COLOURS["uniform"], "square") in looks


def test_a_report_can_be_rebuilt_without_the_study_and_the_log(tmp_path: Path) -> None:
    write_run(tmp_path, synthetic_front())
    (tmp_path / "study.journal").unlink()
    (tmp_path / "log.jsonl").unlink()
    text = build_report(tmp_path).read_text()
    assert "no summary" in text
    assert text.count('class="plotly-graph-div"') == 2


def test_names_are_escaped(tmp_path: Path) -> None:
    write_run(tmp_path, synthetic_front())
    policy = tmp_path / "policy.json"
    policy.write_text(policy.read_text().replace("mypkg.models:Chain", "mypkg.models:<b>Chain"))
    text = build_report(tmp_path).read_text()
    assert "<b>Chain" not in text
    assert "&lt;b&gt;Chain" in text


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no policy\.json"):
        build_report(tmp_path)


def test_the_last_summary_counts_and_a_torn_last_line_is_skipped(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text(
        '{"event": "summary", "rows": [{"arm": "old"}]}\n{"event": "summary", "rows": [{"arm": "new"}]}\n{"eve'
    )
    assert read_summary(log) == ({"arm": "new"},)


def test_a_damaged_journal_is_named(tmp_path: Path) -> None:
    (tmp_path / "study.journal").write_text("not a journal\n")
    with pytest.raises(InputError, match=r"cannot read .*study.journal"):
        read_trials(tmp_path / "study.journal")
