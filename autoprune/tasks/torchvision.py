"""Task `torchvision`: any classifier of torchvision over folders of images, with the inputs of its weights."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from autoprune.errors import InputError
from autoprune.tasks._arrays import Normalised
from autoprune.tasks._folders import Classifier, Transforms, over_folders
from autoprune.tasks._libraries import nearest, unusable
from autoprune.tasks._weights import filled, untraced

OTHERS = ("googlenet", "inception_v3")
"""Built in another way with torchvision's weights than without (inputs normalised again, heads removed)."""


@over_folders
def torchvision(model: str, weights: Path | None) -> Classifier:
    """The torchvision classifier called `model` over folders that hold a folder of images for each class.

    `weights` is a safetensors file or a checkpoint of torch.save for this model, whose number of classes it decides;
    None takes the best of torchvision's weights that lie in its cache, and nothing is fetched. Images are resized,
    cropped and normalised as these weights say (of a file with another name: as the newest ones do), the train split
    is cropped at random and flipped.

    Raises:
        InputError: the name or the weights are wrong, or torchvision is not there.
    """
    library = _library()
    _check_name(library, model)
    entry = _entry(library, model, weights)
    build = partial(library.models.get_model, model)
    if weights is None:
        with untraced():
            net = build(weights=entry)
    else:
        net = filled(build, _last, weights)
    preset = entry.transforms()
    ready = Normalised(torch.tensor(preset.mean), torch.tensor(preset.std))
    transforms = Transforms(preset, _augmenting(library, preset), ready)
    return Classifier(net, len(net.get_parameter(_last(net))), transforms)


def _library() -> Any:
    try:
        import torchvision as library
    except Exception as error:  # it may fail in any way where its compiled part does not fit
        raise unusable("task 'torchvision'", error) from error
    return library


def _check_name(library: Any, name: str) -> None:
    known = library.models.list_models(module=library.models)
    if name not in known:
        raise InputError(f"torchvision knows no classifier {name!r}; {nearest(name, known)}")
    if name in OTHERS:
        raise InputError(f"torchvision's {name!r} is another model with its weights than without; take timm's")


def _entry(library: Any, name: str, path: Path | None) -> Any:
    """The weights of torchvision that a file is, by its name; without a file the best that lie in the cache."""
    entries = library.models.get_model_weights(name)
    best = [entries.DEFAULT, *entries]
    if path is not None:
        return next((entry for entry in best if _file(entry) == path.name), entries.DEFAULT)
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    found = next((entry for entry in best if (folder / _file(entry)).is_file()), None)
    if found is None:
        fetch = f"python -c \"import torchvision; torchvision.models.get_model('{name}', weights='DEFAULT')\""
        how = f"fetch them once ({fetch}), or name a file as task.args.weights"
        raise InputError(f"torchvision's weights of {name!r} are not in its cache: {how}")
    return found


def _file(entry: Any) -> str:
    return str(entry.url).rpartition("/")[2]


def _last(model: nn.Module) -> str:
    """The last parameter: the bias of the classifier in all of torchvision's, or its weight."""
    return [name for name, _ in model.named_parameters()][-1]


def _augmenting(library: Any, preset: Any) -> Any:
    """Random crops and flips before what `preset` does to colours, as torchvision's reference training begins."""
    t = library.transforms
    crop = t.RandomResizedCrop(preset.crop_size[0], interpolation=preset.interpolation, antialias=preset.antialias)
    colours = t.Normalize(mean=preset.mean, std=preset.std)
    return t.Compose([crop, t.RandomHorizontalFlip(), t.PILToTensor(), t.ConvertImageDtype(torch.float), colours])
