"""Hugging Face folders: a model with its weights and a tokenizer, from local files alone; a task over such a model."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autoprune.errors import InputError, one_line
from autoprune.protocols import Batch, Direction
from autoprune.tasks._arrays import pick
from autoprune.tasks._libraries import TEXTS, unusable
from autoprune.tasks._weights import untraced
from autoprune.tracing.copies import private_copy
from autoprune.tracing.eval_mode import evaluating

Inputs = Mapping[str, Tensor]
CONFIG, WEIGHTS, PICKLE, TOKENIZER = "config.json", "model.safetensors", "pytorch_model.bin", "tokenizer.json"
HEAD = "ForSequenceClassification"


@dataclass(frozen=True)
class ModelFolder:
    """A folder with config.json and model.safetensors (whole or in parts); `config` is what the first says."""

    path: Path
    config: Mapping[str, Any]

    @staticmethod
    def open(path: Path, key: str = "task.args.model") -> ModelFolder:
        """The folder that `key` names.

        Raises:
            InputError: there is no such folder, or it does not hold what it must.
        """
        if not path.is_dir():
            raise InputError(
                f"{key}: no folder {path}; it must be a local one with {CONFIG} and {WEIGHTS}: names of the "
                "hub are not fetched (hf download NAME --local-dir DIR brings one here)"
            )
        if not (path / CONFIG).is_file():
            raise InputError(f"{key}: {path} holds no {CONFIG}, so it is no Hugging Face folder")
        if not any((path / name).is_file() for name in (WEIGHTS, f"{WEIGHTS}.index.json")):
            what = f"{PICKLE}, which may run code when it is read, and no {WEIGHTS}" if _has_pickle(path) else ""
            raise InputError(
                f"{key}: {path} holds {what or f'no {WEIGHTS}'}; write one with transformers: "
                "model.save_pretrained(DIR)"
            )
        try:
            config = json.loads((path / CONFIG).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"{path / CONFIG} cannot be read: {one_line(error, 120)}") from error
        if not isinstance(config, dict) or "model_type" not in config:
            raise InputError(f"{path / CONFIG} has no model_type, so transformers cannot tell which model it is")
        return ModelFolder(path, config)

    @property
    def has_head(self) -> bool:
        """Whether it is a classifier of whole texts."""
        return any(str(name).endswith(HEAD) for name in self.config.get("architectures") or ())

    def of_class(self, name: str, pooler: bool = False) -> nn.Module:
        """The model as the class `name` of transformers, or as that which the folder itself names."""
        own = [str(n) for n in self.config.get("architectures") or ()]
        known = [n for n in (name, *own) if hasattr(_library(f"the model in {self.path}"), n)]
        return self._model(f"the model in {self.path}", known[0] if known else "AutoModel", pooler)

    def encoder(self, task: str) -> nn.Module:
        """The model without a head, whose last hidden states are its outputs; without a pooler where it can be."""
        return self._model(f"task {task!r}", "AutoModel")

    def classifier(self, task: str) -> nn.Module:
        """The model with its head for whole texts."""
        return self._model(f"task {task!r}", f"AutoModel{HEAD}")

    def language_model(self, task: str) -> nn.Module:
        """The model with its head over the vocabulary."""
        return self._model(f"task {task!r}", "AutoModelForCausalLM")

    def tokenizer(self) -> Any:
        """The folder's fast tokenizer, of the library tokenizers, which neither pads nor cuts.

        Raises:
            InputError: the folder has none.
        """
        path = self.path / TOKENIZER
        if not path.is_file():
            raise InputError(
                f"{self.path} holds no {TOKENIZER}; write one with transformers: "
                "AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"
            )
        try:
            import tokenizers
        except ImportError as error:
            raise unusable("a tokenizer", error, TEXTS) from error
        try:
            found = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises a bare Exception
            raise InputError(f"{path} is no tokenizer: {one_line(error, 160)}") from error
        found.no_padding()
        found.no_truncation()
        return found

    def _model(self, what: str, auto: str, pooler: bool = False) -> nn.Module:
        """The model as `auto` of transformers makes it, in float32 and eval mode; `what` needs transformers."""
        library, kind = _library(what), self.config["model_type"]
        if "auto_map" in self.config and kind not in library.CONFIG_MAPPING:
            raise InputError(
                f"{self.path} brings code of its own (auto_map in {CONFIG}), which is not run: transformers itself has "
                f"no model {kind!r}"
            )
        local = {"local_files_only": True, "trust_remote_code": False}
        loading = {**local, "use_safetensors": True, "dtype": torch.float32, "output_loading_info": True}
        try:
            with _quiet(library), untraced():
                config = library.AutoConfig.from_pretrained(self.path, **local)
                made = getattr(library, auto)
                bare = {} if pooler else without_pooler(made, config)
                model, info = made.from_pretrained(self.path, config=config, **bare, **loading)
        except Exception as error:  # a file may be wrong in any way
            raise InputError(f"transformers cannot load {self.path} by {auto}: {one_line(error)}") from error
        lacking = sorted(info["missing_keys"])
        if lacking:
            more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
            raise InputError(
                f"the weights in {self.path} have no tensor {lacking[0]!r}{more}, which {type(model).__name__} needs"
            )
        loaded: nn.Module = model.eval()
        return loaded


def most_tokens(model: nn.Module) -> int | None:
    """How many tokens have a position in `model`; None where it does not count them."""
    stated = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    found = [stated] if isinstance(stated, int) and stated > 0 else []
    for name, module in model.named_modules():  # RoBERTa and its like begin to count behind the padding's number
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            found.append(module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1))
    return min(found, default=None)


def check_length(model: nn.Module, tokens: int, key: str) -> None:
    """InputError where `tokens` at once, as `task.args.<key>` has it, are more than `model` has positions for."""
    most = most_tokens(model)
    if most is not None and tokens > most:
        raise InputError(f"task.args.{key}: {tokens} tokens at once are more than the model's {most} positions")


@dataclass(frozen=True)
class Measured:
    """What a task over texts measures: outputs of inputs, the training loss and the metrics of outputs and targets.

    `auto_loss` and `samples_said` are those of the task.
    """

    outputs: Callable[[nn.Module, Inputs], Tensor]
    loss: Callable[[Tensor, Tensor], Tensor]
    metrics: Callable[[Iterable[tuple[Tensor, Tensor]]], Mapping[str, float]]
    directions: Mapping[str, Direction]
    auto_loss: str | None = None
    samples_said: tuple[str, ...] = ()


class TextTask:
    """A Task whose batches are (inputs by name, targets); it holds its model and its tokens, and needs no file."""

    def __init__(self, model: nn.Module, splits: Mapping[str, Iterable[Batch]], measured: Measured) -> None:
        self._model, self._splits, self._measured = model, splits, measured

    @property
    def directions(self) -> Mapping[str, Direction]:
        return self._measured.directions

    @property
    def auto_loss(self) -> str | None:
        """The loss that `auto` takes."""
        return self._measured.auto_loss

    @property
    def samples_said(self) -> tuple[str, ...]:
        """What a user ought to know of the splits."""
        return self._measured.samples_said

    def build(self) -> nn.Module:
        return private_copy(self._model)

    def example_inputs(self) -> tuple[dict[str, Tensor], ...]:
        """Two rows of the calibration split, by name."""
        inputs, _ = next(iter(self.split("calibration")))
        return ({name: tensor[:2].clone() for name, tensor in inputs.items()},)

    def split(self, name: str) -> Iterable[Batch]:
        return pick(self._splits, name)

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        return self._measured.outputs(model, batch[0])

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return self._measured.loss(self.outputs(model, batch), batch[1])

    def metrics(self, model: nn.Module, batches: Iterable[Batch]) -> Mapping[str, float]:
        with evaluating(model):
            return self._measured.metrics((self.outputs(model, batch), batch[1]) for batch in batches)


def sentence_vectors(model: nn.Module, inputs: Inputs) -> Tensor:
    """Unit vectors [rows, hidden]: the mean of the last hidden states over real tokens (Reimers & Gurevych 2019)."""
    states: Tensor = model(**inputs)[0]
    real = inputs["attention_mask"][..., None].to(states.dtype)
    mean = (states * real).sum(1) / real.sum(1).clamp_min(1.0)
    return nn.functional.normalize(mean, dim=-1)


def _has_pickle(path: Path) -> bool:
    return any((path / name).is_file() for name in (PICKLE, f"{PICKLE}.index.json"))


def _library(what: str) -> Any:
    try:
        import transformers
    except Exception as error:  # it may fail in any way where a library beside it does not fit
        raise unusable(what, error, TEXTS) from error
    return transformers


def without_pooler(kind: Any, config: Any = None) -> dict[str, bool]:
    """The argument that leaves a pooler out, where the model has one: what a folder often lacks, and nobody reads."""
    made = getattr(kind, "_model_mapping", {}).get(type(config), None) if hasattr(kind, "_model_mapping") else kind
    classes: Sequence[Any] = made if isinstance(made, tuple) else (made,)
    takes = all(c is not None and "add_pooling_layer" in inspect.signature(c.__init__).parameters for c in classes)
    return {"add_pooling_layer": False} if takes else {}


@contextmanager
def _quiet(library: Any) -> Iterator[None]:
    """Inside, transformers neither warns nor draws bars; what it would say is told in one line, or is no matter."""
    logging = library.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
