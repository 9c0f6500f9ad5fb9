"""Folders of images: disjoint splits that are decoded as they are asked for, classes and files checked at the door."""

from __future__ import annotations

import itertools
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from autoprune.database.drawn import draw
from autoprune.errors import InputError
from autoprune.files.job import Job
from autoprune.protocols import SPLITS, Task
from autoprune.tasks._arrays import MOST_CUT, Normalised
from autoprune.tasks._folders import Classifier, Decoded, Folders, ImageFolder, Transforms, classification
from autoprune.tasks.timm import timm
from autoprune.tasks.torchvision import torchvision
from tests.pictures import pillow, write_images

JOBS = Path(__file__).parents[2] / "search_spaces"
FOLDER_JOBS = ["convnext", "efficientnet_b0", "mobilenetv3", "resnet50_imagenet", "vit"]

pillow()


def steady(image: Any) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def jittered(image: Any) -> Tensor:
    return steady(image) + torch.rand(())


def net(outputs: int = 3) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, outputs)
        )


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("images")
    train = write_images(root / "train", {"cat": 30, "ant": 40, "bee": 30})
    return train, write_images(root / "test", {"bee": 7, "cat": 6, "ant": 7}, seed=1)


def folders(roots: tuple[Path, Path], **settings: Any) -> Folders:
    return Folders(ImageFolder.read(roots[0], "train"), ImageFolder.read(roots[1], "test"), **settings)


def made(roots: tuple[Path, Path], outputs: int = 3, known: tuple[str, ...] = (), **settings: Any) -> Task:
    found = Classifier(net(outputs), outputs, Transforms(steady, jittered), known)
    return classification(found, folders(roots, **settings))


