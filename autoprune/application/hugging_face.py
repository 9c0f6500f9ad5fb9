"""Applied models of transformers: a config.json from which the class is built anew, without any other file."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from autoprune.errors import InputError, RunError, one_line
from autoprune.files.whole import read_mapping
from autoprune.tasks._hugging_face import without_pooler
from autoprune.tasks._libraries import TEXTS, unusable
from autoprune.tasks._weights import untraced
from autoprune.tracing.copies import float_tensors
from autoprune.tracing.eval_mode import evaluating
from autoprune.tracing.inputs import call_model

CONFIG, KEY = "config.json", "autoprune"
FOREIGN = frozenset(
    [
        *("auto_map", "quantization_config", "attn_implementation", "_attn_implementation", "experts_implementation"),
        *("_attn_implementation_internal", "_experts_implementation", "_experts_implementation_internal"),
    ]
)
"""Keys by which a configuration may name code or kernels from elsewhere: a file is data."""
TOKENIZER = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt", "vocab.json", "merges.txt"),
    *("preprocessor_config.json", "tokenizer.model", "added_tokens.json", "chat_template.jinja"),
)


def write_config(model: nn.Module, folder: Path, origin: Path | None = None) -> list[str]:
    """config.json of a pruned model of transformers into `folder`, and its tokenizer from `origin`; their names.

    It is the dense model's, with our own key: which class of transformers it is, and that its layers have widths of
    their own, which policy.json holds. Other models have none.
    """
    config, name = getattr(model, "config", None), type(model).__name__
    library = sys.modules.get("transformers")
    if library is None or config is None or getattr(library, name, None) is not type(model):
        return []
    pooled = any("pooler" in tensor for tensor, _ in model.named_parameters())
    told = {"class": name, "pooler": pooled, "policy": "policy.json"}
    (folder / CONFIG).write_text(json.dumps({**config.to_dict(), KEY: told}, indent=1) + "\n", encoding="utf-8")
    return [CONFIG, *copy_tokenizer(folder, origin)]


def copy_tokenizer(folder: Path, origin: Path | None) -> list[str]:
    """The files of the tokenizer in `origin`, where there are any, into `folder`; their names."""
    names = [] if origin is None else [file for file in TOKENIZER if (origin / file).is_file()]
    for file in names:
        shutil.copyfile(Path(str(origin)) / file, folder / file)
    return names


def dense_from_config(folder: Path) -> nn.Module | None:
    """The dense model, untrained, that config.json of an applied folder speaks of; None where it has none.

    Only classes of transformers itself are built.

    Raises:
        InputError: the file is damaged, or names what transformers does not have.
    """
    path = folder / CONFIG
    if not path.is_file():
        return None
    told = read_mapping(path)
    own = told.pop(KEY, None)
    for key in FOREIGN & told.keys():
        del told[key]
    if not isinstance(own, dict):
        return None
    try:
        import transformers
    except Exception as error:  # it may fail in any way where a library beside it does not fit
        raise unusable(f"the model in {folder}", error, TEXTS) from error
    made = getattr(transformers, str(own.get("class")), None)
    if not (isinstance(made, type) and issubclass(made, transformers.PreTrainedModel)):
        raise InputError(f"{path} names the class {own.get('class')!r}, which transformers does not have")
    kind = str(told.pop("model_type", ""))
    try:
        config = transformers.AutoConfig.for_model(kind, **told)
        bare = {} if own.get("pooler", True) else without_pooler(made)
        with untraced():
            model: nn.Module = made(config, **bare)
    except Exception as error:  # a file may be wrong in any way
        raise InputError(
            f"{path}: transformers cannot build {made.__name__} from it: {one_line(error, 160)}"
        ) from error
    return model.eval()


def read_back(folder: Path, model: nn.Module, inputs: Any) -> None:
    """See that what transformers reads from `folder`, by its own means, computes what `model` does.

    Raises:
        RunError: it does not, or transformers cannot read it.
    """
    kind: Any = type(model)
    try:
        with evaluating(model):
            again = kind.from_pretrained(folder, local_files_only=True, use_safetensors=True).eval()
            wanted, got = (float_tensors(call_model(m, inputs)) for m in (model.cpu(), again))
    except Exception as error:  # a file may be wrong in any way
        raise RunError(f"{folder.name}: transformers cannot read it back: {one_line(error, 160)}") from error
    for mine, theirs in zip(got, wanted, strict=False):
        if mine.shape != theirs.shape or not torch.allclose(mine, theirs, rtol=1e-3, atol=1e-4):
            raise RunError(f"{folder.name}: what transformers reads back computes something else")
