"""An opened attention computes what torch's own does, however it is called."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from autoprune.tracing.copies import copied
from autoprune.tracing.open_attention import OpenAttention, open_attentions

CAUSAL = torch.triu(torch.ones(7, 7, dtype=torch.bool), 1)
PADDED = torch.tensor([[False] * 7, [False] * 4 + [True] * 3, [False] * 6 + [True]])


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"need_weights": False},
        {"average_attn_weights": False},
        {"attn_mask": CAUSAL},
        {"attn_mask": CAUSAL, "need_weights": False, "is_causal": True},
        {"attn_mask": torch.randn(12, 7, 7)},
        {"key_padding_mask": PADDED},
        {"key_padding_mask": PADDED, "attn_mask": CAUSAL, "need_weights": False},
    ],
)
@pytest.mark.parametrize("other", [True, False])
def test_it_is_the_same_attention(batch_first: bool, bias: bool, how: dict[str, Any], other: bool) -> None:
    torch.manual_seed(0)
    plain = nn.MultiheadAttention(32, 4, bias=bias, batch_first=batch_first).eval()
    opened = copy.deepcopy(plain)
    open_attentions(opened)
    x, y = torch.randn(3, 7, 32), torch.randn(3, 7, 32)
    x, y = (t if batch_first else t.transpose(0, 1) for t in (x, y if other else x))
    y = y if other else x
    (out, weights), (same, same_weights) = plain(x, y, y, **how), opened(x, y, y, **how)
    assert torch.allclose(out, same, atol=1e-6)
    assert (weights is None) == (same_weights is None)
    assert weights is None or torch.allclose(weights, same_weights, atol=1e-6)


def test_a_sequence_without_a_batch_is_one() -> None:
    plain = nn.MultiheadAttention(32, 4).eval()
    x = torch.randn(7, 32)
    assert torch.allclose(plain(x, x, x)[0], copied(plain)(x, x, x)[0], atol=1e-6)


def test_a_lent_model_keeps_its_class_and_those_that_add_keys_stay_closed() -> None:
    plain = nn.TransformerEncoderLayer(32, 4, 48)
    twin = copied(plain)
    assert type(plain.self_attn) is nn.MultiheadAttention
    assert type(twin.self_attn) is OpenAttention
    assert twin.state_dict().keys() == plain.state_dict().keys()
    closed = nn.MultiheadAttention(32, 4, add_bias_kv=True)
    assert type(copied(closed)) is nn.MultiheadAttention
    assert type(copied(nn.MultiheadAttention(32, 4, kdim=16, vdim=16))) is nn.MultiheadAttention
