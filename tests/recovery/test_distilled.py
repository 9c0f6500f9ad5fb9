"""The options of a recovery's courses: what each does, and what is said of one that is wrong."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autoprune.errors import InputError
from autoprune.evaluator import prepared
from autoprune.evaluator.material import Repeated, Streamed
from autoprune.recovery import Distilled, build_recovery
from tests.small import World, student_of, world, world_of


def trained(w: World, steps: int = 4, **options: Any) -> dict[str, Tensor]:
    student = student_of(w)
    course = Distilled(learning_rate=0.01, **options).course(student, w.model, w.task, steps, 0)
    assert [p.step for p in course] == list(range(1, steps + 1))
    return dict(student.state_dict())


@pytest.fixture(scope="module")
def w() -> World:
    return world("projection", samples=256)


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize(
    "options",
    [
        {"optimizer": "AdamW"},
        {"optimizer": "rmsprop", "optimizer_options": {"alpha": 0.9}},
        {"scheduler": "linear"},
        {"scheduler": "StepLR", "scheduler_options": {"step_size": 1}},
        {"warmup": 3},
        {"weight_decay": 0.3},
        {"batch_size": 32},
        {"max_norm": 0.01},
        {"precision": "bf16"},
        {"ema": 0.9},
        {"fresh": True},
        {"norm_statistics": "running"},
        {"distillation": 0.5},
        {"loss": "mse"},
    ],
    ids=str,
)
def test_every_option_makes_a_difference_and_the_same_one_each_time(w: World, options: dict[str, Any]) -> None:
    found = trained(w, **options)
    assert not same(found, trained(w))
    assert same(found, trained(w, **options))


def test_batches_that_are_gathered_make_one_step_of_all_their_samples(w: World) -> None:
    assert Distilled(batch_size=32, accumulate=4).samples_a_step == 128
    gathered, whole = trained(w, batch_size=32, accumulate=4), trained(w, batch_size=128)
    for name, value in whole.items():
        torch.testing.assert_close(gathered[name], value, rtol=2e-3, atol=1e-4)


class Users(nn.Module):
    """A stream that keeps its width, and a branch."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.up, self.down, self.head = (nn.Linear(*s) for s in ((6, 8), (8, 16), (16, 8), (8, 4)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        out: Tensor = self.head(x + self.down(self.up(x).relu()))
        return out


def test_features_are_read_with_the_dense_model_beside_and_bring_the_modules_nearer() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        w = world_of(Users().eval(), (6,), 256)
    distance = {}
    for weight in (1e-6, 100.0):
        student = student_of(w)
        options = Distilled(learning_rate=0.01, features=["do*"], feature_weight=weight)
        lesson = options.lesson(w.model, w.task, 20, 0)
        assert isinstance(lesson.material, Streamed)
        assert lesson is options.lesson(w.model, w.task, 20, 0), "the last one is kept"
        list(options.course(student, w.model, w.task, 20, 0))
        seen: dict[nn.Module, Tensor] = {}
        for model in (student, w.model):
            with torch.no_grad():
                seen[model] = model.down(model.up(model.stem(w.statistics[0])).relu())
        distance[weight] = float((seen[student] - seen[w.model]).norm())
    assert distance[100.0] < distance[1e-6]
    with pytest.raises(InputError, match=r"recovery\.options: features: 'dwn' matches no module of the model; did you"):
        Distilled(features=["dwn"]).check(w.model, student_of(w), w.task)


def test_what_a_course_learns_from_is_kept_where_it_repeats_and_read_anew_where_that_is_asked_for(w: World) -> None:
    assert isinstance(Distilled().lesson(w.model, w.task, 4, 0).material, Repeated)
    assert isinstance(Distilled(fresh=True).lesson(w.model, w.task, 4, 0).material, Streamed)


