"""`autoprune front`: a front again, for people, programs and spreadsheets, and the command to type next."""

from __future__ import annotations

import csv
import io
import json
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from autoprune.cli import run
from autoprune.files.policy_file import load_front, save_csv, save_front
from autoprune.front import Front
from tests.conftest import ROOT
from tests.fronts import synthetic_front, with_points, write_run


def wide_front() -> Front:
    """More metrics than 80 columns hold, and a latency that the last point lacks."""
    front = synthetic_front()
    names = [f"quality_of_the_part_{i}" for i in range(9)]
    scores = {name: 0.123456 + i for i, name in enumerate(names)}
    base = replace(front.base, metrics={"validation": scores})
    timed = [{"latency": {"ratio": 0.5, "ms": 3.0}}] * 5 + [{}]
    return Front(
        tuple(
            replace(p, costs={**p.costs, **more}, metrics={"validation": scores, "finetuned": scores}, base=base)
            for p, more in zip(front, timed, strict=True)
        ),
        base,
        {},
        {},
    )


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert run(["front", *arguments]) == 0
    return capsys.readouterr().out


def cells(text: str, name: str) -> list[str]:
    """The cells of all rows of that name, also where the table is in parts."""
    return [cell for row in re.findall(rf"^ {name} +(.*)$", text, re.MULTILINE) for cell in row.split()]


def test_a_front_is_a_table_below_the_dense_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path, synthetic_front())
    text = printed(capsys, str(tmp_path))
    assert text == printed(capsys, str(tmp_path / "policy.json"))
    assert cells(text, "point") == ["MACs", "params", "loss", "accuracy", "loss", "tuned", "accuracy", "tuned"]
    assert cells(text, "dense") == ["1", "1", "-", "0.98", "-", "-"]
    assert cells(text, "p01") == ["0.2132", "0.2162", "0.2421", "0.925", "0.121", "0.969"]
    assert len(re.findall(r"^ p\d\d ", text, re.MULTILINE)) == 6


def test_a_wide_front_is_shown_whole_within_80_columns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_front(wide_front(), tmp_path / "policy.json")
    text = printed(capsys, str(tmp_path))
    table = text.partition("is the knee")[0]
    assert max(map(len, table.splitlines())) <= 80
    assert "…" not in table
    assert cells(text, "p00").count("4.123") == 2, "before and after the fine-tune"
    assert len(cells(text, "p00")) == 3 + 1 + 9 + 1 + 9


def test_the_last_line_is_a_command_that_applies(
    own_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(own_run)
    last = printed(capsys, "runs/digits").splitlines()[-1]
    words = shlex.split(last.removeprefix("next: autoprune "))
    assert words[0] == "apply"
    assert run([*words, "--finetune", "none"]) == 0
    assert (own_run / "small" / "model.safetensors").exists()


def test_a_front_alone_names_what_only_its_user_knows(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    front = synthetic_front()
    lent = tmp_path / "a front.json"
    save_front(front, lent)
    assert printed(capsys, str(lent)).splitlines()[-1].startswith("next, in Python, as the file names no task: ")
    base = replace(front.base, task={"factory": "mypkg:task", "args": {}})
    save_front(replace(front, base=base, points=tuple(replace(p, base=base) for p in front)), lent)
    last = printed(capsys, str(lent)).splitlines()[-1]
    assert last == f"next: autoprune apply '{lent}' --task JOB.yaml --at {front.select('knee').id} --out small"


def test_a_front_without_a_point_says_so(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    save_front(with_points(synthetic_front(), ()), tmp_path / "policy.json")
    text = printed(capsys, str(tmp_path))
    assert cells(text, "dense") == ["1", "1", "-", "0.98"]
    assert text.splitlines()[-1] == "the front holds no point: search again over a wider budget"


def test_programs_get_one_document(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_front(wide_front(), tmp_path / "policy.json")
    document = json.loads(printed(capsys, str(tmp_path), "--json"))
    front = load_front(tmp_path / "policy.json")
    assert [point["id"] for point in document["points"]] == [point.id for point in front]
    for told, point in zip(document["points"], front, strict=True):
        assert told["ratios"]["params"] == point.ratio("params")
        assert told["losses"]["validation"]["loss"] == point.loss()
        assert told["widths"] == point.policy.as_dict()
        assert ("latency" in told["ratios"]) == ("latency" in point.costs)
    assert document["dense"]["costs"] == dict(front.base.costs)
    assert document["next"]


def test_spreadsheets_get_the_rows_of_front_csv(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_front(wide_front(), tmp_path / "policy.json")
    save_csv(wide_front(), tmp_path / "front.csv")
    text = printed(capsys, str(tmp_path), "--csv")
    assert text == (tmp_path / "front.csv").read_text(encoding="utf-8")
    assert [row["id"] for row in csv.DictReader(io.StringIO(text))] == [point.id for point in wide_front()]


@pytest.mark.parametrize("old", sorted((ROOT / "tests" / "goldens" / "0.1.0").glob("*.json")), ids=lambda f: f.stem)
def test_a_front_of_the_first_version_is_shown(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    front = load_front(old)
    assert len(front)
    text = printed(capsys, str(old))
    assert "…" not in text
    figures = [cells(text, point.id) for point in front]
    assert [float(row[0]) for row in figures] == pytest.approx([p.ratio(front.cost) for p in front], rel=1e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "cannot read the policy file nowhere: No such file"),
        (["."], "holds no policy.json: not a run folder, or its search has not finished"),
        (["torn.json"], "torn.json is truncated or not JSON"),
        (["torn.json", "--json", "--csv"], "--json and --csv: say one of the two"),
        ([], "POLICY.json|RUN_DIR"),
    ],
)
def test_wrong_input_is_one_line(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("torn.json").write_text('{"schema": ', encoding="utf-8")
    assert run(["front", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert captured.err.count("\n") == 1
