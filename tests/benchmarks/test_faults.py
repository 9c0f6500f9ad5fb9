"""The fault scripts' runner: old imports find their new homes, and the page says what ran, what did not, and why."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import faults

SCRIPT = """
import autoprune.precision as old
from autoprune.bootstrap import paired
import autoprune.evaluator.precision as new
old.LARGEST_ERROR = 1.0
assert new.LARGEST_ERROR == 1.0
print("PASS all there")
print("FAIL on purpose")
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, text in (
        ("review/old.py", SCRIPT),
        ("firsthour/endless.py", "import time; print('PASS first', flush=True); time.sleep(600)"),
        ("public/_lib.py", "part of others"),
        ("public/models.py", "import no_such_thing, transformers"),
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(faults, "FAULTS", tmp_path)
    return tmp_path


def test_scripts_run_with_their_old_imports_within_their_limit(folder: Path) -> None:
    old, endless, models = faults.cases()
    assert [c.name for c in (old, endless, models)] == ["review/old", "firsthour/endless", "public/models"]
    found = {old.name: faults.outcome(old, 120.0), endless.name: faults.outcome(endless, 3.0)}
    assert found[old.name]["rc"] == 0, found[old.name]["last"]
    assert found[old.name]["counts"] == {"PASS": 1, "FROZEN": 0, "MSG": 0, "FAIL": 1}
    assert found[endless.name]["rc"] is None
    assert found[endless.name]["seconds"] < 60
    page = faults.table({**found, models.name: {"not_run": "no transformers here"}}, {"review/old": "was worse"}, {})
    assert "| review/old | was worse | 1 PASS, 1 FAIL |" in page
    assert "no end within the limit; 1 PASS" in page
    assert "not run: no transformers here" in page
    assert "- FAIL on purpose" in page
    assert "2 of 3 runs" in page
