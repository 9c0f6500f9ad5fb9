"""A model is analysed once a run: the same model finds its analysis again, any other is analysed anew."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from autoprune.application import match
from autoprune.application.delivery import apply_file
from autoprune.files.policy_file import load_front
from autoprune.run import kept_analysis as rooms
from autoprune.run.kept_analysis import analysis_key, found_analysis, kept_analysis
from autoprune.run.run import search
from autoprune.tracing.analyze import Analysis
from autoprune.tracing.fingerprint import weights_fingerprint
from autoprune.tracing.slim import named_tensors
from tests.killable_compare import tiny, tiny_job

INPUTS = (torch.zeros(2, 3, 8, 8),)


class Net(nn.Module):
    def __init__(self, shift: int = 0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.shift = shift
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu() + self.shift).mean((2, 3))  # type: ignore[no-any-return]


def analysed(folder: Path) -> Analysis:
    kept = kept_analysis(Net(), INPUTS, ("channel",), folder)
    kept.keep()
    return kept.analysis


def test_the_same_model_is_analysed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = analysed(tmp_path)
    monkeypatch.setattr(rooms.families, "analysed", None)
    again = analysed(tmp_path)
    assert (again.structure.groups, again.structure.ops) == (made.structure.groups, made.structure.ops)
    assert (again.structure.fingerprint, again.said) == (made.structure.fingerprint, "")
    found = found_analysis(Net(), INPUTS, tmp_path)
    assert found is not None
    assert found.groups == made.structure.groups


def test_a_spoilt_file_is_made_anew_in_silence(tmp_path: Path) -> None:
    made = analysed(tmp_path)
    (file,) = tmp_path.iterdir()
    good = file.read_text()
    file.write_text("garbage")
    assert found_analysis(Net(), INPUTS, tmp_path) is None
    assert analysed(tmp_path).structure.groups == made.structure.groups
    assert file.read_text() == good


def key_of(model: nn.Module, inputs: tuple[Tensor, ...], kinds: tuple[str, ...]) -> str:
    return analysis_key(model, inputs, kinds, weights_fingerprint(model))


def test_whatever_could_change_the_analysis_changes_its_key() -> None:
    other, wider = Net(), (torch.zeros(2, 3, 9, 9),)
    other.b.bias.data[0] += 1.0
    strided = Net()
    strided.a.stride = (2, 2)
    keys = [
        key_of(Net(), INPUTS, ("channel",)),
        key_of(Net(), INPUTS, ("head", "channel")),
        key_of(Net(), wider, ("channel",)),
        key_of(Net(shift=1), INPUTS, ("channel",)),
        key_of(other, INPUTS, ("channel",)),
        key_of(strided, INPUTS, ("channel",)),
    ]
    assert len(set(keys)) == len(keys)
    assert key_of(Net().train(), (torch.ones(2, 3, 8, 8),), ("channel",)) == keys[0]


def test_apply_takes_the_groups_that_the_run_proved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = tiny_job(search={"trials": 2, "sampler": "random"})
    run = search(job, out=tmp_path / "run").finish()
    assert len([p for p in (run.path / "database").iterdir() if p.name.startswith("analysis-")]) == 1
    model, inputs = tiny().build(), tiny().example_inputs()
    point = load_front(run.path / "policy.json")[0]
    proved = match.matching(point, model, inputs)
    monkeypatch.setattr(match, "declared", None)
    kept = match.matching(point, model, inputs, run.path / "database")
    assert (kept.groups, kept.ops) == (proved.groups, proved.ops)
    apply_file(run.path / "policy.json", job, point.id, tmp_path / "small")
    monkeypatch.undo()
    next(iter(named_tensors(model).values())).data.add_(0.1)  # other weights: another model
    assert match.matching(point, model, inputs, run.path / "database").groups == proved.groups
