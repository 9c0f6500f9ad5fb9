"""A search goes by a loss that fits the outputs, says which, and stops where it tells nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import autoprune
from autoprune.application.repair import searched_settings
from autoprune.errors import InputError, RunError
from autoprune.evaluator.settings import Settings
from autoprune.protocols import SPLITS

JOB: dict[str, Any] = {
    "budget": {"macs": [0.2, 0.9], "at": [0.5]},
    "search": {"trials": 4},
    "evaluator": {"calibration": 32, "validation": 16, "finalists": 1, "finetune_steps": 2, "fitness": "refit"},
}


def net(outputs: int = 1) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, outputs)).eval()


def made(targets: Any = lambda y: y, metric: str = "mse") -> Any:
    """A task of one value a sample, whose targets are what the model says, in some form."""
    model, loaders = net(), {}
    for seed, name in enumerate(SPLITS):
        x = torch.randn(32, 6, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            loaders[name] = [(x, targets(model(x)))]

    def measure(outputs: Tensor, y: Tensor) -> Mapping[str, float]:
        return {metric: float((outputs - y.reshape(outputs.shape)).square().mean())}

    return autoprune.task(model, loaders, lambda o, y: F.mse_loss(o, y.float()), measure, {metric: "minimize"})


def events(run: Any) -> dict[str, Any]:
    lines = [json.loads(line) for line in (run.path / "log.jsonl").read_text().splitlines()]
    return next(line for line in lines if line["event"] == "loss")


def test_a_regression_is_searched_by_mse_beside_its_own_metric_of_that_name(tmp_path: Path) -> None:
    task = made()
    run = autoprune.search(JOB, task=task, out=tmp_path / "run")
    notes = {run.note for _ in run}
    assert any("loss mse: outputs [16, 1] are one value each and the targets are float32 [16, 1]" in n for n in notes)
    assert events(run)["name"] == "mse"
    point = run.front.select(macs=0.9)
    small = autoprune.apply(point, task.build(), task.example_inputs(), task=task)
    validation = [(x[:16], y[:16]) for x, y in task.split("validation")]
    if "finetuned" not in point.metrics:
        assert point.metrics["validation"]["mse"] == pytest.approx(task.metrics(small, validation)["mse"], rel=1e-3)
    assert dict(point.losses["validation"])["name"] == "mse"
    assert point.losses["validation"]["loss"] != point.metrics["validation"]["mse"]


def test_one_logit_is_searched_by_the_divergence_of_its_probability(tmp_path: Path) -> None:
    run = autoprune.search(JOB, task=made(lambda y: (y > 0).float()), out=tmp_path / "run").finish()
    assert {p.losses["validation"]["name"] for p in run.front} == {"bernoulli_kl"}
    losses = [p.losses["validation"]["loss"] for p in run.front]
    assert losses == sorted(losses, reverse=True)
    assert losses[0] > 0


def flat(outputs: Tensor, dense_outputs: Tensor, *, classes: int) -> Tensor:
    return 0.0 * (outputs - dense_outputs).square().reshape(len(outputs), -1).mean(1)


def absolute(outputs: Tensor, dense_outputs: Tensor, *, classes: int) -> Tensor:
    return (outputs - dense_outputs).abs().reshape(len(outputs), -1).mean(1)


def test_a_loss_that_tells_nothing_stops_the_search_and_what_was_found_is_kept(tmp_path: Path) -> None:
    job = {**JOB, "objectives": {"loss": f"{__name__}:flat"}}
    run = autoprune.search(job, task=made(), out=tmp_path / "run")
    with pytest.raises(RunError, match=r"flat cannot tell candidates apart.* is 0 each time"):
        run.finish()
    assert (tmp_path / "run" / "study.journal").stat().st_size > 0
    assert not (tmp_path / "run" / "policy.json").exists()


def test_a_loss_that_tells_nothing_is_found_out_where_no_control_arm_has_seeded_the_search(tmp_path: Path) -> None:
    alone = {"compare": {"controls": []}, "search": {"trials": 30, "sampler": "random"}}
    run = autoprune.search({**JOB, **alone, "objectives": {"loss": f"{__name__}:flat"}}, task=made(), out=tmp_path)
    with pytest.raises(RunError, match=r"flat cannot tell candidates apart.* is 0 each time"):
        run.finish()


def test_a_metric_is_searched_the_way_that_its_task_says_and_python_applies_what_was_promised(tmp_path: Path) -> None:
    task, job = made(), {**JOB, "objectives": {"loss": {"metric": "mse"}}}
    run = autoprune.search(job, task=task, out=tmp_path / "run")
    assert run.setting.settings.direction == "minimize"
    point = autoprune.load_front(run.finish().path / "policy.json").select(macs=0.9)
    small = autoprune.apply(point, task.build(), task.example_inputs(), task=task)
    facts = json.loads(vars(small)["autoprune_origin"]["facts"])
    assert facts["validation"]["loss"]["name"] == facts["promised"]["loss"]["name"] == "mse"
    assert facts["validation"]["loss"]["loss"] == pytest.approx(facts["promised"]["loss"]["loss"], rel=1e-4)
    wrong = {"metric": "mse", "direction": "maximize"}
    with pytest.raises(InputError, match=r"direction is maximize, but the task says minimize of its metric 'mse'"):
        autoprune.search({**JOB, "objectives": {"loss": wrong}}, task=task, out=tmp_path / "wrong")


def test_a_loss_of_the_users_own_must_be_named_again_to_keep_the_fronts_promise(tmp_path: Path) -> None:
    job = {**JOB, "objectives": {"loss": f"{__name__}:absolute"}}
    task, run = made(), autoprune.search(job, task=made(), out=tmp_path)
    point = run.front.select(macs=0.9)
    with pytest.raises(InputError, match=r"found with the loss '.*:absolute'.*give settings=searched_settings"):
        autoprune.apply(point, task.build(), task.example_inputs(), task=task)
    settings = searched_settings(point, Settings(loss=f"{__name__}:absolute", finetune_steps=2))
    small = autoprune.apply(point, task.build(), task.example_inputs(), task=task, settings=settings)
    facts = json.loads(vars(small)["autoprune_origin"]["facts"])
    assert facts["validation"]["loss"]["loss"] == pytest.approx(facts["promised"]["loss"]["loss"], rel=1e-4)


def test_what_is_no_task_is_named() -> None:
    with pytest.raises(InputError, match="task is a Linear without build, example_inputs, split"):
        autoprune.search(JOB, task=nn.Linear(2, 2))  # type: ignore[arg-type]


def test_kl_over_one_value_is_refused_before_anything_is_computed(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="kl over one value is 0 for every candidate"):
        autoprune.search({**JOB, "objectives": {"loss": "kl"}}, task=made(), out=tmp_path / "run")
    assert not (tmp_path / "run" / "database").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"evaluator": {**JOB["evaluator"], "calibration": 33}}, "the split has 32 samples, the job asks for 33"),
        ({"evaluator": {**JOB["evaluator"], "validation": 40}}, "the split has 32 samples, the job asks for 40"),
        ({"space": {"granularity": "head"}}, "the model has no groups of kind head; it has channel"),
        ({"space": {"granularity": 124}}, "YAML reads 2:4 so unless it is quoted: '2:4'"),
        (
            {"space": {"granularity": ["channel", "2:4"], "multiple_of": 1}},
            "let multiple_of be auto or a multiple of 4",
        ),
    ],
)
def test_what_the_data_or_this_version_does_not_have_is_refused(
    change: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=words):
        autoprune.search({**JOB, **change}, task=made(), out=tmp_path / "run")


def test_a_task_may_name_the_loss_that_auto_takes(tmp_path: Path) -> None:
    task = made()
    task.auto_loss = "cosine"
    run = autoprune.search(JOB, task=task, out=tmp_path / "run")
    notes = {run.note for _ in run}
    assert any("loss cosine: the task states it for its outputs [16, 1]" in n for n in notes)
    task.auto_loss = "cosin"
    with pytest.raises(InputError, match="unknown loss 'cosin'; did you mean 'cosine'"):
        autoprune.search(JOB, task=task, out=tmp_path / "other").finish()
