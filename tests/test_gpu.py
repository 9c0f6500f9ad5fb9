"""On a GPU: the figures of the CPU, the same each time, smaller batches where memory ends, a search that finds it."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import autoprune
from autoprune.database.batches import size
from autoprune.evaluation import Ask
from autoprune.policy import Policy
from tests.evaluator.test_tiers import evaluator, narrow
from tests.small import world

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here")


@pytest.mark.parametrize("tier", ["stitch", "refit", "tune"])
@pytest.mark.parametrize("family", ["projection", "mobilenet", "plain", "unet"])
def test_a_gpu_measures_what_the_cpu_does_and_the_same_each_time(family: str, tier: str) -> None:
    w = world(family)
    there, here = evaluator(w, device="cpu", precision="fp32"), evaluator(w, device="cuda", precision="fp32")
    for split in ("fitness", "validation"):
        ask = Ask(narrow(w), tier, split=split)  # type: ignore[arg-type]
        a, b, again = there(ask), here(ask), here(ask)
        assert b.ok, b.error
        assert b.loss == pytest.approx(a.loss, rel=1e-2, abs=1e-6)
        assert (again.loss, again.metrics) == (b.loss, b.metrics)


def test_on_a_gpu_the_dense_policy_costs_nothing_in_either_precision() -> None:
    w = world("projection")
    dense = Ask(Policy.dense(w.structure), "refit")
    for precision in ("fp32", "bf16"):
        assert abs(evaluator(w, device="cuda", precision=precision)(dense).loss) < 1e-7


@pytest.fixture
def little_memory() -> Iterator[None]:
    """What is in use now and 48 MiB more; a batch of 8 192 takes 32 MiB for each of its activations."""
    gc.collect()
    torch.cuda.empty_cache()
    room = torch.cuda.memory_reserved() + (48 << 20)
    torch.cuda.set_per_process_memory_fraction(room / torch.cuda.get_device_properties(0).total_memory)
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)


def test_where_gpu_memory_ends_the_batch_is_halved(request: pytest.FixtureRequest) -> None:
    w = world("projection", samples=16_384)
    tight = evaluator(w, device="cuda", calibration=16_384, batch_size=8_192)
    request.getfixturevalue("little_memory")
    found = tight(Ask(narrow(w), "stitch"))
    assert found.ok, found.error
    largest = max(size(b) for b in tight.batches("fitness"))
    assert largest < 8_192
    torch.cuda.set_per_process_memory_fraction(1.0)
    small = evaluator(w, device="cuda", calibration=16_384, batch_size=largest)
    assert found.loss == pytest.approx(small(Ask(narrow(w), "stitch")).loss, rel=1e-3)


def test_a_search_takes_the_gpu_by_itself_and_its_point_applies_on_the_cpu(tmp_path: Path) -> None:
    job = {
        "task": {"name": "digits"},
        "search": {"trials": 12},
        "evaluator": {"finetune_steps": 5, "finalists": 2, "calibration": 320},
        "executor": {"workers": 2},
    }
    run = autoprune.search(job, out=tmp_path).finish()
    assert run.front.measured_on["device"] == torch.cuda.get_device_name()
    assert json.loads((tmp_path / "policy.json").read_text())["measured_on"]["device"] == torch.cuda.get_device_name()
    task = run.setting.task
    model = task.build()
    small = autoprune.apply(run.front.points[0], model, task.example_inputs(), task=task)
    assert next(small.parameters()).device.type == "cpu"
    reported = run.front.points[0].metrics["validation"]["accuracy"]
    assert task.metrics(small, task.split("validation"))["accuracy"] == pytest.approx(reported, abs=0.02)