def drawn(task: Task, name: str, seed: int = 0) -> tuple[Tensor, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pairs = list(task.split(name))
    return torch.cat([x for x, _ in pairs]), torch.cat([y for _, y in pairs])


def images(task: Task, name: str) -> set[bytes]:
    """What identifies each image of a split: its pixels with the jitter, one shift an image, taken off again."""
    inputs = drawn(task, name)[0]
    return {(x - x.min()).mul(255).round().to(torch.uint8).numpy().tobytes() for x in inputs}


def test_calibration_validation_and_train_are_cut_from_the_train_folder_disjoint_and_seeded(
    roots: tuple[Path, Path],
) -> None:
    task, same, other = made(roots), made(roots), made(roots, seed=1)
    assert [len(images(task, s)) for s in ("calibration", "validation", "train", "test")] == [30, 15, 55, 20]
    for a, b in itertools.combinations(SPLITS, 2):
        assert not images(task, a) & images(task, b), (a, b)
    assert images(task, "calibration") == images(same, "calibration") != images(other, "calibration")
    assert images(task, "test") == images(other, "test")


def test_classes_are_the_sorted_folder_names_and_every_image_has_that_of_its_folder(roots: tuple[Path, Path]) -> None:
    inputs, targets = drawn(made(roots), "test")
    assert targets.tolist() == [0] * 7 + [1] * 7 + [2] * 6
    ant = steady(pillow().open(roots[1] / "ant" / "000.png"))
    cat = steady(pillow().open(roots[1] / "cat" / "005.png"))
    assert torch.equal(inputs[0], ant)
    assert torch.equal(inputs[-1], cat)
    counts = sum(drawn(made(roots), name)[1].bincount(minlength=3) for name in ("calibration", "validation", "train"))
    assert counts.tolist() == [40, 30, 30]


def test_train_is_shuffled_and_augmented_by_global_chance_and_the_others_repeat(roots: tuple[Path, Path]) -> None:
    task = made(roots)
    for name in ("calibration", "validation", "test"):
        assert torch.equal(drawn(task, name)[0], drawn(task, name, seed=1)[0])
    once, again, other = (drawn(task, "train", seed=s) for s in (0, 0, 1))
    assert torch.equal(once[0], again[0])
    assert not torch.equal(once[1], other[1])
    assert once[1].bincount().tolist() == other[1].bincount().tolist()
    assert float(once[0].max()) > 1, "jittered"


def test_no_image_is_decoded_before_its_batch_is_asked_for(roots: tuple[Path, Path]) -> None:
    seen: list[int] = []

    def counting(image: Any) -> Tensor:
        seen.append(1)
        return steady(image)

    read = ImageFolder.read(roots[0], "train")
    batches = Decoded(read.path, read.files, torch.from_numpy(read.owners), counting, size=8)
    assert (len(batches), len(seen)) == (13, 0)
    inputs, targets = next(iter(batches))
    assert (len(seen), tuple(inputs.shape), targets.dtype) == (8, (8, 3, 12, 12), torch.int64)
    assert [len(y) for _, y in batches] == [8] * 12 + [4]


def test_of_a_large_folder_no_more_than_needed_is_cut_off_by_default(
    roots: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("autoprune.tasks._arrays.MOST_CUT", 10)
    assert MOST_CUT == 1024
    assert [len(images(made(roots), s)) for s in ("calibration", "validation", "train")] == [10, 10, 80]
    task = made(roots, n_calibration=40, n_validation=20)
    assert [len(images(task, s)) for s in ("calibration", "validation", "train")] == [40, 20, 40]


def test_a_classifier_over_folders_is_a_task_with_both_accuracies(roots: tuple[Path, Path]) -> None:
    task = made(roots)
    assert isinstance(task, Task)
    model = task.build()
    found = task.metrics(model, task.split("test"))
    inputs, targets = drawn(task, "test")
    right = (model(inputs).argmax(1) == targets).float()
    assert found["accuracy"] == pytest.approx(float(right.mean()))
    assert found["worst_class_accuracy"] == pytest.approx(min(float(right[targets == k].mean()) for k in range(3)))
    assert set(found) == set(task.directions)
    assert task.example_inputs()[0].shape == (2, 3, 12, 12)


def test_images_lie_at_any_depth_under_any_of_the_usual_endings_and_others_are_left_out(tmp_path: Path) -> None:
    root = write_images(tmp_path / "data", {"a": 2, "b": 1, ".thumbnails": 1})
    (root / "a" / "notes.txt").write_text("no image")
    (root / "a" / "._000.png").write_bytes(b"what a file manager leaves")
    (root / "b" / "deep").mkdir()
    pillow().open(root / "a" / "000.png").convert("L").save(root / "b" / "deep" / "x.JPG", "JPEG")
    read = ImageFolder.read(root, "train")
    assert read.classes == ("a", "b")
    assert list(read.files) == ["a/000.png", "a/001.png", "b/000.png", "b/deep/x.JPG"]
    assert read.owners.tolist() == [0, 0, 1, 1]
    grey = Decoded(root, read.files[3:], torch.tensor([1]), steady)
    assert next(iter(grey))[0].shape == (1, 3, 12, 12), "grey images become RGB"


@pytest.mark.parametrize(
    ("counts", "spoil", "message"),
    [
        ({}, None, "no folder .*train; give one that holds a folder of images for each class"),
        ({"a": 2}, lambda root: (root / "b").mkdir(), r"train/b holds no image \(.jpg, .jpeg, .png"),
        ({".hidden": 1}, None, "train holds no folders; the images of each class lie in one of its own"),
    ],
)
def test_a_folder_without_images_is_named(tmp_path: Path, counts: dict[str, int], spoil: Any, message: str) -> None:
    root = write_images(tmp_path / "train", counts)
    if spoil:
        spoil(root)
    with pytest.raises(InputError, match=f"task.args.train: .*{message}"):
        ImageFolder.read(root, "train")


def test_train_and_test_must_differ_and_test_has_no_class_of_its_own(roots: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"train and task\.args\.test are the same folder"):
        folders((roots[0], roots[0]))
    with pytest.raises(InputError, match=r"has a class 'dog', which .*train does not have"):
        folders((roots[0], write_images(tmp_path / "test", {"dog": 1, "cat": 1})))


def test_a_test_folder_may_have_fewer_classes(roots: tuple[Path, Path], tmp_path: Path) -> None:
    task = made((roots[0], write_images(tmp_path / "test", {"cat": 2, "bee": 1})))
    assert drawn(task, "test")[1].tolist() == [1, 2, 2]


def test_a_class_count_that_is_not_the_models_is_refused(roots: tuple[Path, Path]) -> None:
    with pytest.raises(InputError, match="has 3 classes, the model 5 outputs; give the weights of a model for these"):
        made(roots, outputs=5)


def test_a_subset_of_the_models_classes_is_taken_by_name_and_said(roots: tuple[Path, Path], tmp_path: Path) -> None:
    known = ("cat", "dog", "bee", "elk", "ant")
    with pytest.warns(UserWarning, match="has 3 of the model's 5 classes, so metrics are over these"):
        task = made(roots, outputs=5, known=known)
    assert drawn(task, "test")[1].tolist() == [4] * 7 + [2] * 7 + [0] * 6
    with pytest.raises(InputError, match="has 3 classes, the model 5 outputs"):
        made(roots, outputs=5, known=("cat", "dog", "bee", "elk", "emu"))
    (tmp_path / "names.txt").write_text("\n".join(known) + "\n")
    with pytest.warns(UserWarning, match="3 of the model's 5"):
        task = made(roots, outputs=5, classes=tmp_path / "names.txt")
    assert drawn(task, "test")[1].tolist() == [4] * 7 + [2] * 7 + [0] * 6


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ant\nbee\n", "names 2 classes in 2 lines, the model has 3 outputs"),
        ("ant\nbee\nbee\n", "names 2 classes in 3 lines, the model has 3 outputs"),
        ("ant\nbee\ncats\n", "cat is no class of .*names.txt; did you mean 'cats'"),
        (None, "task.args.classes: cannot read .*names.txt"),
    ],
)
def test_a_wrong_list_of_classes_is_named(
    roots: tuple[Path, Path], tmp_path: Path, text: str | None, message: str
) -> None:
    if text is not None:
        (tmp_path / "names.txt").write_text(text)
    with pytest.raises(InputError, match=message):
        made(roots, classes=tmp_path / "names.txt")


