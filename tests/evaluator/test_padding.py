"""Padded tokens enter no Gram, no refit and no loss: however much padding there is, the figures are the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import autoprune
from autoprune.database.batches import Parts, StatisticsOnly
from autoprune.database.build import build_database
from autoprune.evaluation import Ask, Evaluation
from autoprune.evaluator.settings import Settings
from autoprune.evaluator.tiers import TieredEvaluator
from autoprune.families import analyze
from autoprune.plugins import load
from autoprune.policy import Policy
from autoprune.tracing.padding import real_rows, real_tokens, without_padding
from tests.transformer_models import MODELS, TOKENS

REAL = torch.tensor([[True, True, False], [True, False, False]])


def test_rows_of_real_tokens_are_those_that_the_mask_holds() -> None:
    every = torch.arange(3)
    assert real_rows(torch.Size((2, 3, 8)), every, REAL).tolist() == [0, 1, 3]  # type: ignore[union-attr]
    assert real_rows(torch.Size((2, 3, 8)), torch.tensor([1]), REAL).tolist() == [0]  # type: ignore[union-attr]
    assert real_rows(torch.Size((6, 8)), torch.tensor([0]), REAL).tolist() == [0, 1, 3]  # type: ignore[union-attr]
    assert real_rows(torch.Size((2, 4, 8)), every, REAL) is None, "its places are not the tokens"
    assert real_rows(torch.Size((2, 3, 8)), every, None) is None


def test_a_batch_without_a_mask_or_without_padding_is_all_real() -> None:
    ids = torch.zeros(2, 3, dtype=torch.long)
    assert real_tokens(({"input_ids": ids}, ids)) is None
    assert real_tokens({"input_ids": ids, "attention_mask": torch.ones(2, 3)}) is None
    assert torch.equal(real_tokens(({"attention_mask": REAL.long()}, ids)), REAL)  # type: ignore[arg-type]


def test_padded_places_hold_real_tokens_again_and_other_outputs_are_left() -> None:
    batch = {"attention_mask": torch.tensor([[1, 1, 0, 0, 0], [0, 1, 1, 1, 1]])}
    outputs = torch.arange(10.0).view(2, 5, 1)
    assert without_padding(outputs, batch)[..., 0].tolist() == [[0, 1, 0, 1, 0], [6, 7, 8, 9, 6]]
    logits = torch.randn(2, 5)
    assert without_padding(logits, batch) is logits


def scored(filler: int, name: str) -> list[Evaluation]:
    """Evaluations of a small model on batches whose padded places hold the token `filler`."""
    model, draws = MODELS[name].build(), torch.Generator().manual_seed(3)

    def batch() -> tuple[dict[str, Tensor], Tensor]:
        ids = torch.randint(3, 60, (8, TOKENS), generator=draws)
        mask = (torch.arange(TOKENS) < torch.randint(3, TOKENS + 1, (8, 1), generator=draws)).long()
        return {"input_ids": torch.where(mask.bool(), ids, filler), "attention_mask": mask}, torch.zeros(8)

    splits: dict[str, Any] = {s: [batch() for _ in range(4)] for s in ("calibration", "validation", "train", "test")}
    task = autoprune.task(
        model, splits, lambda outputs, targets: outputs.mean(), lambda outputs, targets: {"none": 0.0}
    )
    structure, parts = analyze(model, task.example_inputs()), Parts.of(task, 32, 8)
    settings = Settings(calibration=32, validation=32, finetune_steps=0, batch_size=8, precision="fp32", loss="mse")
    database = build_database(model, structure, StatisticsOnly(task, parts.statistics, 8), load("criteria", "obs")())
    evaluator = TieredEvaluator(task, structure, database, settings, parts=parts)
    widths = [int(i % 3 > 0) if g.kind == "block" else g.width // 2 for i, g in enumerate(structure)]
    policy = Policy.from_array(structure, widths)
    return [evaluator(Ask(policy, tier)) for tier in ("stitch", "refit")]  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["bert", "opt"])
def test_what_stands_in_padded_places_changes_nothing(name: str) -> None:
    one, other = scored(2, name), scored(50, name)
    for a, b in zip(one, other, strict=True):
        assert a.error is None
        assert a.loss > 0
        assert a.loss == pytest.approx(b.loss, rel=1e-5)
