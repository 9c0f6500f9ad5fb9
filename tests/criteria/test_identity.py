"""What a criterion's scores are kept under: its name, its options and the source that it was written in."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

from autoprune.criteria import build_criterion, criterion_identity
from autoprune.errors import InputError

TILTED = "tests.plugged:Tilted"


def test_options_and_the_name_are_part_of_it() -> None:
    same = {
        criterion_identity("obs"),
        criterion_identity({"name": "obs"}),
        criterion_identity({"name": "obs", "options": {}}),
    }
    assert len(same) == 1
    tilted = [criterion_identity({"name": TILTED, "options": {"sign": sign}}) for sign in (1, -1)]
    assert len({*same, *tilted, criterion_identity(TILTED), criterion_identity("taylor")}) == 5


def test_a_users_criterion_that_is_rewritten_is_another_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    found = []
    for body in ("HELPER = 1", "HELPER = 2"):
        (tmp_path / "mine_rewritten.py").write_text(f"{body}\nclass Mine:\n    def __call__(self, *a): ...\n")
        sys.modules.pop("mine_rewritten", None)
        importlib.invalidate_caches()
        found.append(criterion_identity("mine_rewritten:Mine"))
    assert found[0] != found[1]


def test_what_an_option_may_be_is_said_in_one_line() -> None:
    with pytest.raises(InputError, match=r"criterion\.options: unknown option 'sing'; did you mean 'sign'"):
        build_criterion({"name": TILTED, "options": {"sing": 1}})
    with pytest.raises(InputError, match="must be a class whose instances can be called"):
        build_criterion("tests.plugged:mlp")
