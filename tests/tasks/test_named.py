"""The tasks timm and torchvision over folders of images; skipped where these libraries are not installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from autoprune.errors import InputError
from autoprune.protocols import SPLITS, Task
from autoprune.tasks.timm import timm
from autoprune.tasks.torchvision import torchvision
from tests.pictures import library, pillow, write_images

NAMES = {"timm": "mobilenetv3_small_050", "torchvision": "shufflenet_v2_x0_5"}
MAKERS = {"timm": timm, "torchvision": torchvision}


def dense(name: str, **settings: Any) -> nn.Module:
    """The library's small model with random weights, always the same."""
    found = library(name)
    make = found.create_model if name == "timm" else found.models.get_model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made: nn.Module = make(NAMES[name], **settings)
    return made.eval()


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    pillow()
    root, names = tmp_path_factory.mktemp("images"), ("ant", "bee", "cat")
    train = write_images(root / "train", dict.fromkeys(names, 8), size=40)
    return train, write_images(root / "test", dict.fromkeys(names, 2), seed=1, size=40)


@pytest.fixture(params=["timm", "torchvision"], scope="module")
def name(request: pytest.FixtureRequest) -> str:
    library(request.param)
    return str(request.param)


@pytest.fixture(scope="module")
def weights(name: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint for three classes."""
    path = tmp_path_factory.mktemp("weights") / "three.safetensors"
    save_file(dense(name, num_classes=3).state_dict(), path)
    return path


@pytest.fixture(autouse=True)
def no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Caches that are empty, whatever this machine has."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    constants = pytest.importorskip("huggingface_hub.constants", reason="needs timm (pip install 'autoprune[timm]')")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


def test_it_is_the_librarys_model_with_the_weights_and_as_many_outputs_as_they_have(
    name: str, roots: tuple[Path, Path], weights: Path
) -> None:
    before = torch.random.get_rng_state()
    task = MAKERS[name](NAMES[name], *roots, weights=weights)
    assert torch.equal(before, torch.random.get_rng_state())
    assert isinstance(task, Task)
    model, same = task.build(), dense(name, num_classes=3)
    assert type(model) is type(same)
    assert not model.training
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), same.parameters(), strict=True))
    batch = next(iter(task.split("validation")))
    assert torch.equal(task.outputs(model, batch), same(batch[0]))
    assert task.metrics(model, task.split("test"))["accuracy"] in (0, *(i / 6 for i in range(1, 7)))
    assert [sum(len(y) for _, y in task.split(s)) for s in SPLITS] == [7, 4, 6, 13]


def test_inputs_are_what_the_librarys_own_transform_makes_of_the_images(
    name: str, roots: tuple[Path, Path], weights: Path
) -> None:
    found = library(name)
    if name == "timm":
        transform = found.data.create_transform(**found.data.resolve_model_data_config(dense(name)))
    else:
        transform = found.models.get_model_weights(NAMES[name]).DEFAULT.transforms()
    inputs, _ = next(iter(MAKERS[name](NAMES[name], *roots, weights=weights).split("test")))
    expected = transform(pillow().open(roots[1] / "ant" / "000.png"))
    assert torch.equal(inputs[0], expected)
    assert inputs.shape == (6, 3, 224, 224)


def test_train_is_augmented_and_the_other_splits_are_not(name: str, roots: tuple[Path, Path], weights: Path) -> None:
    task = MAKERS[name](NAMES[name], *roots, weights=weights)

    def totals(split: str) -> list[float]:
        return sorted(float(x.sum()) for inputs, _ in task.split(split) for x in inputs)

    assert totals("calibration") == totals("calibration")
    assert not set(totals("train")) & set(totals("train"))


@pytest.mark.parametrize("holder", [None, "state_dict", "model"])
def test_a_checkpoint_of_torch_save_is_read_too(
    name: str, roots: tuple[Path, Path], tmp_path: Path, holder: str | None
) -> None:
    state = dense(name, num_classes=3).state_dict()
    torch.save(state if holder is None else {holder: state, "epoch": 3}, tmp_path / "three.pth")
    model = MAKERS[name](NAMES[name], *roots, weights=tmp_path / "three.pth").build()
    assert all(torch.equal(a, state[k]) for k, a in model.state_dict().items())


def test_a_class_count_that_is_not_the_checkpoints_is_refused(
    name: str, roots: tuple[Path, Path], tmp_path: Path
) -> None:
    save_file(dense(name, num_classes=4).state_dict(), tmp_path / "four.safetensors")
    with pytest.raises(InputError, match="train has 3 classes, the model 4 outputs"):
        MAKERS[name](NAMES[name], *roots, weights=tmp_path / "four.safetensors")


def test_a_checkpoint_of_another_model_is_named_with_the_first_tensors(
    name: str, roots: tuple[Path, Path], tmp_path: Path
) -> None:
    save_file(nn.Sequential(nn.Linear(3, 3)).state_dict(), tmp_path / "other.safetensors")
    first = next(iter(dense(name).state_dict()))
    with pytest.raises(InputError, match=rf"has no tensor '{first}', .* more, which the model needs, and has '0\.bias"):
        MAKERS[name](NAMES[name], *roots, weights=tmp_path / "other.safetensors")


def test_a_checkpoint_of_another_width_is_named_with_its_shapes(
    name: str, roots: tuple[Path, Path], tmp_path: Path
) -> None:
    found = library(name)
    wider = {"timm": "mobilenetv3_small_075", "torchvision": "shufflenet_v2_x1_0"}[name]
    model = found.create_model(wider) if name == "timm" else found.models.get_model(wider)
    save_file(model.state_dict(), tmp_path / "wide.safetensors")
    with pytest.raises(InputError, match=r"is \[\d+.*\], the model has \[\d+"):
        MAKERS[name](NAMES[name], *roots, weights=tmp_path / "wide.safetensors")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("resnet5O", "knows no .*'resnet5O'; nearest: resnet50"),
        ("qqqq", r"knows no .*'qqqq'; it has \d+, such as \w+"),
    ],
)
def test_an_unknown_model_is_answered_with_the_nearest(
    name: str, roots: tuple[Path, Path], given: str, message: str
) -> None:
    with pytest.raises(InputError, match=f"^{name} {message}") as error:
        MAKERS[name](given, *roots)
    assert len(str(error.value)) < 200


def test_without_weights_and_with_an_empty_cache_it_is_said_how_to_fill_it(name: str, roots: tuple[Path, Path]) -> None:
    with pytest.raises(InputError, match=f"{name}'s weights of '{NAMES[name]}' are not in its cache: fetch them once"):
        MAKERS[name](NAMES[name], *roots)


def test_an_unknown_tag_of_timm_is_answered_with_the_known_ones(roots: tuple[Path, Path]) -> None:
    found = library("timm")
    message = r"knows no weights 'lamb_in2k' of 'mobilenetv3_small_050'; did you mean 'lamb_in1k'"
    with pytest.raises(InputError, match=message):
        timm("mobilenetv3_small_050.lamb_in2k", *roots)
    untrained = next(name for name in found.list_models() if not found.is_model_pretrained(name))
    with pytest.raises(InputError, match="timm has none, so name a file"):
        timm(untrained, *roots)


def synsets(root: Path, n: int) -> tuple[Path, Path]:
    """Folders for `n` classes of ImageNet."""
    names = library("timm").data.ImageNetInfo("imagenet-1k").label_names()[100 : 100 + n]
    train = write_images(root / "train", dict.fromkeys(names, 6), size=40)
    return train, write_images(root / "test", dict.fromkeys(names, 1), seed=1, size=40)


def in_hub_cache(root: Path, repository: str, state: dict[str, torch.Tensor]) -> None:
    """The layout of huggingface_hub's cache with one safetensors file."""
    folder = root / f"models--{repository.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("abc")
    (folder / "snapshots" / "abc").mkdir(parents=True)
    save_file(state, folder / "snapshots" / "abc" / "model.safetensors")


def test_without_weights_timm_takes_what_lies_in_its_cache_and_a_subset_of_imagenet_keeps_its_numbers(
    tmp_path: Path,
) -> None:
    roots = synsets(tmp_path, 3)
    state = dense("timm").state_dict()
    in_hub_cache(tmp_path / "hub", "timm/mobilenetv3_small_050.lamb_in1k", state)
    with pytest.warns(UserWarning, match="has 3 of the model's 1000 classes"):
        task = timm("mobilenetv3_small_050", *roots)
    assert all(torch.equal(a, state[k]) for k, a in task.build().state_dict().items())
    assert [y.tolist() for _, y in task.split("test")] == [[100, 101, 102]]


def test_without_weights_torchvision_takes_what_lies_in_its_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, roots = library("torchvision"), synsets(tmp_path, 3)
    entry = found.models.get_model_weights(NAMES["torchvision"]).DEFAULT
    folder = tmp_path / "torch" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    state = dense("torchvision").state_dict()
    torch.save(state, folder / entry.url.rpartition("/")[2])
    names = tmp_path / "names.txt"
    names.write_text("\n".join(library("timm").data.ImageNetInfo("imagenet-1k").label_names()))
    with pytest.raises(InputError, match="has 3 classes, the model 1000 outputs"):
        torchvision(NAMES["torchvision"], *roots)
    with pytest.warns(UserWarning, match="has 3 of the model's 1000 classes"):
        task = torchvision(NAMES["torchvision"], *roots, classes=names)
    assert all(torch.equal(a, state[k]) for k, a in task.build().state_dict().items())
    assert [y.tolist() for _, y in task.split("test")] == [[100, 101, 102]]


def test_models_that_torchvision_builds_in_two_ways_are_refused(roots: tuple[Path, Path]) -> None:
    library("torchvision")
    with pytest.raises(InputError, match="'inception_v3' is another model with its weights than without; take timm's"):
        torchvision("inception_v3", *roots)