def test_auto_trains_in_bfloat16_where_the_machine_has_it_and_the_model_bears_it(
    w: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert Distilled(precision="bf16").lesson(w.model, w.task, 1, 0).precision == "bf16"
    monkeypatch.setattr("autoprune.evaluator.precision.has_bfloat16", lambda device: True)
    assert Distilled(precision="auto").lesson(w.model, w.task, 1, 0).precision == "fp32", "too small to gain by it"
    monkeypatch.setattr("autoprune.evaluator.precision.SMALL_MACS", 0.0)
    assert Distilled(precision="auto").lesson(w.model, w.task, 1, 0).precision == "bf16"
    monkeypatch.setattr(prepared, "LARGEST_ERROR", 0.0)
    with pytest.warns(UserWarning, match=r"off by .* recovery\.options\.precision: fp32 says so"):
        assert Distilled(precision="auto").lesson(w.model, w.task, 1, 0).precision == "fp32"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"optimiser": "sgd"}, "unknown option 'optimiser'; did you mean 'optimizer'"),
        ({"optimizer": "adamz"}, "unknown optimizer 'adamz'; did you mean 'adamw?'"),
        ({"scheduler": "cosinus"}, "unknown scheduler 'cosinus'; did you mean 'cosine'"),
        ({"batch_size": 0}, "batch_size must be a whole number from 1 on, not 0"),
        ({"accumulate": True}, "accumulate must be a whole number from 1 on, not True"),
        ({"ema": 1.0}, r"ema must lie in \(0, 1\), as 0.999, not 1.0"),
        ({"max_norm": 0}, "max_norm must be above 0, or null for no clipping, not 0"),
        ({"warmup": 1.5}, "warmup must be a share below 1, or a whole number of steps, not 1.5"),
        ({"weight_decay": -1}, "weight_decay must be a number from 0 on, not -1"),
        ({"epochs": float("nan")}, "epochs must be a number of epochs"),
        ({"patience": 0}, "patience must be a whole number from 1 on"),
        ({"checkpoint_every": "often"}, "checkpoint_every must be a whole number from 1 on, not 'often'"),
        ({"precision": "fp16"}, "unknown precision 'fp16'; did you mean 'bf16'"),
        ({"norm_statistics": "train"}, "unknown norm_statistics 'train'; .*allowed: fixed, running"),
        ({"features": "layer1"}, "features must be a list of names of modules, not 'layer1'"),
        ({"features": 3}, "features must be a list of names of modules, not 3"),
        ({"loss": "kll"}, "unknown loss 'kll'; did you mean 'kl'"),
        ({"loss": "nowhere:loss"}, "cannot import 'nowhere'"),
        ({"fresh": "yes"}, "fresh must be true or false, not 'yes'"),
        ({"optimizer_options": ["momentum"]}, "optimizer_options must be a mapping of options"),
        ({"optimizer": 3}, "optimizer must be a name, or module:attribute, not 3"),
        ({"last_lesson": None}, "unknown option 'last_lesson'"),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["one_shot", "iterative", "sparse_first"])
def test_a_wrong_option_is_one_line_that_says_where_it_stands(name: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=rf"recovery\.options: .*{said}") as caught:
        build_recovery(name, options)
    assert "\n" not in str(caught.value)


class Own:
    """A user's recovery with the options of a course and one of its own."""

    def __init__(self, strength: float = 1.0, course: Distilled | None = None) -> None:
        self.strength, self.course = strength, course

    def __call__(self, *given: Any) -> Any:
        assert self.course is not None
        return self.course.course(*given)


def test_a_users_recovery_gets_all_options_of_a_course_by_asking_for_it() -> None:
    found = build_recovery(f"{__name__}:Own", {"strength": 2.0, "optimizer": "adamw", "learning_rate": 0.1})
    assert found.recovery.strength == 2.0  # type: ignore[attr-defined]
    assert found.course == Distilled(learning_rate=0.1, optimizer="adamw")
    found.at_rate(0.5)
    assert found.course == Distilled(learning_rate=0.5, optimizer="adamw")
    with pytest.raises(InputError, match=r"unknown option 'strenght'; did you mean 'strength'"):
        build_recovery(f"{__name__}:Own", {"strenght": 2.0})
