"""policy.json: what is saved is what is loaded, and nothing foreign or damaged gets in."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from autoprune.errors import InputError
from autoprune.files.policy_file import load_front, save_csv, save_front
from autoprune.files.policy_form import json_schema
from tests.fronts import resnet50_front, synthetic_front, with_points

GOLDEN = Path(__file__).parents[1] / "goldens" / "policy.json"
OLD = GOLDEN.parent / "0.1.0"


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
        ("keep", {"layer9": [0]}, "must name every group once.*layer9"),
        ("keep", {"layer0": [1, 0, 2, 3, 4]}, "must keep"),
        ("id", "p01", "ids of points must be unique"),
        ("trial", None, "points.0.trial"),
        ("losses", {"finetuned": {"name": "kl", "loss": 1.0}}, "no losses.validation"),
        ("losses", {"validation": {"loss": 1.0}}, "points.0.losses.validation.name"),
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


@pytest.mark.parametrize("order", [[0, 1], [0, 0, *range(2, 32)], list(range(33))])
def test_an_order_that_does_not_rank_each_atom_once_is_refused(saved: Path, order: list[int]) -> None:
    data = json.loads(saved.read_text())
    data["groups"]["layer0"]["order"] = order
    saved.write_text(json.dumps(data))
    with pytest.raises(InputError, match="order of group 'layer0' must name its 32 atoms once"):
        load_front(saved)


def test_kept_atoms_stand_only_where_they_are_not_the_first_of_their_order(saved: Path) -> None:
    points = json.loads(saved.read_text())["points"]
    assert [list(p["keep"]) for p in points] == [["layer3"], ["layer3"], ["layer1", "layer3"], *[["layer3"]] * 3]


def test_a_file_without_orders_that_names_all_kept_atoms_is_the_same_front(saved: Path) -> None:
    data, front = json.loads(saved.read_text()), synthetic_front()
    for group in data["groups"].values():
        group.pop("order", None)
    for point, whole in zip(data["points"], front, strict=True):
        point["keep"] = {name: list(kept) for name, kept in whole.keep.items()}
    saved.write_text(json.dumps(data))
    loaded = load_front(saved)
    assert [p.keep for p in loaded] == [p.keep for p in front]
    assert loaded.base == replace(front.base, order={})


def test_a_front_of_33_points_over_resnet_50_stays_under_2_mb(tmp_path: Path) -> None:
    save_front(resnet50_front(33), tmp_path / "policy.json")
    assert (tmp_path / "policy.json").stat().st_size < 2e6
    assert load_front(tmp_path / "policy.json") == resnet50_front(33)


def test_losses_and_metrics_are_two_name_spaces(tmp_path: Path) -> None:
    front = synthetic_front()
    own = {"validation": {"kl": 3.0, "loss": 4.0, "name": 5.0}}
    base = replace(front.base, metrics=own)
    points = tuple(replace(p, metrics=own, base=base, losses={"validation": p.losses["validation"]}) for p in front)
    odd = replace(front, base=base, points=points)
    save_front(odd, tmp_path / "policy.json")
    assert load_front(tmp_path / "policy.json") == odd
    save_csv(odd, tmp_path / "front.csv")
    with (tmp_path / "front.csv").open(newline="") as file:
        (row, *_) = csv.DictReader(file)
    assert (row["validation.kl"], row["validation.loss"], row["validation.name"]) == ("3.0", "4.0", "5.0")
    assert float(row["loss.validation"]) == front[0].loss()
    assert odd.select("drop=0.0") == odd[0]


def test_a_file_of_0_1_0_has_its_losses_told_apart_from_its_metrics() -> None:
    front = load_front(OLD / "digits.json")
    raw = json.loads((OLD / "digits.json").read_text())
    for point, old in zip(front, raw["points"], strict=True):
        said = old["metrics"]["validation"]
        interval = {"low": said["loss_low"], "high": said["loss_high"]}
        assert point.losses["validation"] == {"name": "kl", "loss": said["loss"], **interval}
        assert set(point.metrics["validation"]) == {"accuracy", "worst_class_accuracy"}
        tuned = old["metrics"].get("finetuned")
        assert point.finetuned == ({} if tuned is None else {"recipe": "proxy", "steps": 20, "seed": 0})
        assert ("finetuned" in point.losses) == (tuned is not None)
    assert any(p.finetuned for p in front)
    assert front.base.fingerprint_version == 1


def test_the_first_golden_reads_as_the_front_that_it_was() -> None:
    old, raw = load_front(OLD / "synthetic.json"), json.loads((OLD / "synthetic.json").read_text())
    assert [p.loss() for p in old] == [p["metrics"]["validation"]["loss"] for p in raw["points"]]
    assert [dict(p.finetuned) for p in old][:2] == [{}, {"recipe": "proxy", "steps": 100, "seed": 0}]
    assert old.base.metrics == {"validation": {"accuracy": 0.98}}


@pytest.mark.parametrize(
    ("limit", "message"),
    [
        ({"macs": 50}, r"macs=50: a limit is a ratio to the dense model, in \(0, 1\]; did you mean macs=0.5\?"),
        ({"macs": 0}, r"in \(0, 1\]"),
        ({"macs": -0.5}, r"in \(0, 1\]"),
        ({"params": float("nan")}, "finite number"),
        ({"macs": "half"}, "finite number"),
        ({"macs": True}, "finite number"),
        ({"drop": float("inf")}, "finite number"),
        ({"mac": 0.5}, "unknown cost 'mac'; did you mean 'macs'"),
        ({"latency": 0.5}, "no measured latency"),
    ],
)
def test_a_limit_that_cannot_be_meant_is_refused_in_one_line(limit: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        synthetic_front().select(**limit)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot read the policy file .*nothing.json"):
        load_front(tmp_path / "nothing.json")


def test_the_csv_holds_one_row_a_point_and_a_column_a_width(tmp_path: Path) -> None:
    front = synthetic_front()
    save_csv(front, tmp_path / "front.csv")
    with (tmp_path / "front.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["id"] for row in rows] == [point.id for point in front]
    assert [float(row["loss.validation"]) for row in rows] == [p.loss() for p in front]
    assert [int(row["width.layer2"]) for row in rows] == [p.policy.as_dict()["layer2"] for p in front]
    assert rows[0]["finetuned.accuracy"] == ""
    assert rows[1]["finetuned.accuracy"] != ""


def test_selecting_from_a_loaded_front_gives_the_point_that_was_saved(saved: Path) -> None:
    front = load_front(saved)
    assert front.select(macs=0.5) == synthetic_front().select(macs=0.5)
    assert front.select("p03").policy == synthetic_front()[3].policy
