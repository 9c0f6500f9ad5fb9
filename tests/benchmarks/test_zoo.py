"""The zoo's table counts what its rows say, the best first; a model that failed has a row too."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from autoprune.families import analyze
from benchmarks.zoo import prunable_share, table

ROW = {"parameters": 2_500_000, "groups": 3, "rest": "its channels are the model's output", "seconds": 1.5}
ROW |= {"passes": 17, "peak_gb": 0.5}


def test_the_table_counts_its_rows() -> None:
    kept = {"b": {**ROW, "share": 0.5}, "a": {**ROW, "share": 0.95}, "c": {"error": "needs another torch"}}
    lines = table(kept).splitlines()
    assert lines[0] == "3 models of timm and transformers; 2 have groups, in 1 of them 90% of the MACs or more shrink."
    assert [line.split(" | ")[0] for line in lines[-3:]] == ["| a", "| b", "| c"]
    assert "needs another torch" in lines[-1]


def test_the_share_is_of_all_operations_that_shrink_with_a_group() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1, bias=False))
    assert prunable_share(analyze(model, (torch.randn(2, 3, 4, 4),))) == pytest.approx(1.0)
    assert prunable_share(analyze(nn.Conv2d(3, 4, 1), (torch.randn(2, 3, 4, 4),))) == 0.0
