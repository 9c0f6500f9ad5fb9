"""Groups of single weights in policy.json: their masks by hash, no order, no atoms."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import jsonschema
import pytest

from autoprune.errors import InputError
from autoprune.files.policy_file import load_front, save_front
from autoprune.files.policy_form import json_schema
from autoprune.front import Front
from autoprune.policy import Policy
from autoprune.structure import Group
from tests.fronts import synthetic_front

WEIGHT = "layer1.0.conv1.weight"
MASK = f"sha256:{'ab' * 32}"


def front() -> Front:
    """The synthetic one with the zeros of a matrix beside its channels, n of every m."""
    plain = synthetic_front()
    group = Group(WEIGHT, "weight", 576, (), (288, 576), matrices=(WEIGHT,), pattern="2:4")
    base = replace(plain.base, groups=(*plain.base.groups, group))
    points = []
    for i, point in enumerate(plain):
        width = 288 if i else 576
        policy = Policy.of({**point.policy.as_dict(), WEIGHT: width})
        points.append(replace(point, policy=policy, base=base, masks={WEIGHT: MASK} if i else {}))
    return replace(plain, base=base, points=tuple(points))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    save_front(front(), tmp_path / "policy.json")
    return tmp_path / "policy.json"


def test_a_front_with_masks_comes_back_and_fits_the_schema(path: Path) -> None:
    assert load_front(path) == front()
    data = json.loads(path.read_text())
    assert data["points"][1]["keep"][WEIGHT] == {"mask": MASK}
    assert WEIGHT not in data["points"][0]["keep"]
    assert "order" not in data["groups"][WEIGHT]
    assert data["groups"][WEIGHT]["pattern"] == "2:4"
    jsonschema.Draft202012Validator(json_schema()).validate(data)


def test_a_mask_that_is_none_or_of_another_group_is_refused_in_one_line(path: Path) -> None:
    data = json.loads(path.read_text())
    other = next(name for name in data["groups"] if name != WEIGHT)
    for keep, said in (({WEIGHT: {"mask": "sha256:12"}}, "mask"), ({other: {"mask": MASK}}, "keep must name")):
        data["points"][1]["keep"] = keep
        data["groups"][other].pop("order", None)
        path.write_text(json.dumps(data))
        with pytest.raises(InputError, match=said) as caught:
            load_front(path)
        assert "\n" not in str(caught.value)


def test_zeros_without_a_mask_and_a_mask_without_zeros_are_refused(path: Path) -> None:
    text = path.read_text()
    data = json.loads(text)
    del data["points"][1]["keep"][WEIGHT]
    path.write_text(json.dumps(data))
    with pytest.raises(InputError, match="has zeros: its keep is a mask, and there is none"):
        load_front(path)
    data = json.loads(text)
    data["points"][0]["keep"][WEIGHT] = {"mask": MASK}
    path.write_text(json.dumps(data))
    with pytest.raises(InputError, match="no group of kind weight with zeros"):
        load_front(path)


def test_atoms_of_a_weight_group_are_refused(path: Path) -> None:
    data = json.loads(path.read_text())
    data["points"][1]["keep"][WEIGHT] = [0, 1]
    path.write_text(json.dumps(data))
    with pytest.raises(InputError, match="is of kind weight: its keep is a mask, not atoms"):
        load_front(path)
