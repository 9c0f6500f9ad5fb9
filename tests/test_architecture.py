"""docs/architecture.md shows the house as it stands: every room, in the order in which they rest on each other."""

from __future__ import annotations

import re
import tomllib

from autoprune import plugins
from tests.conftest import ROOT

TEXT = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
PICTURE = re.findall(r"```\n(.*?)```", TEXT, re.DOTALL)[0]
BLOCKS = [re.findall(r"^(\w+)/ +\S", block, re.MULTILINE) for block in PICTURE.split("\n\n")]
FOLDERS = {path.parent.name for path in (ROOT / "autoprune").glob("*/*.py")}
FILES = {path.stem for path in (ROOT / "autoprune").glob("*.py")} - {"__init__", "env"}


def test_every_room_is_in_the_picture_with_a_line_and_every_line_is_a_room() -> None:
    shown = [room for block in BLOCKS for room in block]
    assert sorted(shown) == sorted(FOLDERS)
    assert len(PICTURE.split("\n\n")) == len([block for block in BLOCKS if block])


def test_every_file_of_the_hall_is_told() -> None:
    assert set(re.findall(r"^\| `(\w+)\.py` \|", TEXT, re.MULTILINE)) == FILES


def test_the_picture_is_what_the_import_contracts_hold() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    contracts = project["tool"]["importlinter"]["contracts"]
    (layers,) = (contract["layers"] for contract in contracts if contract["type"] == "layers")
    held = [{word for word in re.findall(r"\w+", layer) if word in FOLDERS} for layer in layers]
    assert [set(block) for block in BLOCKS] == [rooms for rooms in held if rooms]


def test_every_plug_in_folder_is_called_one_and_has_a_contract_suite() -> None:
    told = set(re.findall(r"^(\w+)/ +plug-in:", PICTURE, re.MULTILINE))
    assert told == set(plugins.FOLDERS)
    suites = {path.stem.removeprefix("test_") for path in (ROOT / "tests" / "contracts").glob("test_*.py")}
    assert told <= suites
