"""Folders of images, one folder a class: decoded as they are asked for, cut into disjoint and seeded splits."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autoprune.errors import InputError, did_you_mean, one_line
from autoprune.tasks._arrays import DIRECTIONS, Normalised, Pair, accuracies, cut, shares
from autoprune.tasks._libraries import unusable
from autoprune.tasks._wrap import Output, WrappedTask

ENDINGS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")

Transform = Callable[[Any], Tensor]
"""A Pillow image in RGB -> float32 [C, H, W]."""


@dataclass(frozen=True)
class Transforms:
    """How an image becomes an input: the same at every pass, and with augmentation for the train split.

    Both end with `ready`, which makes an input of bytes, where that is known.
    """

    steady: Transform
    training: Transform
    ready: Normalised | None = None


@dataclass(frozen=True)
class ImageFolder:
    """A folder with a folder of images for each class; `files` are relative to it, `owners` their classes."""

    path: Path
    classes: tuple[str, ...]
    files: tuple[str, ...]
    owners: np.ndarray

    @staticmethod
    def read(path: Path, key: str) -> ImageFolder:
        """List `path`, which is `task.args.<key>` of the job; classes and files are sorted, hidden ones left out.

        Raises:
            InputError: there is no such folder, it has no folder a class, or one of them holds no image.
        """
        if not path.is_dir():
            raise InputError(
                f"task.args.{key}: no folder {path}; give one that holds a folder of images for each class"
            )
        classes = sorted(entry.name for entry in os.scandir(path) if entry.is_dir() and not _hidden(entry.name))
        if not classes:
            raise InputError(
                f"task.args.{key}: {path} holds no folders; the images of each class lie in one of its own"
            )
        found = [_images(path, name) for name in classes]
        empty = next((name for name, files in zip(classes, found, strict=True) if not files), None)
        if empty is not None:
            raise InputError(f"task.args.{key}: {path / empty} holds no image ({', '.join(ENDINGS)})")
        owners = np.repeat(np.arange(len(classes)), [len(files) for files in found])
        return ImageFolder(path, tuple(classes), tuple(name for files in found for name in files), owners)


def _images(root: Path, name: str) -> list[str]:
    """The images at any depth of the folder `name`, relative to `root`, sorted."""
    inside = os.walk(root / name, followlinks=True)  # subsets are often made of links
    files = (os.path.join(folder, file) for folder, _, names in inside for file in names if not _hidden(file))
    return sorted(os.path.relpath(file, root) for file in files if file.lower().endswith(ENDINGS))


def _hidden(name: str) -> bool:
    return name.startswith(".")


@dataclass(frozen=True)
class Decoded:
    """Images as (inputs float32 [n, C, H, W], targets int64 [n]), decoded batch by batch at every pass; none is kept.

    `shuffles`: another order at each pass, drawn from torch's global generator, as augmentation may be. `ready` is how
    `transform` ends.
    """

    root: Path
    files: Sequence[str]
    targets: Tensor
    transform: Transform
    ready: Normalised | None = None
    shuffles: bool = False
    size: int = 32

    def __len__(self) -> int:
        return -(-len(self.files) // self.size)

    def __iter__(self) -> Iterator[Pair]:
        order = torch.randperm(len(self.files)) if self.shuffles else torch.arange(len(self.files))
        for rows in order.split(self.size):
            inputs = [self.transform(opened(self.root / self.files[i])) for i in rows.tolist()]
            yield torch.stack(inputs), self.targets[rows]

    @property
    def samples(self) -> int:
        return len(self.files)

    def stored(self) -> Iterator[Pair]:
        """The same as the bytes that they were before they were normalised, a quarter of their size."""
        return iter(self) if self.ready is None else map(self.ready.back, self)


def opened(path: Path) -> Any:
    """The image in RGB.

    Raises:
        InputError: it cannot be read, or Pillow is not installed.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise unusable("a folder of images", error) from error
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = one_line(error, 120)
        raise InputError(f"{path} cannot be read as an image ({reason}); mend it, or take it out") from error


@dataclass(frozen=True)
class Folders:
    """What a job says of its images.

    Classes are the folder names, sorted, or as the model's library numbers them; `classes` is a text file with the
    folder name of each output of the model, a line each, for any other order or subset.
    """

    train: ImageFolder
    test: ImageFolder
    classes: Path | None = None
    n_calibration: int | None = None
    n_validation: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.train.path.resolve() == self.test.path.resolve():
            raise InputError(f"task.args.train and task.args.test are the same folder {self.train.path}")
        foreign = next((name for name in self.test.classes if name not in self.train.classes), None)
        if foreign is not None:
            raise InputError(f"{self.test.path} has a class {foreign!r}, which {self.train.path} does not have")


