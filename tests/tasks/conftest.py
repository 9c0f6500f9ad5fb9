"""Files of the tasks over Hugging Face folders, written once for each module of tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import text_folders


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTOPRUNE_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    """The arguments of a task, whose files are written once."""
    made: dict[str, dict[str, Any]] = {}

    def given(name: str) -> dict[str, Any]:
        if name not in made:
            made[name] = text_folders.arguments(tmp_path_factory.mktemp(name), name)
        return dict(made[name])

    return given
