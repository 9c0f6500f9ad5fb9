"""Models and inputs as users bring them: odd forwards, half precision, noisy code, folders that hold other things."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import autoprune
from autoprune.cli import run
from autoprune.errors import InputError
from autoprune.run.prepare import prepare
from tests.run.test_run import job

MODULE = """
import torch
from torch import nn
from torch.nn import functional as F
import autoprune


class View(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.Linear(8 * 36, 4)

    def forward(self, x):
        print("hello from the model")
        return self.head(self.norm(self.conv(x)).relu().view(x.size(0), -1))


class Textbook(nn.Module):
    def __init__(self):
        super().__init__()
        self.c1, self.c2 = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.f1, self.f2 = nn.Linear(8 * 16, 12), nn.Linear(12, 4)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.c2(F.relu(self.c1(x)))), 2)
        return self.f2(F.relu(self.f1(x.view(-1, 8 * 16))))


class Volume(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv3d(1, 8, 3), nn.BatchNorm3d(8), nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.norm(self.conv(x)).relu().mean((2, 3, 4)))


class Branch(View):
    def forward(self, x):
        return super().forward(x) if x.sum() > 0 else super().forward(-x)


def make(kind):
    torch.manual_seed(0)
    kinds = {"view": View, "textbook": Textbook, "volume": Volume, "branch": Branch, "half": View}
    model = kinds[kind]().eval()
    shape = (1, 5, 5, 5) if kind == "volume" else (1, 8, 8)
    x, y = torch.randn(160, *shape), torch.arange(160) % 4
    if kind == "half":
        model, x = model.bfloat16(), x.bfloat16()
    splits = zip(("calibration", "validation", "test", "train"), zip(x.split(40), y.split(40)))
    accuracy = lambda o, t: {"accuracy": float((o.argmax(-1) == t).float().mean())}
    return autoprune.task(model, {n: [pair] for n, pair in splits}, F.cross_entropy, accuracy)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "brought.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "brought", raising=False)
    return tmp_path


def job_of(kind: str, folder: Path) -> str:
    text = {
        "task": {"factory": "brought:make", "args": {"kind": kind}},
        "budget": {"macs": [0.3, 0.9], "at": [0.5]},
        "search": {"trials": 3, "sampler": "random"},
        "evaluator": {"finalists": 1, "finetune_steps": 2},
        "executor": {"kind": "inline"},
    }
    path = folder / f"{kind}.yaml"
    path.write_text(json.dumps(text))  # JSON is YAML
    return str(path)


@pytest.mark.parametrize("kind", ["view", "textbook", "volume"])
def test_a_model_that_flattens_by_view_or_convolves_volumes_goes_all_the_way(
    kind: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["search", job_of(kind, folder), "--out", "run", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)  # whatever the model prints, stdout is one document
    assert document["points"] == len(autoprune.load_front("run/policy.json"))
    assert run(["apply", "run/policy.json", "--task", f"{kind}.yaml", "--at", "macs=0.9", "--out", "small"]) == 0


@pytest.mark.parametrize(
    ("kind", "words"),
    [("half", "give the model in float32"), ("branch", "nothing is left to search")],
)
def test_a_model_that_cannot_be_searched_is_one_line_and_exit_2(
    kind: str, words: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["search", job_of(kind, folder), "--out", "run"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert words in line


def test_what_is_wrong_with_sampler_or_metric_is_said_before_anything_is_written(tmp_path: Path) -> None:
    for change, words in (
        ({"search": {"options": {"foo": 1}}}, "unknown option 'foo'"),
        ({"objectives": {"loss": {"metric": "acc"}}}, "the task has no metric 'acc'"),
        ({"evaluator": {"device": "cuda:7"}}, "is not to be had here"),
    ):
        with pytest.raises(InputError, match=words):
            autoprune.search(job(**change), out=tmp_path)
    assert not (tmp_path / "job.yaml").exists()
    assert not (tmp_path / "study.journal").exists()


def test_apply_does_not_overwrite_the_front_of_a_search(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["search", job_of("volume", folder), "--out", "run"]) == 0
    before = Path("run/policy.json").read_bytes()
    capsys.readouterr()
    assert run(["apply", "run/policy.json", "--task", "volume.yaml", "--at", "knee", "--out", "run"]) == 2
    assert "which apply would overwrite" in capsys.readouterr().err
    assert Path("run/policy.json").read_bytes() == before


def test_groups_that_contradict_their_fingerprint_are_called_damaged(folder: Path) -> None:
    assert run(["search", job_of("volume", folder), "--out", "run"]) == 0
    data = json.loads(Path("run/policy.json").read_text())
    next(iter(data["groups"].values()))["slices"][0]["tensor"] = "zz"
    Path("run/policy.json").write_text(json.dumps(data))
    assert run(["apply", "run/policy.json", "--task", "volume.yaml", "--at", "knee", "--out", "small"]) == 2


def test_a_criterion_that_is_no_class_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="must be a class whose instances can be called"):
        prepare(job(criterion="math:pi"), tmp_path)


def test_a_metric_function_must_return_a_mapping() -> None:
    x, y = torch.randn(20, 3), torch.zeros(20, dtype=torch.long)
    loaders = {name: [(x, y)] for name in ("calibration", "validation", "test", "train")}

    def bare(outputs: Tensor, targets: Tensor) -> float:
        return 0.5

    with pytest.raises(InputError, match="metric_fn must return a mapping"):
        autoprune.task(nn.Linear(3, 2), loaders, nn.functional.cross_entropy, bare)  # type: ignore[arg-type]