@dataclass(frozen=True)
class Classifier:
    """A trained model as its library knows it: the number of its classes and how images become its inputs.

    `known` are the folder names of its outputs where the library has them; they count where all of a folder are there.
    """

    model: nn.Module
    outputs: int
    transforms: Transforms
    known: Sequence[str] = ()


def over_folders(find: Callable[[str, Path | None], Classifier]) -> Callable[..., WrappedTask]:
    """A factory of tasks over folders of images from what finds a library's `model` with its `weights`."""

    def make(
        model: str,
        train: Path,
        test: Path,
        weights: Path | None = None,
        classes: Path | None = None,
        n_calibration: int | None = None,
        n_validation: int | None = None,
        seed: int = 0,
    ) -> WrappedTask:
        read = ImageFolder.read(train, "train"), ImageFolder.read(test, "test")
        folders = Folders(*read, classes, n_calibration, n_validation, seed)
        return classification(find(model, weights), folders)

    for name in ("__name__", "__qualname__", "__module__", "__doc__"):  # not its signature, which is that of `make`
        setattr(make, name, getattr(find, name))
    return make


def classification(found: Classifier, folders: Folders) -> WrappedTask:
    """The task of a classifier; calibration and validation are cut from the train folder, disjoint and seeded.

    Raises:
        InputError: the classes are not the model's, or the parts are too large.
    """
    train, test, transforms = folders.train, folders.test, found.transforms
    numbers = torch.tensor(_numbers(folders, found.outputs, found.known))
    splits = {"test": _decoded(test, range(len(test.files)), _named(test, train, numbers), transforms)}
    n = len(train.files)
    for name, rows in cut(n, *shares(n, folders.n_calibration, folders.n_validation), folders.seed).items():
        splits[name] = _decoded(train, rows, numbers, transforms, training=name == "train")
    return WrappedTask(found.model.eval(), splits, F.cross_entropy, _accuracies, DIRECTIONS, Output(), spread=False)


def _accuracies(outputs: Tensor, targets: Tensor) -> Mapping[str, float]:
    return accuracies(nn.Identity(), [(outputs, targets)])


def _named(test: ImageFolder, train: ImageFolder, numbers: Tensor) -> Tensor:
    """The outputs of the classes of `test`, which may be fewer than those of `train`."""
    return numbers[[train.classes.index(name) for name in test.classes]]


def _decoded(
    folder: ImageFolder,
    rows: Sequence[int] | np.ndarray,
    numbers: Tensor,
    transforms: Transforms,
    training: bool = False,
) -> Decoded:
    targets = numbers[torch.from_numpy(folder.owners[rows])]
    transform = transforms.training if training else transforms.steady
    return Decoded(folder.path, [folder.files[i] for i in rows], targets, transform, transforms.ready, training)


def _numbers(folders: Folders, outputs: int, known: Sequence[str]) -> list[int]:
    """Which output of the model each class of the train folder is."""
    names, path = folders.train.classes, folders.train.path
    listed = known if set(names) <= set(known) else ()
    if folders.classes is not None:
        listed = _listed(folders.classes, outputs)
        foreign = next((name for name in names if name not in listed), None)
        if foreign is not None:
            raise InputError(f"{path / foreign} is no class of {folders.classes}; {did_you_mean(foreign, listed[:20])}")
    if not listed and len(names) != outputs:
        raise InputError(
            f"{path} has {len(names)} classes, the model {outputs} outputs; give the weights of a model for these "
            "classes, or name the folder of each output in a text file, a line each, as task.args.classes"
        )
    if len(names) < outputs:
        warnings.warn(
            f"{path} has {len(names)} of the model's {outputs} classes, so metrics are over these", stacklevel=4
        )
    return [listed.index(name) for name in names] if listed else list(range(outputs))


def _listed(path: Path, outputs: int) -> list[str]:
    """The names in a text file, a line each, one for each output of the model."""
    try:
        names = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"task.args.classes: cannot read {path}: {one_line(error)}") from error
    names = [name.strip() for name in names if name.strip()]
    if len(names) != outputs or len(set(names)) != outputs:
        raise InputError(
            f"{path} names {len(set(names))} classes in {len(names)} lines, the model has {outputs} outputs"
        )
    return names
