"""policy.json: what is saved is what is loaded, and nothing foreign or damaged gets in."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import jsonschema
import pytest

from autoprune.errors import InputError
from autoprune.files.policy_file import json_schema, load_front, save_csv, save_front
from tests.fronts import synthetic_front, with_points

GOLDEN = Path(__file__).parents[1] / "goldens" / "policy.json"


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_front(synthetic_front(), tmp_path / "policy.json")
    return tmp_path / "policy.json"


def test_a_saved_front_loads_as_the_same_front(saved: Path) -> None:
    assert load_front(saved) == synthetic_front()


def test_the_whole_file_of_one_front_is_frozen(saved: Path) -> None:
    assert saved.read_text() == GOLDEN.read_text()
    assert synthetic_front()[1].policy.digest == "b7971f254c0b"


def test_saving_leaves_no_draft_behind(saved: Path) -> None:
    assert [p.name for p in saved.parent.iterdir()] == ["policy.json"]


def test_the_published_schema_is_the_readers_own_and_accepts_the_file(saved: Path) -> None:
    published = json.loads((files("autoprune.files") / "policy.schema.json").read_text(encoding="utf-8"))
    assert published == json_schema()
    jsonschema.Draft202012Validator(published).validate(json.loads(saved.read_text()))


def test_the_published_schema_refuses_a_file_without_widths(saved: Path) -> None:
    data = json.loads(saved.read_text())
    del data["points"][0]["widths"]
    with pytest.raises(jsonschema.ValidationError, match="widths"):
        jsonschema.Draft202012Validator(json_schema()).validate(data)


def test_a_file_cut_at_any_place_is_refused_in_one_line(saved: Path) -> None:
    text = saved.read_text()
    for share in (0.0, 0.1, 0.5, 0.9, 0.999):
        saved.write_text(text[: int(share * len(text))])
        with pytest.raises(InputError, match="truncated or not JSON") as caught:
            load_front(saved)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("foreign", ["[]", "{}", '{"schema": "other/1"}', '{"schema": 3}'])
def test_a_foreign_file_is_refused(saved: Path, foreign: str) -> None:
    saved.write_text(foreign)
    with pytest.raises(InputError, match="not an autoprune policy file"):
        load_front(saved)


def test_a_newer_major_version_is_refused_and_a_newer_minor_one_is_read(saved: Path) -> None:
    text = saved.read_text()
    saved.write_text(text.replace("autoprune/policy/1", "autoprune/policy/1.7"))
    assert load_front(saved) == synthetic_front()
    saved.write_text(text.replace("autoprune/policy/1", "autoprune/policy/2"))
    with pytest.raises(InputError, match="newer schema 'autoprune/policy/2'"):
        load_front(saved)


def test_unknown_minor_keys_are_ignored(saved: Path) -> None:
    data = json.loads(saved.read_text())
    data["colour"] = "blue"
    data["points"][0]["mood"] = {"calm": True}
    data["base"]["more"] = [1]
    saved.write_text(json.dumps(data))
    assert load_front(saved) == synthetic_front()


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("widths", {"layer0": 99}, "cannot be 99 wide; its grid is"),
        ("widths", {"layer9": 3}, "must name every group once.*layer9"),
        ("widths", {"layer0": "8"}, "points.0.widths.layer0"),
        ("keep", {"layer0": [0]}, "must keep"),
        ("keep", {"layer0": [1, 0, 2, 3, 4]}, "must keep"),
        ("id", "p01", "ids of points must be unique"),
        ("trial", None, "points.0.trial"),
        ("metrics", {"validation": {"accuracy": 1.0}}, "no metrics.validation.loss"),
        ("costs", {"macs": 3}, "no cost 'params'"),
    ],
)
def test_a_point_at_odds_with_itself_is_refused(saved: Path, key: str, value: object, message: str) -> None:
    data = json.loads(saved.read_text())
    point = data["points"][0]
    point[key] = {**point[key], **value} if key in ("widths", "keep") and isinstance(value, dict) else value
    saved.write_text(json.dumps(data))
    with pytest.raises(InputError, match=message):
        load_front(saved)


def test_a_contradictory_front_is_not_written(tmp_path: Path) -> None:
    front = synthetic_front()
    wrong = replace(front[0], keep={name: () for name in front[0].keep})
    with pytest.raises(InputError, match="point p00: group 'layer0' must keep"):
        save_front(with_points(front, (wrong,)), tmp_path / "policy.json")
    assert not list(tmp_path.iterdir())


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot read the policy file .*nothing.json"):
        load_front(tmp_path / "nothing.json")


def test_the_csv_holds_one_row_a_point_and_a_column_a_width(tmp_path: Path) -> None:
    front = synthetic_front()
    save_csv(front, tmp_path / "front.csv")
    with (tmp_path / "front.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["id"] for row in rows] == [point.id for point in front]
    assert [float(row["validation.loss"]) for row in rows] == [p.metrics["validation"]["loss"] for p in front]
    assert [int(row["width.layer2"]) for row in rows] == [p.policy.as_dict()["layer2"] for p in front]
    assert rows[0]["finetuned.accuracy"] == ""
    assert rows[1]["finetuned.accuracy"] != ""


def test_selecting_from_a_loaded_front_gives_the_point_that_was_saved(saved: Path) -> None:
    front = load_front(saved)
    assert front.select(macs=0.5) == synthetic_front().select(macs=0.5)
    assert front.select("p03").policy == synthetic_front()[3].policy
