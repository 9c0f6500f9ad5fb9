"""Task `timm`: any classifier of timm over folders of images, with timm's own inputs and augmentation."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
from torch import nn

from autoprune.errors import InputError, did_you_mean
from autoprune.tasks._arrays import Normalised
from autoprune.tasks._folders import Classifier, Transforms, over_folders
from autoprune.tasks._libraries import nearest, unusable
from autoprune.tasks._weights import filled, untraced

FILES = ("model.safetensors", "pytorch_model.bin")


@over_folders
def timm(model: str, weights: Path | None) -> Classifier:
    """The timm model called `model`, with its tag or without, over folders that hold a folder of images for each class.

    `weights` is a safetensors file or a checkpoint of torch.save for this model, whose number of classes it decides;
    None takes what timm has in its cache, and nothing is fetched. Images are resized, cropped and normalised as the
    model's configuration in timm says, the train split is augmented as timm trains by default. Where the classes are
    those of ImageNet, folders named by their synsets may be fewer.

    Raises:
        InputError: the name or the weights are wrong, or timm is not there.
    """
    library, net = network(model, weights)
    config = library.data.resolve_model_data_config(net)
    made = [library.data.create_transform(**config, is_training=training) for training in (False, True)]
    ready = Normalised(torch.tensor(config["mean"]), torch.tensor(config["std"]))
    return Classifier(net, net.num_classes, Transforms(made[0], made[1], ready), _synsets(library, net))


def network(model: str, weights: Path | None) -> tuple[Any, Any]:
    """(timm, the model called `model`): its weights from a file, or from timm's cache alone.

    Raises:
        InputError: the name or the weights are wrong, or timm is not there.
    """
    library = _library()
    _check_name(library, model)
    build = partial(library.create_model, model)
    return library, _cached(library, model) if weights is None else filled(build, _head, weights)


def _library() -> Any:
    try:
        import timm as library
    except Exception as error:  # its torchvision may fail in any way where its compiled part does not fit
        raise unusable("task 'timm'", error) from error
    return library


def _check_name(library: Any, name: str) -> None:
    """InputError that names the nearest models, or the tags of this one."""
    architecture, _, tag = name.partition(".")
    if not library.is_model(architecture):
        raise InputError(f"timm knows no model {name!r}; {nearest(architecture, library.list_models())}")
    tags = [known.partition(".")[2] for known in library.list_pretrained(f"{architecture}.*")]
    if tag and tag not in tags:
        raise InputError(f"timm knows no weights {tag!r} of {architecture!r}; {did_you_mean(tag, tags)}")


def _head(model: nn.Module) -> str:
    """The weight that has a row for each class."""
    named: Any = getattr(model, "pretrained_cfg", {}).get("classifier")
    return f"{named if isinstance(named, str) or not named else named[0]}.weight"  # distilled ones have two


def _cached(library: Any, name: str) -> nn.Module:
    """The model with timm's own weights, from its cache alone."""
    config = library.get_pretrained_cfg(name)
    path = None if config is None else _in_cache(config)
    if path is None:
        fetch = f"python -c \"import timm; timm.create_model('{name}', pretrained=True)\""
        trained = library.is_model_pretrained(name)
        how = f"fetch them once ({fetch}), or name a file" if trained else "timm has none, so name a file"
        raise InputError(f"timm's weights of {name!r} are not in its cache: {how} as task.args.weights")
    overlay = {"file": str(path), "custom_load": path.suffix == ".npz"}
    with untraced():
        model: nn.Module = library.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay)
    return model


def _in_cache(config: Any) -> Path | None:
    """Where timm keeps the weights that `config` speaks of, if it has them."""
    from huggingface_hub import try_to_load_from_cache

    hub, _, revision = (config.hf_hub_id or "").partition("@")
    for file in (config.hf_hub_filename,) if config.hf_hub_filename else FILES:
        found = try_to_load_from_cache(hub, file, revision=revision or None) if hub else None
        if isinstance(found, str):
            return Path(found)
    url = config.url if isinstance(config.url, str) else ""
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(urlparse(url).path).name
    return path if url and path.is_file() else None


def _synsets(library: Any, model: nn.Module) -> Sequence[str]:
    """The ImageNet names of the model's outputs, where their number is that of a known subset."""
    subset = library.data.infer_imagenet_subset(model)
    return library.data.ImageNetInfo(subset).label_names() if subset else ()
