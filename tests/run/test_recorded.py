"""One record holds one precision and one kind of device, also where it is gone on with on other hardware."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import autoprune
from autoprune.errors import InputError
from autoprune.evaluator import precision
from autoprune.evaluator.settings import Settings
from autoprune.run.prepare import as_recorded
from autoprune.run.run import Run
from tests.small import world

JOB = {
    "search": {"trials": 4, "sampler": "random"},
    "evaluator": {"calibration": 64, "validation": 32, "finalists": 0, "finetune_steps": 0, "sensitivity": 0},
    "budget": {"macs": [0.4, 0.9], "at": [0.6]},
    "executor": {"kind": "inline"},
}


def went(folder: Path, trials: int) -> Run:
    job = {**JOB, "search": {**JOB["search"], "trials": trials}}  # type: ignore[dict-item]
    return autoprune.search(job, task=world("projection").task, out=folder).finish()


def test_a_run_that_goes_on_on_other_hardware_keeps_the_precision_of_its_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "SMALL_MACS", 1.0)
    monkeypatch.setattr(precision, "has_bfloat16", lambda device: True)
    first = went(tmp_path, 4)
    assert first.setting.settings.precision == "bf16"
    monkeypatch.setattr(precision, "has_bfloat16", lambda device: False)
    again = went(tmp_path, 6)
    assert again.setting.settings == first.setting.settings
    assert again.front.base.space["precision"] == "bf16"
    assert went(tmp_path / "new", 4).setting.settings.precision == "fp32"


def test_what_a_record_was_evaluated_with_is_taken_where_the_job_leaves_it_open() -> None:
    recorded = {"precision": "bf16", "device": "cpu", "learning_rate": "0.0067"}
    found = as_recorded(Settings(), recorded, "local")
    assert (found.precision, found.device, found.learning_rate) == ("bf16", "cpu", 0.0067)
    assert as_recorded(Settings(precision="fp32"), recorded, "local").precision == "fp32"
    assert as_recorded(Settings(), recorded, "ray").device == "auto"
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="the record was evaluated on cuda, which is not to be had here"):
            as_recorded(Settings(), {"device": "cuda"}, "local")