@pytest.mark.parametrize("left", [0, 1, 60])
def test_an_image_that_cannot_be_read_is_named_when_it_is_decoded(tmp_path: Path, left: int) -> None:
    train, test = write_images(tmp_path / "train", {"a": 9}), write_images(tmp_path / "test", {"a": 1}, size=64)
    whole = (test / "a" / "000.png").read_bytes()
    (test / "a" / "000.png").write_bytes(whole[: len(whole) * left // 100])
    task = made((train, test), outputs=1)
    with pytest.raises(
        InputError, match=r"test/a/000\.png cannot be read as an image .*; mend it, or take it out"
    ) as error:
        list(task.split("test"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", FOLDER_JOBS)
def test_a_ready_job_says_in_one_line_where_its_images_should_be(name: str) -> None:
    job = Job.load(JOBS / f"{name}.yaml")
    with pytest.raises(InputError, match=r"^task.args.train: no folder .*imagenet/train; give one that holds") as error:
        job.build_task()
    assert "\n" not in str(error.value)
    assert Job.load(JOBS / f"{name}.yaml", ["task.args.train=/x"]).plain()["task"]["args"]["train"] == "/x"


@pytest.mark.parametrize("task", [timm, torchvision])
def test_a_library_that_is_not_there_is_named_with_what_brings_it(
    task: Any, roots: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, task.__name__, None)
    with pytest.raises(InputError, match=f"task '{task.__name__}' needs the package .*pip install 'autoprune.timm.'"):
        task("resnet18", *roots)


def test_a_torchvision_that_does_not_fit_torch_names_the_pair_to_install(
    roots: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text(
        "raise RuntimeError('operator torchvision::nms does not exist')"
    )
    about = tmp_path / "torchvision-9.29.1.dist-info"
    about.mkdir()
    lines = ("Metadata-Version: 2.1", "Name: torchvision", "Version: 9.29.1", "Requires-Dist: torch (>=9.14.0)")
    (about / "METADATA").write_text("\n".join((*lines, "Requires-Dist: numpy", "")))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    pair = r"torchvision does not fit torch .*nms does not exist.*pip install 'torch>=9.14.0' torchvision==9.29.1$"
    with warnings.catch_warnings(), pytest.raises(InputError, match=pair):
        torchvision("resnet18", *roots)


def test_where_the_normalisation_is_known_bytes_are_kept_and_become_the_same_inputs(roots: tuple[Path, Path]) -> None:
    ready = Normalised(torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.2, 0.3, 0.4]))

    def normalised(image: Any) -> Tensor:
        return ready((torch.from_numpy(np.array(image))[None], torch.zeros(1)))[0][0]

    found = Classifier(net(3), 3, Transforms(normalised, jittered, ready))
    task = classification(found, folders(roots))
    kept = draw(task.split("validation"), 100)
    assert {batch[0].dtype for batch in kept.raw} == {torch.uint8}
    assert torch.equal(kept[0][0], drawn(task, "validation")[0])
    augmented = draw(task.split("train"), 10)
    assert augmented[0][0].dtype == torch.float32, "what is no bytes stays as it is"
