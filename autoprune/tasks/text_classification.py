"""Task `text_classification`: a classifier of a Hugging Face folder, or an encoder with a head that is fitted here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autoprune.errors import InputError, did_you_mean
from autoprune.tasks._arrays import DIRECTIONS, accuracies
from autoprune.tasks._hugging_face import Inputs, Measured, ModelFolder, TextTask, check_length
from autoprune.tasks._linear_head import with_head
from autoprune.tasks._texts import Column, Padded, Table, in_splits, read_tables, tokenised
from autoprune.tracing.outputs import pick_output


def text_classification(
    model: Path,
    train: Path,
    test: Path,
    columns: Sequence[Column] = ("content", "label"),
    max_length: int = 128,
    n_calibration: int | None = None,
    n_validation: int | None = None,
    seed: int = 0,
) -> TextTask:
    """A sample is a text with a label; the metric is the accuracy.

    A folder with a head for whole texts is taken as it is, its labels by name or number as its config has them. One
    without gets a linear head on the unit mean of its last hidden states, fitted to the train split once and cached.
    `columns` of the tables are text and label.

    Raises:
        InputError: the folder or a table is not what it must be, or transformers is not there.
    """
    folder = ModelFolder.open(model)
    tables = read_tables(train, test, columns, ("text", "label"), "label")
    tokenizer, pad = folder.tokenizer(), int(folder.config.get("pad_token_id") or 0)
    net = folder.classifier("text_classification") if folder.has_head else folder.encoder("text_classification")
    names = _names(net) if folder.has_head else _found_names(tables.train)

    def padded(table: Table) -> Padded:
        labels = torch.tensor([_number(label, names, table.path) for label in table.column(1)])
        return Padded.of(tokenised(tokenizer, table.column(0), max_length), labels, pad)

    both = padded(tables.train), padded(tables.test)
    check_length(net, int(max(part.lengths.max() for part in both)), "max_length")
    splits = in_splits(*both, n_calibration, n_validation, seed)
    if not folder.has_head:
        net = with_head(net, splits["train"], len(names))
    return TextTask(net, splits, Measured(_logits, F.cross_entropy, _accuracies, DIRECTIONS, samples_said=tables.said))


def _logits(model: nn.Module, inputs: Inputs) -> Tensor:
    return pick_output(model(**inputs))


def _accuracies(seen: Iterable[tuple[Tensor, Tensor]]) -> Mapping[str, float]:
    return accuracies(nn.Identity(), seen)


def _names(model: nn.Module) -> Mapping[str, int]:
    """The number of each label, by its name in the config and by itself."""
    config: Any = model.config
    n = int(config.num_labels)
    if n < 2:
        raise InputError(f"the head of {config.name_or_path} has {n} output; a classifier has one for each class")
    return {**{str(i): i for i in range(n)}, **{str(name): int(i) for name, i in config.label2id.items()}}


def _found_names(table: Table) -> Mapping[str, int]:
    """The labels of a table, sorted, numbers by their values."""
    labels = sorted(set(table.column(1)), key=lambda label: (not label.isdecimal(), label.zfill(9)))
    if not 2 <= len(labels) <= len(table.rows) / 2:
        raise InputError(
            f"{table.path} has {len(labels)} different labels in {len(table.rows)} rows; classes have two rows each or "
            "more, so see which of task.args.columns holds them"
        )
    return {label: i for i, label in enumerate(labels)}


def _number(label: str, names: Mapping[str, int], path: Path) -> int:
    if label not in names:
        raise InputError(f"{path}: label {label!r:.60} is none of the model's; {did_you_mean(label, [*names][:20])}")
    return names[label]
