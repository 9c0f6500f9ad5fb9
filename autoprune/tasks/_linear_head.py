"""A linear head on the sentence vectors of an encoder that has none: fitted once, kept by what it was fitted to."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autoprune.database.batches import digest
from autoprune.errors import InputError
from autoprune.tasks._cache import cache_folder, keep
from autoprune.tasks._hugging_face import sentence_vectors
from autoprune.tasks._texts import Padded
from autoprune.tasks._weights import load_weights, untraced
from autoprune.tracing.eval_mode import evaluating
from autoprune.tracing.one_thread import one_thread

MOST_FITTED, AT_ONCE = 8192, 64
"""Texts that a head is fitted to at most, the first of the train split; and how many go through together."""
RECIPE = 1
"""Raise it whenever the fit changes: the kept heads carry it in their name."""


class SentenceClassifier(nn.Module):
    """Logits [n, classes] of texts: a linear head on the unit mean of the encoder's last hidden states."""

    def __init__(self, encoder: nn.Module, head: nn.Linear) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        logits: Tensor = self.head(
            sentence_vectors(self.encoder, {"input_ids": input_ids, "attention_mask": attention_mask})
        )
        return logits


def with_head(encoder: nn.Module, texts: Padded, classes: int) -> SentenceClassifier:
    """`encoder` with a head that was fitted to the first of `texts`, from the cache where it has it."""
    config: Any = encoder.config
    with untraced():
        head = nn.Linear(int(config.hidden_size), classes)
    state = encoder.state_dict()
    texts = texts.rows_of(np.arange(min(MOST_FITTED, texts.samples)))
    key = digest([[state[name] for name in sorted(state)], [texts.ids, texts.lengths, texts.targets]])
    path = cache_folder() / f"head-{RECIPE}-{classes}-{key.removeprefix('sha256:')[:32]}.safetensors"
    try:
        load_weights(head, path)
    except InputError:  # there is none yet; and a cache is no input: what does not load is made anew
        _fit(head, encoder, texts, path)
    return SentenceClassifier(encoder, head).eval()


def _fit(head: nn.Linear, encoder: nn.Module, texts: Padded, path: Path) -> None:
    """Fill `head` and keep it: softmax regression by L-BFGS in float64, as scikit-learn weighs the penalty (C = 1)."""
    with one_thread(), evaluating(encoder):
        vectors = _vectors(encoder, texts).double()
    weight = torch.zeros(head.weight.shape, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(len(weight), dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS([weight, bias], max_iter=500, tolerance_grad=1e-7, line_search_fn="strong_wolfe")

    def penalised() -> Tensor:
        solver.zero_grad()
        error = F.cross_entropy(vectors @ weight.T + bias, texts.targets)
        loss = error + weight.square().sum() / (2 * len(vectors))
        loss.backward()
        return loss

    with one_thread(), torch.enable_grad():
        solver.step(penalised)
    with torch.no_grad():
        head.weight.copy_(weight)
        head.bias.copy_(bias)
    keep(head, path)


def _vectors(encoder: nn.Module, texts: Padded) -> Tensor:
    """The vectors of all texts; short ones go together, so that little padding is computed."""
    order = texts.lengths.argsort(stable=True)
    found = torch.cat(list(_sorted_vectors(encoder, texts, order)))
    return found[order.argsort()]


def _sorted_vectors(encoder: nn.Module, texts: Padded, order: Tensor) -> Iterator[Tensor]:
    for rows in order.split(AT_ONCE):
        few = texts.rows_of(rows.numpy())
        for inputs, _ in Padded(few.ids, few.lengths, few.targets, size=AT_ONCE):
            yield sentence_vectors(encoder, inputs)
