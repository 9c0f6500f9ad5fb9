"""Tasks: disjoint splits, the same batches every time, weights and data checked at the door."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import autoprune.tasks.digits as digits_module
from autoprune.errors import InputError
from autoprune.files.job import Job
from autoprune.protocols import SPLITS, Task
from autoprune.tasks._arrays import DIRECTIONS, accuracies
from autoprune.tasks._cache import cache_folder
from autoprune.tasks._cifar_resnet import CifarResNet, resnet20, resnet32, resnet44, resnet56
from autoprune.tasks._wrap import task as wrap
from autoprune.tasks.digits import Digits
from autoprune.tasks.images import Images

ROOT = Path(__file__).parents[2]
DATA = ROOT.parent / "shared" / "data"


def rows(task: Task, split: str) -> set[bytes]:
    return {x.contiguous().numpy().tobytes() for inputs, _ in task.split(split) for x in inputs}


@pytest.fixture(scope="module")
def digits() -> Digits:
    return Digits()


@pytest.fixture
def arrays(tmp_path: Path) -> dict[str, Any]:
    """Arguments of the task `images` for 60 + 20 tiny pictures and a tiny model."""
    rng = np.random.default_rng(0)
    for part, n in (("train", 60), ("test", 20)):
        np.save(tmp_path / f"{part}_images.npy", rng.integers(0, 256, (n, 8, 8, 3), dtype=np.uint8))
        np.save(tmp_path / f"{part}_labels.npy", rng.integers(0, 10, n, dtype=np.uint8))
    save_file(tiny().state_dict(), tmp_path / "weights.safetensors")
    files = {f"{p}_{k}": tmp_path / f"{p}_{k}.npy" for p in ("train", "test") for k in ("images", "labels")}
    return {"model": "tests.tasks.test_tasks:tiny", "weights": tmp_path / "weights.safetensors", **files}


def tiny() -> nn.Module:
    return CifarResNet(8, planes=(4, 4, 4))


def test_the_splits_of_digits_are_disjoint_and_cover_all_1797_pictures(digits: Digits) -> None:
    sizes = {name: sum(len(x) for x, _ in digits.split(name)) for name in SPLITS}
    assert sum(sizes.values()) == 1797
    assert min(sizes.values()) >= 250
    for a, b in itertools.combinations(SPLITS, 2):
        assert not rows(digits, a) & rows(digits, b), (a, b)


def test_the_splits_of_images_are_disjoint_and_seeded(arrays: dict[str, Any]) -> None:
    task, same, other = Images(**arrays), Images(**arrays), Images(**arrays, seed=1)
    for a, b in itertools.combinations(SPLITS, 2):
        assert not rows(task, a) & rows(task, b), (a, b)
    assert rows(task, "calibration") == rows(same, "calibration") != rows(other, "calibration")
    assert [len(rows(task, s)) for s in ("calibration", "validation", "train", "test")] == [18, 9, 33, 20]


def test_a_split_gives_the_same_batches_at_every_pass(digits: Digits) -> None:
    split = digits.split("train")
    for (x, y), (x_again, y_again) in zip(split, split, strict=True):
        assert torch.equal(x, x_again)
        assert torch.equal(y, y_again)
        assert x.dtype == torch.float32
        assert x.is_contiguous(memory_format=torch.channels_last)


def test_the_digits_model_is_right_on_98_percent_of_the_test_pictures(digits: Digits) -> None:
    assert digits.metrics(digits.build(), digits.split("test"))["accuracy"] >= 0.98


def test_the_digits_weights_are_trained_once_and_a_damaged_cache_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AUTOPRUNE_CACHE", str(tmp_path))
    monkeypatch.setattr(digits_module, "EPOCHS", 1)
    before = torch.random.get_rng_state()
    first = Digits().build().state_dict()
    (file,) = tmp_path.iterdir()
    written = file.stat().st_mtime_ns
    again = Digits().build().state_dict()
    assert file.stat().st_mtime_ns == written
    assert all(torch.equal(first[k], again[k]) for k in first)
    file.write_bytes(file.read_bytes()[:500])
    anew = Digits().build().state_dict()
    assert all(torch.equal(first[k], anew[k]) for k in first)
    assert torch.equal(before, torch.random.get_rng_state())


def test_the_cache_folder_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AUTOPRUNE_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "autoprune"
    monkeypatch.setenv("AUTOPRUNE_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"


@pytest.mark.parametrize(
    ("factory", "millions"), [(resnet20, 0.270), (resnet32, 0.464), (resnet44, 0.659), (resnet56, 0.853)]
)
def test_the_cifar_resnets_have_the_published_number_of_parameters(factory: Any, millions: float) -> None:
    assert round(sum(p.numel() for p in factory().parameters()) / 1e6, 3) == pytest.approx(millions, abs=0.0011)


@pytest.mark.skipif(not DATA.exists(), reason="needs the CIFAR-10 data beside the repository (shared/data)")
def test_the_published_resnet20_scores_its_published_accuracy() -> None:
    task = Job.load(ROOT / "search_spaces" / "cifar10_resnet20.yaml").build_task()
    assert round(task.metrics(task.build(), task.split("test"))["accuracy"], 4) == 0.9164


def test_the_worst_class_is_the_one_with_the_least_share_of_right_answers() -> None:
    inputs, targets = torch.eye(3)[[0, 0, 1, 1, 1, 2]], torch.tensor([0, 0, 1, 1, 2, 2])
    found = accuracies(nn.Identity(), [(inputs[:2], targets[:2]), (inputs[2:], targets[2:])])
    assert found == {"accuracy": pytest.approx(5 / 6), "worst_class_accuracy": 0.5}
    assert accuracies(nn.Identity(), [(inputs[:2], targets[:2])])["worst_class_accuracy"] == 1.0, "absent ones are out"
    assert list(found) == list(DIRECTIONS)


def test_built_in_tasks_have_the_accuracy_of_the_worst_class_beside_that_of_all(digits: Digits) -> None:
    found = digits.metrics(digits.build(), digits.split("test"))
    assert set(found) == set(digits.directions) == {"accuracy", "worst_class_accuracy"}
    assert 0.8 <= found["worst_class_accuracy"] <= found["accuracy"]


def test_metrics_leave_the_modes_of_the_model_alone(digits: Digits) -> None:
    model = digits.build().train()
    model.get_submodule("layer1").eval()
    modes = [m.training for m in model.modules()]
    digits.metrics(model, digits.split("test"))
    assert modes == [m.training for m in model.modules()]


def cut_in_half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("key", "spoil", "message"),
    [
        ("train_images", Path.unlink, "no data file .*train_images"),
        ("train_images", cut_in_half, "train_images.npy is not a whole .npy file"),
        ("test_labels", lambda p: np.save(p, np.zeros(3, np.uint8)), "must hold 20 integer labels"),
        ("train_images", lambda p: np.save(p, np.zeros((60, 8, 8, 3))), "must be uint8"),
        ("weights", Path.unlink, "no weights file"),
        ("weights", cut_in_half, "not a whole safetensors file"),
        ("weights", lambda p: save_file({"a": torch.zeros(1)}, p), "has no tensor 'conv1.weight'"),
        (
            "weights",
            lambda p: save_file(CifarResNet(8, planes=(4, 4, 8)).state_dict(), p),
            r"layer3.0.conv1.weight is \[8",
        ),
        ("weights", lambda p: save_file({**tiny().state_dict(), "x": torch.zeros(1)}, p), "holds 'x', which the model"),
    ],
)
def test_missing_or_damaged_files_are_named(arrays: dict[str, Any], key: str, spoil: Any, message: str) -> None:
    spoil(arrays[key])
    with pytest.raises(InputError, match=message):
        Images(**arrays)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"mean": [0.1, 0.2]}, "mean and std need 1 or 3 values"),
        ({"n_calibration": 50, "n_validation": 10}, "leave some of the 60 training samples"),
        ({"model": "tests.tasks.test_tasks:greyy"}, "has no 'greyy'; did you mean 'grey'"),
    ],
)
def test_wrong_arguments_of_images_are_named(arrays: dict[str, Any], args: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Images(**{**arrays, **args})


def test_grey_pictures_without_a_channel_axis_are_read(arrays: dict[str, Any]) -> None:
    for part in ("train", "test"):
        np.save(arrays[f"{part}_images"], np.load(arrays[f"{part}_images"])[..., 0])
    save_file(CifarResNet(8, channels=1, planes=(4, 4, 4)).state_dict(), arrays["weights"])
    task = Images(**{**arrays, "model": "tests.tasks.test_tasks:grey"})
    assert task.example_inputs()[0].shape == (2, 1, 8, 8)


def grey() -> nn.Module:
    return CifarResNet(8, channels=1, planes=(4, 4, 4))


def loaders(shuffle: bool = False) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.randn(24, 5, generator=generator), torch.randint(3, (24,), generator=generator))
    return {name: DataLoader(data, batch_size=8, shuffle=shuffle and name == "validation") for name in SPLITS}


def accuracy(outputs: Tensor, targets: Tensor) -> Mapping[str, float]:
    return {"accuracy": float((outputs.argmax(-1) == targets).float().mean())}


def test_a_users_model_becomes_a_task_without_a_class() -> None:
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))
    made = wrap(model, loaders(), F.cross_entropy, accuracy)
    assert isinstance(made, Task)
    assert made.directions == {"accuracy": "maximize"}
    built = made.build()
    assert built is not model
    assert all(torch.equal(a, b) for a, b in zip(built.parameters(), model.parameters(), strict=True))
    assert made.example_inputs()[0].shape == (2, 5)
    batch = next(iter(made.split("calibration")))
    assert torch.equal(made.outputs(built, batch), model(batch[0]))
    assert torch.equal(made.loss(built, batch), F.cross_entropy(model(batch[0]), batch[1]))
    whole = torch.cat([model(x).argmax(-1) == y for x, y in made.split("test")])
    assert made.metrics(built, made.split("test"))["accuracy"] == pytest.approx(float(whole.float().mean()))


def test_wrapping_a_model_leaves_global_chance_alone() -> None:
    torch.manual_seed(3)
    model = nn.Linear(5, 3)
    before = torch.random.get_rng_state()
    wrap(model, loaders(), F.cross_entropy, accuracy)
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tests": []}, "unknown split 'tests' in loaders; did you mean 'test'"),
        ({"train": iter([])}, r"loaders\['train'\] is empty"),
        ({"calibration": (x for x in [(torch.zeros(2, 5), torch.zeros(2))])}, "can be read once only"),
        ({"validation": [torch.zeros(2, 5)]}, "loaders..validation..: a batch must be an .inputs, targets. pair"),
    ],
)
def test_wrong_loaders_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        wrap(nn.Linear(5, 3), {**loaders(), **change}, F.cross_entropy, accuracy)


def test_a_missing_split_is_named() -> None:
    with pytest.raises(InputError, match="loaders has no train"):
        wrap(nn.Linear(5, 3), {k: v for k, v in loaders().items() if k != "train"}, F.cross_entropy, accuracy)


def test_a_loader_that_shuffles_is_refused() -> None:
    with pytest.raises(InputError, match=r"loaders\['validation'\] shuffles"):
        wrap(nn.Linear(5, 3), loaders(shuffle=True), F.cross_entropy, accuracy)
