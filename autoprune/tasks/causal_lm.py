"""Task `causal_lm`: a language model of a Hugging Face folder, scored by its perplexity over windows of text."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autoprune.errors import InputError, one_line
from autoprune.tasks._arrays import cut, shares
from autoprune.tasks._hugging_face import Inputs, Measured, ModelFolder, TextTask, check_length
from autoprune.tracing.outputs import pick_output

MOST_LOGITS = 1 << 25
"""Logits of a batch, at most: 128 MiB."""
FEWEST = 30
"""Windows to cut from: 30 % of them calibrate, which takes 8 at least."""
LARGEST = 700.0
"""Mean negative log likelihood beyond which a perplexity is no float64."""


@dataclass(frozen=True)
class Windows:
    """Windows of a text as ({input_ids} int64 [n, context], the tokens that follow them [n, context]).

    Where `bos` leads each window it holds `context` tokens of the text, and all are predicted. Else it holds one more,
    which is predicted last, and the next window begins with it, so that every token of the text but the first is
    predicted once.
    """

    ids: Tensor
    starts: Tensor
    context: int
    bos: int | None
    size: int

    def __len__(self) -> int:
        return -(-len(self.starts) // self.size)

    def __iter__(self) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        steps = torch.arange(self.context + (self.bos is None))
        for first in range(0, len(self.starts), self.size):
            starts = self.starts[first : first + self.size]
            held = self.ids[starts[:, None] + steps].long()
            if self.bos is not None:
                held = torch.cat([torch.full((len(held), 1), self.bos), held], 1)
            yield {"input_ids": held[:, :-1].contiguous()}, held[:, 1:].contiguous()

    @property
    def samples(self) -> int:
        return len(self.starts)

    @staticmethod
    def of(ids: Tensor, context: int, bos: int | None, size: int) -> Windows:
        """All whole windows of `ids` [tokens]; what is left at the end is left out."""
        n = (len(ids) - (bos is None)) // context
        return Windows(ids, torch.arange(max(0, n)) * context, context, bos, size)


def causal_lm(
    model: Path,
    train: Path,
    test: Path,
    context: int = 256,
    tokens: int | None = None,
    n_calibration: int | None = None,
    n_validation: int | None = None,
    seed: int = 0,
) -> TextTask:
    """A sample is a window of `context` tokens; the metric is the perplexity a token, over all tokens of a split.

    `train` and `test` are texts in UTF-8, or token ids in .npy files [tokens], which need no tokenizer. `tokens` takes
    the first so many of train and the last so many of test, which may then be one file. The config's bos leads every
    window where the ids do not hold it themselves.

    Raises:
        InputError: the folder or a text is not what it must be, or transformers is not there.
    """
    folder = ModelFolder.open(model)
    for key, value in (("context", context), ("tokens", tokens)):
        if value is not None and (type(value) is not int or value < 2):
            raise InputError(f"task.args.{key} must be a whole number from 2, not {value!r}")
    read = _read_both(folder, train, test, tokens)
    net = folder.language_model("causal_lm")
    check_length(net, context, "context")
    config: Any = net.config
    vocabulary = int(config.vocab_size)
    bos = _bos(folder, read)
    size = max(1, min(32, MOST_LOGITS // (context * vocabulary)))
    windows = [_windows(ids, path, vocabulary, Windows.of(ids, context, bos, size)) for ids, path in read]
    if windows[0].samples < FEWEST:
        raise InputError(
            f"{train} is too short: its {len(read[0][0])} tokens are {windows[0].samples} windows of {context}; at "
            f"least {FEWEST} are needed, so give more text or a smaller task.args.context"
        )
    splits = {"test": windows[1]}
    n = windows[0].samples
    for name, rows in cut(n, *shares(n, n_calibration, n_validation), seed).items():
        splits[name] = replace(windows[0], starts=windows[0].starts[torch.from_numpy(rows)])
    return TextTask(net, splits, Measured(_logits, _cross_entropy, _perplexity, {"perplexity": "minimize"}))


def _logits(model: nn.Module, inputs: Inputs) -> Tensor:
    return pick_output(model(**inputs))


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def _perplexity(seen: Iterable[tuple[Tensor, Tensor]]) -> Mapping[str, float]:
    """The exponential of the mean negative log likelihood of all tokens."""
    total, count = 0.0, 0
    for logits, targets in seen:
        total += float(_cross_entropy(logits, targets)) * targets.numel()
        count += targets.numel()
    return {"perplexity": math.exp(min(total / max(count, 1), LARGEST))}


def _bos(folder: ModelFolder, read: Iterable[tuple[Tensor, Path]]) -> int | None:
    """The token that leads each window; None where the config has none, or the ids hold it themselves."""
    bos = folder.config.get("bos_token_id")
    if not isinstance(bos, int) or any(bool((ids == bos).any()) for ids, _ in read):
        return None
    return bos


def _read_both(folder: ModelFolder, train: Path, test: Path, tokens: int | None) -> list[tuple[Tensor, Path]]:
    """The tokens of train and of test, each with its file."""
    one = train.resolve() == test.resolve()
    if one and tokens is None:
        raise InputError(
            f"task.args.train and task.args.test are the same file {train}; give two, or task.args.tokens: train is "
            "then the first so many tokens of it, test the last"
        )
    first = _read(folder, train, "train")
    last = first if one else _read(folder, test, "test")
    for ids, path in ((first, train), (last, test)):
        held = len(ids) // 2 if one else len(ids)
        if tokens is not None and tokens > held:
            shared = ", and train and test share them" if one else ""
            raise InputError(f"task.args.tokens: {path} has {len(ids)} tokens{shared}; at most {held} are allowed")
    return [(first[:tokens], train), (last if tokens is None else last[-tokens:], test)]


def _read(folder: ModelFolder, path: Path, key: str) -> Tensor:
    """Token ids int32 [tokens] of a .npy file, or of a text by the folder's tokenizer without its special tokens."""
    if not path.is_file():
        raise InputError(f"task.args.{key}: no file {path}")
    if path.suffix == ".npy":
        try:
            ids = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise InputError(f"{path} is not a whole .npy file: {one_line(error, 120)}") from error
        if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
            raise InputError(f"{path}: must hold whole numbers [tokens], not {ids.dtype} {list(ids.shape)}")
        return torch.from_numpy(ids.astype(np.int32))
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"task.args.{key}: {path} is no text: {one_line(error, 120)}") from error
    return torch.tensor(folder.tokenizer().encode(text, add_special_tokens=False).ids, dtype=torch.int32)


def _windows(ids: Tensor, path: Path, vocabulary: int, windows: Windows) -> Windows:
    """The windows, checked; InputError for a text without one, or with tokens that the model does not know."""
    if not windows.samples:
        raise InputError(f"{path} is too short: it has {len(ids)} tokens, a window {windows.context}")
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocabulary:
        raise InputError(f"{path}: its ids go from {low} to {high}, the model knows 0 to {vocabulary - 1}")
    return windows
