"""report.html: self-contained, honest, and rebuilt from the run folder alone."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from autoprune.errors import InputError
from autoprune.report import build_report
from autoprune.report.read import read_summary, read_trials
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
    assert "search did not beat global (0.5 against 0.2)" in build_report(tmp_path).read_text()


def test_the_report_says_plainly_when_search_won(tmp_path: Path) -> None:
    write_run(tmp_path, synthetic_front())
    text = build_report(tmp_path).read_text()
    assert "search has the lower loss, 0.05 against 0.2" in text
    assert "did not beat" not in text


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
