"""Task `text_embedding`: a sentence encoder of a Hugging Face folder, scored by how alike it finds pairs of texts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from autoprune.tasks._hugging_face import Measured, ModelFolder, TextTask, check_length, sentence_vectors
from autoprune.tasks._texts import Column, Padded, Table, in_splits, read_tables, tokenised

PAIR = 2


def text_embedding(
    model: Path,
    train: Path,
    test: Path,
    columns: Sequence[Column] = (0, 1, 2),
    max_length: int = 128,
    n_calibration: int | None = None,
    n_validation: int | None = None,
    seed: int = 0,
) -> TextTask:
    """A sample is a pair of texts with a score of how alike they are, two rows of a batch; the metric is Spearman's.

    A text's vector is the mean of the last hidden states over its real tokens, of length 1. `columns` of the tables are
    text, text and score. Training brings the cosine of a pair to its score, as a share of the highest one.

    Raises:
        InputError: the folder or a table is not what it must be, or transformers is not there.
    """
    folder = ModelFolder.open(model)
    tables = read_tables(train, test, columns, ("text", "text", "score"), "score")
    tokenizer, pad = folder.tokenizer(), int(folder.config.get("pad_token_id") or 0)
    scale = max(map(abs, tables.train.numbers(2))) or 1.0

    def padded(table: Table) -> Padded:
        pairs = zip(table.column(0), table.column(1), strict=True)
        tokens = tokenised(tokenizer, (text for pair in pairs for text in pair), max_length)
        return Padded.of(tokens, torch.tensor(table.numbers(2)) / scale, pad, PAIR)

    both = padded(tables.train), padded(tables.test)
    encoder = folder.encoder("text_embedding")
    check_length(encoder, int(max(part.lengths.max() for part in both)), "max_length")
    splits = in_splits(*both, n_calibration, n_validation, seed)
    measured = Measured(
        sentence_vectors, _squared_error, _spearman, {"spearman": "maximize"}, "cosine", samples_said=tables.said
    )
    return TextTask(encoder, splits, measured)


def cosines(vectors: Tensor) -> Tensor:
    """Of each pair of unit vectors [2 n, hidden] that follow each other: [n]."""
    return (vectors[::PAIR] * vectors[1::PAIR]).sum(-1)


def _squared_error(vectors: Tensor, scores: Tensor) -> Tensor:
    return F.mse_loss(cosines(vectors), scores.to(vectors.dtype))


def _spearman(seen: Iterable[tuple[Tensor, Tensor]]) -> Mapping[str, float]:
    """The rank correlation of cosines and scores over all batches; 0 where all of one are equal."""
    from scipy.stats import spearmanr

    pairs = [(cosines(vectors).cpu(), scores.cpu()) for vectors, scores in seen]
    found, scores = (torch.cat([pair[i] for pair in pairs]).double().numpy() for i in (0, 1))
    if np.ptp(found) == 0 or np.ptp(scores) == 0:
        return {"spearman": 0.0}
    return {"spearman": float(spearmanr(found, scores).statistic)}
