"""Applying a policy: it scores what the file says, is verified, and refuses what it does not fit."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import autoprune
from autoprune.application.apply import applying
from autoprune.application.checkpoints import Place, Saved
from autoprune.application.delivery import apply_file
from autoprune.application.order import Order
from autoprune.application.repair import Manner
from autoprune.application.training import Training
from autoprune.criteria import build_criterion
from autoprune.database.drawn import samples_in
from autoprune.errors import InputError
from autoprune.evaluator.material import BATCH_SIZE
from autoprune.evaluator.tiers import TieredEvaluator
from autoprune.files.job import Job
from autoprune.files.policy_file import load_front
from autoprune.front import Front
from autoprune.losses.kl import kl
from autoprune.protocols import finished
from autoprune.run.prepare import settings_of
from autoprune.run.run import search
from autoprune.tasks.digits import Digits
from tests.conftest import SMALL
from tests.killable_compare import tiny
from tests.run.test_run import job

VALIDATION = int(dict(part.split("=") for part in SMALL)["validation"])
KEYS = set(
    [
        "point",
        "macs_ratio",
        "params_ratio",
        "atoms",
        "test",
        "validation",
        "promised",
        "verification_error",
        "recipe",
        "files",
    ]
)


@dataclass(frozen=True)
class Found:
    """A search that ended elsewhere: its folder and its front."""

    path: Path
    front: Front


@pytest.fixture(scope="module")
def run(finished_run: Path) -> Found:
    path = finished_run / "runs" / "digits"
    return Found(path, load_front(path / "policy.json"))


@pytest.fixture(scope="module")
def the_job(run: Found) -> Job:
    return Job.load(run.path / "job.yaml")


@pytest.fixture(scope="module")
def digits() -> Digits:
    return Digits()


def _validation(digits: Digits, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    pairs = list(digits.split("validation"))
    return torch.cat([x for x, _ in pairs])[:count], torch.cat([y for _, y in pairs])[:count]


def test_the_applied_model_scores_what_the_file_says(run: Found, the_job: Job, digits: Digits) -> None:
    x, y = _validation(digits, VALIDATION)
    model = digits.build()
    for point in (run.front[0], run.front[-1]):
        before = copy.deepcopy(model.state_dict())
        small = autoprune.apply(point, model, digits.example_inputs(), task=digits, settings=settings_of(the_job))
        with torch.no_grad():
            logits, dense = small.eval()(x), model.eval()(x)
        assert float(kl(logits, dense, classes=-1).mean()) == pytest.approx(point.loss(), rel=1e-3, abs=1e-6)
        accuracy = point.metrics["validation"]["accuracy"]
        assert float((logits.argmax(1) == y).float().mean()) == pytest.approx(accuracy, abs=1e-6)
        assert sum(p.numel() for p in small.parameters()) == point.costs["params"]
        assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
        assert type(small) is type(model)


@pytest.mark.parametrize("tier", ["stitch", "tune"])
def test_the_applied_model_scores_what_the_file_says_at_every_tier(tier: str, tmp_path: Path) -> None:
    the_job, task = job(search={"trials": 2}, evaluator={"fitness": tier, "finalists": 0, "sensitivity": 0}), tiny()
    point = search(the_job, out=tmp_path).front[0]
    x, model = torch.cat([x for x, _ in task.split("validation")])[:32], task.build().eval()
    small = autoprune.apply(point, model, task.example_inputs(), task=task, settings=settings_of(the_job))
    with torch.no_grad():
        loss = float(kl(small.eval()(x), model(x), classes=-1).mean())
    assert loss == pytest.approx(point.loss(), rel=1e-3, abs=1e-6)


def test_the_precision_of_the_search_is_in_the_file_and_repairs_alike_unless_another_is_asked_for(
    run: Found, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run.front.base.space["precision"] == "fp32"
    rounded = job(search={"trials": 2}, evaluator={"precision": "bf16", "finalists": 0, "sensitivity": 0})
    front = load_front(search(rounded, out=tmp_path).finish().path / "policy.json")
    assert front.base.space["precision"] == "bf16"
    used: list[str] = []

    class Spy(TieredEvaluator):
        def __init__(self, *given: Any, **named: Any) -> None:
            super().__init__(*given, **named)
            used.append(self.precision)

    monkeypatch.setattr("autoprune.application.bench.TieredEvaluator", Spy)
    plain, task = settings_of(job()), tiny()
    foreign = replace(front[0], base=replace(front.base, space={**front.base.space, "precision": "fp4"}))
    for point, wish in ((front[0], "auto"), (front[0], "fp32"), (foreign, "auto")):
        settings = replace(plain, precision=wish)  # type: ignore[arg-type]
        autoprune.apply(point, task.build(), task.example_inputs(), task=task, settings=settings)
    assert used == ["bf16", "fp32", "fp32"]


def test_without_a_task_it_slices_only_and_says_so(run: Found, digits: Digits) -> None:
    with pytest.warns(UserWarning, match="only slices: nothing is compensated"):
        small = autoprune.apply(run.front[0], digits.build(), digits.example_inputs())
    assert sum(p.numel() for p in small.parameters()) == run.front[0].costs["params"]


def test_other_weights_get_their_own_ranking(run: Found, the_job: Job, digits: Digits) -> None:
    model = digits.build()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.0 + 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    small = autoprune.apply(run.front[0], model, digits.example_inputs(), task=digits, settings=settings_of(the_job))
    assert sum(p.numel() for p in small.parameters()) == run.front[0].costs["params"]
    with pytest.raises(InputError, match="other weights than the policy was found on"):
        autoprune.apply(run.front[0], model, digits.example_inputs())


def test_a_second_apply_is_refused(run: Found, the_job: Job, digits: Digits) -> None:
    settings = settings_of(the_job)
    small = autoprune.apply(run.front[0], digits.build(), digits.example_inputs(), task=digits, settings=settings)
    with pytest.raises(InputError, match="was applied to this model before"):
        autoprune.apply(run.front[0], small, digits.example_inputs(), task=digits, settings=settings)


def test_another_structure_is_refused_with_the_layers_named(run: Found, digits: Digits) -> None:
    group = run.front[0].base.groups[0]
    wider = replace(group, width=group.width + 4, grid=(*group.grid[:-1], group.width + 4))
    base = replace(run.front.base, groups=(wider, *run.front.base.groups[1:]), structure_fingerprint="sha256:other")
    widths = {**run.front[0].policy.as_dict(), group.name: 1}
    point = replace(run.front[0], base=base, policy=autoprune.Policy.of(widths))
    words = f"{group.name}: policy says {group.width + 4} wide, model has {group.width}"
    with pytest.raises(InputError, match=words):
        autoprune.apply(point, digits.build(), digits.example_inputs(), task=digits)
    with pytest.raises(InputError, match="the model has no such group"):
        autoprune.apply(point, nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 2, 3)), digits.example_inputs())


def test_the_verb_saves_a_model_that_loads_again_and_scores_the_same(
    run: Found, the_job: Job, digits: Digits, tmp_path: Path
) -> None:
    full = Training.of(None, 0.2)
    report = apply_file(run.path / "policy.json", the_job, "macs=0.6", tmp_path, Order(training=full, export=("pt2",)))
    assert report == json.loads((tmp_path / "apply.json").read_text())
    assert set(report) >= KEYS
    assert report["verification_error"] <= 1e-5
    assert report["recipe"]["recipe"] == "full"
    assert report["recipe"]["steps"] >= 1
    again = autoprune.load_applied(tmp_path, digits.build(), digits.example_inputs())
    assert dict(digits.metrics(again, digits.split("test"))) == pytest.approx(report["test"]["pruned"], abs=1e-6)
    assert (tmp_path / "model.pt2").exists()
    front = autoprune.load_front(tmp_path / "policy.json")
    assert isinstance(front, Front)
    assert front[0].id == report["point"]


@pytest.mark.parametrize("word", ["none", "proxy"])
def test_what_the_front_promises_is_what_apply_gives(
    word: str, run: Found, the_job: Job, digits: Digits, tmp_path: Path
) -> None:
    tuned = next(p for p in run.front if p.finetuned)
    training = Training.of(word, None)
    report = apply_file(run.path / "policy.json", the_job, tuned.id, tmp_path / "out", Order(training=training))
    split = "finetuned" if word == "proxy" else "validation"
    assert report["promised"]["loss"] == {"name": "kl", "loss": tuned.loss(split)}
    assert report["validation"]["loss"]["loss"] == pytest.approx(tuned.loss(split), abs=1e-4)
    assert report["validation"]["metrics"] == pytest.approx(dict(tuned.metrics[split]), abs=1e-4)
    assert report["recipe"] == (tuned.finetuned if word == "proxy" else {"recipe": "none"})
    small = autoprune.apply(tuned, digits.build(), digits.example_inputs(), task=digits, finetune=word)
    saved = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(value, saved[name]) for name, value in small.state_dict().items())
    autoprune.save(small, tmp_path / "python")
    loaded = autoprune.load(tmp_path / "python").state_dict()  # digits is a task of our own
    assert all(torch.equal(value, saved[name]) for name, value in loaded.items())


def test_proxy_trains_nothing_where_the_search_trained_nothing(run: Found, the_job: Job, tmp_path: Path) -> None:
    plain = next(p for p in run.front if not p.finetuned)
    report = apply_file(run.path / "policy.json", the_job, plain.id, tmp_path)
    assert report["recipe"] == {"recipe": "none"}
    assert report["validation"]["loss"]["loss"] == pytest.approx(plain.loss(), abs=1e-4)


@pytest.mark.parametrize(
    ("finetune", "epochs", "message"),
    [("half", None, "unknown finetune 'half'"), ("proxy", 2.0, "epochs belong to"), ("none", 0.0, "epochs belong to")],
)
def test_a_pair_of_training_words_that_contradicts_itself_is_refused(
    finetune: str, epochs: float | None, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        Training.of(finetune, epochs)
    with pytest.raises(InputError, match="from 0 to 10000, not nan"):
        Training.of("full", float("nan"))
    assert Training.of(None, 3.0) == Training.of("full", 3.0)
    assert Training.of(None, None) == Training("proxy")


def test_a_recipe_that_this_version_does_not_know_is_refused(run: Found, digits: Digits) -> None:
    odd = replace(run.front[0], finetuned={"recipe": "sparse", "steps": 3, "seed": 0})
    with pytest.raises(InputError, match="trained by the recipe 'sparse', which this version does not know"):
        autoprune.apply(odd, digits.build(), digits.example_inputs(), task=digits)
    damaged = replace(run.front[0], finetuned={"recipe": "proxy", "steps": "many", "seed": 0})
    with pytest.raises(InputError, match="needs whole steps and a seed"):
        autoprune.apply(damaged, digits.build(), digits.example_inputs(), task=digits)


def test_a_recovery_from_python_is_the_one_of_the_job_and_goes_on_where_it_was_killed(
    run: Found, the_job: Job, digits: Digits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"learning_rate": 0.001, "optimizer": "adamw", "ema": 0.9, "checkpoint_every": 1, "epochs": 1}
    job = Job.from_dict(the_job.plain() | {"recovery": {"schedule": "one_shot", "options": options}})
    order = Order(training=Training.of("full", None))
    report = apply_file(run.path / "policy.json", job, run.front[0].id, tmp_path / "job", order)
    saved, keep, kept = load_file(tmp_path / "job" / "model.safetensors"), Place.keep, list[Saved]()
    assert report["recipe"]["options"] == {k: v for k, v in options.items() if k not in ("learning_rate", "epochs")}
    mine = tmp_path / "mine"
    (mine / "checkpoint").mkdir(parents=True)
    words = {"schedule": "one_shot", "options": options, "checkpoints": mine}

    class KilledError(BaseException):
        pass

    def killed(self: Place, saved: Saved) -> bool:
        kept.append(saved)
        if len(kept) == 3:
            raise KilledError
        return keep(self, saved)

    monkeypatch.setattr(Place, "keep", killed)
    for _ in range(2):
        try:
            small = autoprune.apply(run.front[0], digits.build(), digits.example_inputs(), task=digits, recovery=words)
        except KilledError:
            assert (mine / "checkpoint.json").exists()
    assert [s.state.get("done") for s in kept[:4]] == [1, 2, 3, 3], "the step that was not kept is done again"
    assert all(torch.equal(value, saved[name]) for name, value in small.state_dict().items())
    assert [p.name for p in mine.iterdir()] == ["checkpoint"], "what was there before stays"


def test_a_course_of_the_search_is_gone_on_with_after_its_last_whole_epoch(
    run: Found, the_job: Job, digits: Digits, tmp_path: Path
) -> None:
    recipe = {"recipe": "course", "epochs": 3, "learning_rate": 0.01, "distillation": 0.7, "seed": 0}
    per_epoch = samples_in(digits.split("train")) // BATCH_SIZE
    point = replace(run.front[0], finetuned={**recipe, "steps": 3 * per_epoch})

    def steps(place: Place | None) -> Any:
        manner = Manner(settings_of(the_job), build_criterion("obs"), Training("proxy"), place)
        return applying(point, digits.build(), digits.example_inputs(), digits, manner)

    whole, place, epochs = finished(steps(None)), Place(tmp_path / "kept", "one"), list[float]()
    for step in steps(place):
        if step.stage == "training" and step.done == 2 * per_epoch:
            break
    going = steps(place)
    try:
        while True:
            step = next(going)
            if step.stage == "training":
                epochs.append(step.done / per_epoch)
    except StopIteration as end:
        again = end.value
    assert epochs == [2.0]
    kept = again.model.state_dict()
    assert all(torch.equal(value, kept[name]) for name, value in whole.model.state_dict().items())
    assert again.facts["course"]["before"]["metrics"] == dict(point.metrics["validation"])


@pytest.mark.parametrize(
    ("recovery", "said"),
    [
        ({"schedule": "one_shoot"}, "unknown recovery 'one_shoot'; did you mean 'one_shot'"),
        ({"shedule": "one_shot"}, "recovery: unknown key 'shedule'; did you mean 'schedule'"),
        ({"options": {"optimizer": "adamz"}}, r"recovery\.options: unknown optimizer 'adamz'; did you mean 'adamw?'"),
        ({"options": ["sgd"]}, "options must be a mapping and checkpoints a folder"),
        ({"options": {"features": ["nothing*"]}}, "matches no module of the model"),
        ({"options": {"features": ["*"]}}, r"gives \[\d+, \d+, .* in the pruned model and .*its width stays in "),
        ({"options": {"optimizer": "muon"}}, "optimizer muon fails: ValueError: Muon only supports 2D"),
        ({"schedule": "rewind", "options": {"weights": __file__}}, "is not a whole safetensors file"),
    ],
)
def test_what_a_recovery_cannot_do_is_said_before_any_work(
    recovery: Any, said: str, run: Found, digits: Digits, monkeypatch: pytest.MonkeyPatch
) -> None:
    def worked(*_: Any) -> None:
        raise AssertionError("work was begun")

    monkeypatch.setattr("autoprune.application.bench.building", worked)
    narrow = min(run.front, key=lambda p: p.ratio("macs"))
    with pytest.raises(InputError, match=said) as caught:
        autoprune.apply(narrow, digits.build(), digits.example_inputs(), task=digits, recovery=recovery)
    assert "\n" not in str(caught.value)


def test_an_early_checkpoint_of_another_model_is_refused_before_the_model_is_looked_at(
    run: Found, the_job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def looked(*_: Any) -> None:
        raise AssertionError("the model was analysed")

    monkeypatch.setattr("autoprune.application.apply.matching", looked)
    save_file({"other.weight": torch.zeros(2, 2)}, tmp_path / "early.safetensors")
    recovery = {"schedule": "rewind", "options": {"weights": str(tmp_path / "early.safetensors")}}
    job = Job.from_dict(the_job.plain() | {"recovery": recovery})
    order = Order(training=Training.of("full", 1.0))
    with pytest.raises(InputError, match=r"early.safetensors has no tensor .*\(another model's\?\)"):
        apply_file(run.path / "policy.json", job, run.front[0].id, tmp_path / "small", order)
    with pytest.raises(InputError, match="a full recovery trains on data"):
        autoprune.apply(run.front[0], Digits().build(), Digits().example_inputs(), recovery="one_shot")


def test_a_criterion_that_the_file_alone_names_is_not_imported(
    run: Found, the_job: Job, digits: Digits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'owned')!r}, 'w')\n")
    monkeypatch.syspath_prepend(tmp_path)
    data = json.loads((run.path / "policy.json").read_text())
    data["space"]["criterion"] = "evil:X"
    (tmp_path / "policy.json").write_text(json.dumps(data))
    with pytest.raises(InputError, match="names the criterion 'evil:X', which is none of autoprune's own") as caught:
        apply_file(tmp_path / "policy.json", the_job, "knee", tmp_path / "out")
    assert "\n" not in str(caught.value)
    point = load_front(tmp_path / "policy.json")[0]
    with pytest.raises(InputError, match="say --criterion evil:X"):
        autoprune.apply(point, digits.build(), digits.example_inputs(), task=digits)
    assert not (tmp_path / "owned").exists()
    small = autoprune.apply(point, digits.build(), digits.example_inputs(), task=digits, criterion="l1_norm")
    assert sum(p.numel() for p in small.parameters()) == point.costs["params"]
