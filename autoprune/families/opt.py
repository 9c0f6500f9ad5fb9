"""OPT, and the encoder and decoder layers of Whisper: separate projections, two linears in the layer itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from autoprune.families._layouts import Heads, Neurons, Tied, is_class

ATTENTIONS = ("OPTAttention", "WhisperAttention")
LAYERS = ("OPTDecoderLayer", "WhisperEncoderLayer", "WhisperDecoderLayer")


class Opt:
    """Attention with q_proj, k_proj, v_proj and out_proj; the feed-forward layer has no module of its own."""

    traced = False

    def parts(self, name: str, module: Any) -> Iterator[Heads | Neurons | Tied]:
        if is_class(module, "transformers", ATTENTIONS):
            numbers = ("num_heads",)
            yield Heads(
                name, "out_proj", module.num_heads, module.head_dim, "q_proj", "k_proj", "v_proj", numbers=numbers
            )
        elif is_class(module, "transformers", LAYERS):
            yield Neurons(name, ("fc1",), "fc2")
