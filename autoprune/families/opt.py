"""OPT, and the encoder and decoder layers of Whisper: separate projections, two linears in the layer itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from autoprune.families._layouts import Branch, Heads, Neurons, Part, branch, is_class
from autoprune.structure import Stand

ATTENTIONS = ("OPTAttention", "WhisperAttention")
LAYERS = ("OPTDecoderLayer", "WhisperEncoderLayer", "WhisperDecoderLayer")


class Opt:
    """Attention with q_proj, k_proj, v_proj and out_proj; the feed-forward layer has no module of its own."""

    traced = False

    def parts(self, name: str, module: Any) -> Iterator[Part]:
        if is_class(module, "transformers", ATTENTIONS):
            numbers = ("num_heads",)
            yield Heads(
                name, "out_proj", module.num_heads, module.head_dim, "q_proj", "k_proj", "v_proj", numbers=numbers
            )
        elif is_class(module, "transformers", LAYERS):
            yield Neurons(name, ("fc1",), "fc2")
            if not hasattr(module, "encoder_attn"):
                yield from _branches(name, before=getattr(module, "do_layer_norm_before", True))


def _branches(name: str, before: bool) -> Iterator[Part]:
    yield branch(name, "self_attn", "self_attn.out_proj", norm="self_attn_layer_norm" if before else "", results=2)
    norm = (Stand("final_layer_norm", "input"),) if before else ()
    yield Branch(name, "fc2", (*norm, Stand("fc1", "input"), Stand("fc2", "zero")), ("fc2",))
