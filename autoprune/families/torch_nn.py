"""PyTorch's own transformer: MultiheadAttention, and the feed-forward layers of its encoder and decoder layers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from autoprune.families._layouts import Branch, Heads, Neurons, Part
from autoprune.structure import Stand
from autoprune.tracing.open_attention import OpenAttention, is_plain


class TorchNn:
    """One parameter makes queries, keys and values, thirds side by side."""

    traced = True

    def parts(self, name: str, module: Any) -> Iterator[Part]:
        """Attentions that a copy can open (`open_attentions`), and the two linears of a layer."""
        if type(module) in (nn.MultiheadAttention, OpenAttention) and is_plain(module):
            yield Heads(name, "out_proj", module.num_heads, module.head_dim, fused="in_proj", numbers=("num_heads",))
        elif isinstance(module, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer):
            yield Neurons(name, ("linear1",), "linear2")
            last = "norm3" if isinstance(module, nn.TransformerDecoderLayer) else "norm2"
            norm = (Stand(last, "input"),) if module.norm_first else ()
            yield Branch(name, "linear2", (*norm, Stand("linear1", "input"), Stand("linear2", "zero")), ("linear2",))
