"""The 8-bit file: static for convolutions, dynamic for the rest; scored, timed, and told in the card."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from autoprune.application.delivery import apply_file
from autoprune.application.int8 import OnnxModel, called_with, convolves, quantise
from autoprune.application.int8_speed import has_vnni, operations, slow_words
from autoprune.application.order import Order
from autoprune.application.training import Training
from autoprune.cli.tables import print_applied
from autoprune.errors import InputError, RunError
from autoprune.exports import export
from autoprune.files.job import Job
from tests.small import RandomTask, world
from tests.transformer_models import MODELS

pytestmark = [
    pytest.mark.skipif(
        any(importlib.util.find_spec(p) is None for p in ("onnx", "onnxscript", "onnxruntime")),
        reason="needs the extra autoprune[onnx]",
    ),
    pytest.mark.filterwarnings("ignore:.*float file's time here"),
]


def linear() -> RandomTask:
    torch.manual_seed(0)
    return RandomTask(nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 5)).eval(), (16,))


@pytest.mark.parametrize("way", ["static", "dynamic"])
def test_it_answers_about_as_the_float_model_does_and_is_smaller(way: str, tmp_path: Path) -> None:
    task = world("projection").task if way == "static" else linear()
    model = task.build().eval()
    (path,) = export(model, task.example_inputs(), ["onnx"], tmp_path)
    found = quantise(path, model, task, task.example_inputs())
    assert (found.way, found.path.name) == (way, "model.int8.onnx")
    (x, _) = next(iter(task.split("test")))
    with torch.no_grad():
        wanted, got = model(x), OnnxModel(found.path, model, task.example_inputs())(x)
    error = float((got - wanted).norm() / wanted.norm())
    assert 0.0 < error < 0.1
    assert got.shape == wanted.shape


def test_what_stays_in_float_is_counted_as_onnxruntime_runs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = linear()
    (path,) = export(task.model, task.example_inputs(), ["onnx"], tmp_path)
    floats = operations(path)
    assert sum(floats[name] for name in ("Gemm", "FusedGemm", "MatMul")) == 2
    assert "onnxruntime computes 2 of its 2 products in float" in slow_words(path)
    found = quantise(path, task.build().eval(), task, task.example_inputs())
    ran = operations(found.path)
    assert ran["MatMulIntegerToFloat"] + ran["DynamicQuantizeMatMul"] + ran["MatMulInteger"] == 2
    assert "products in float" not in slow_words(found.path)
    info = tmp_path / "cpuinfo"
    monkeypatch.setattr("autoprune.files.machine.CPUINFO", info)
    for flags, there in (("fpu avx2", False), ("fpu avx_vnni", True), ("fpu avx512_vnni", True)):
        info.write_text(f"processor\t: 0\nflags\t\t: {flags}\n")
        assert has_vnni() is there
        assert ("this processor has no VNNI" in slow_words(found.path)) is not there


def test_a_file_that_is_none_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"no such thing")
    task = linear()
    with pytest.raises(RunError, match=r"cannot quantise model.onnx: .*; leave --int8 out") as caught:
        quantise(tmp_path / "model.onnx", task.build(), task, task.example_inputs())
    assert "\n" not in str(caught.value)


def test_what_a_model_is_called_with_is_seen_also_by_keywords() -> None:
    class ByName(RandomTask):
        def outputs(self, model: nn.Module, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
            found: torch.Tensor = model(input=batch[0])
            return found

    task = ByName(nn.Sequential(nn.Linear(4, 2)).eval(), (4,))
    batch = next(iter(task.split("test")))
    ((seen,),) = called_with(task.model, task, batch, task.example_inputs())
    assert np.array_equal(seen.numpy(), batch[0].numpy())


def test_apply_writes_scores_and_times_it_and_the_card_tells(finished_run: Path, tmp_path: Path) -> None:
    policy = finished_run / "runs" / "digits" / "policy.json"
    job = Job.load(policy.parent / "job.yaml")
    facts = apply_file(
        policy, job, "macs=0.6", tmp_path / "small", Order(training=Training.of("none", None), int8=True)
    )
    eight = facts["int8"]
    assert eight["way"] == "static"
    assert eight["test"]["accuracy"] == pytest.approx(facts["test"]["pruned"]["accuracy"], abs=0.05)
    assert eight["bytes"] == (tmp_path / "small" / "model.int8.onnx").stat().st_size
    assert eight["latency"]["ratio"] > 0.0
    card = (tmp_path / "small" / "README.md").read_text()
    assert f"| accuracy, int8 file |  | {eight['test']['accuracy']:.4g} |" in card
    assert "`model.int8.onnx` (static ranges) takes" in card
    slow = eight["latency"]["ratio"] >= 1.0
    assert (f"It is not faster here: {eight.get('reason')}." in card) is slow
    assert json.loads((tmp_path / "small" / "apply.json").read_text()) == facts
    golden = Path(__file__).parents[1] / "goldens" / "0.1.0" / "mixed.json"
    with pytest.raises(InputError, match="--int8 finds the ranges of activations on data"):
        apply_file(golden, "tests.golden_models:mixed", "knee", tmp_path / "other", Order(int8=True))


def test_one_that_is_slower_says_why_on_stdout_in_the_card_and_at_once(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    timed = {"ratio": 1.31, "iqr": 0.02, "rounds": 7, "float_ms": 0.1, "threads": 1}
    monkeypatch.setattr("autoprune.application.extras.file_latency", lambda *given: timed)
    policy = finished_run / "runs" / "digits" / "policy.json"
    order = Order(training=Training.of("none", None), int8=True)
    with pytest.warns(
        UserWarning, match="model.int8.onnx takes 1.31 of the float file's time here: .*that round to 8 bits"
    ):
        facts = apply_file(policy, Job.load(policy.parent / "job.yaml"), "macs=0.6", tmp_path / "small", order)
    print_applied(facts)
    shown, card = capsys.readouterr().out, (tmp_path / "small" / "README.md").read_text()
    for text in (shown, card):
        assert f"It is not faster here: {facts['int8']['reason']}." in text


def test_a_file_answers_in_the_form_of_its_model_and_a_vision_transformer_is_dynamic(tmp_path: Path) -> None:
    for name, read in (("bert", lambda out: out[0]), ("vit", lambda out: out.logits)):
        model, inputs = MODELS[name].build(), MODELS[name].example()
        (path,) = export(model, inputs, ["onnx"], tmp_path / name)
        file, given = OnnxModel(path, model, inputs), inputs if isinstance(inputs, dict) else inputs[0]
        with torch.no_grad():
            turned = dict(reversed(given.items())) if isinstance(given, dict) else {}
            wanted, got = (read(m(**turned) if turned else m(given)) for m in (model, file))
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-4)
        assert not convolves(model, inputs)
