"""A structure in a file comes back as it was, or not at all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from autoprune.files.structure_file import load_structure, save_structure
from autoprune.structure import Group, Op, Size, Slice, Structure, TensorSpec

WHOLE = Structure(
    (
        Group(
            "a", "channel", 4, (Slice("a.weight", 0, "produce"), Slice("b.weight", 1, "consume", 2, 3, 1, 1, 2)), (1, 4)
        ),
        Group(
            "c", "channel", 2, (Slice("c.weight", 0, "produce"),), (1, 2), (Size("m.width", 4, 1, 2), Size("n.k", 2))
        ),
    ),
    (
        Op(
            "a", "Conv2d", 1, 49, "a.weight", (3, 3), (1, 1), (7, 7), (TensorSpec("a.weight", (4, 3, 3, 3), 4),), ("a",)
        ),
        Op("n", "Norm", 2, tensors=(TensorSpec("n.mean", (4,), 4, False),)),
    ),
    {"d": "it decides"},
    "sha256:abc",
)


def test_every_field_comes_back(tmp_path: Path) -> None:
    save_structure(tmp_path / "s.json", "key", WHOLE)
    found = load_structure(tmp_path / "s.json", "key")
    assert found is not None
    assert (found.groups, found.ops, dict(found.frozen), found.fingerprint) == (
        WHOLE.groups, WHOLE.ops, dict(WHOLE.frozen), WHOLE.fingerprint,
    )  # fmt: skip


@pytest.mark.parametrize("spoilt", ["", "[]", "{}", "null", '{"key": "key", "sum": 1}', "\x00\xff"])
def test_garbage_is_taken_for_none(spoilt: str, tmp_path: Path) -> None:
    (tmp_path / "s.json").write_text(spoilt, encoding="latin-1")
    assert load_structure(tmp_path / "s.json", "key") is None


def test_another_key_a_cut_file_and_a_changed_figure_are_taken_for_none(tmp_path: Path) -> None:
    path = tmp_path / "s.json"
    assert load_structure(path, "key") is None
    save_structure(path, "key", WHOLE)
    assert load_structure(path, "other") is None
    text = path.read_text()
    path.write_text(text[: len(text) // 2])
    assert load_structure(path, "key") is None
    raw = json.loads(text)
    raw["ops"][0]["positions"] += 1
    path.write_text(json.dumps(raw))
    assert load_structure(path, "key") is None
