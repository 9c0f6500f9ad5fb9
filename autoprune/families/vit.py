"""Vision transformers of transformers: ViT, DeiT, DINOv2, SegFormer, CLIP (its text model too)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from autoprune.families._layouts import Heads, Neurons, Tied, is_class

ATTENTIONS = (
    "ViTAttention",
    "DeiTAttention",
    "Dinov2Attention",
    "SegformerAttention",
    "CLIPAttention",
    "SiglipAttention",
)
LAYERS = ("ViTMLP", "DeiTMLP", "Dinov2MLP", "SegformerMixMLP", "CLIPMLP", "SiglipMLP")
GATED = ("Dinov2SwiGLUFFN",)


class Vit:
    """Attention with separate projections; a feed-forward layer of two linears, with a depthwise one in SegFormer's."""

    traced = True

    def parts(self, name: str, module: Any) -> Iterator[Heads | Neurons | Tied]:
        if is_class(module, "transformers", ATTENTIONS):
            out = "o_proj" if hasattr(module, "o_proj") else "out_proj"
            heads = module.q_proj.weight.shape[0] // module.head_dim
            numbers = ("num_attention_heads", "num_heads")
            yield Heads(name, out, heads, module.head_dim, "q_proj", "k_proj", "v_proj", numbers=numbers)
        elif is_class(module, "transformers", LAYERS):
            between = ("dwconv.dwconv",) if hasattr(module, "dwconv") else ()
            yield Neurons(name, ("fc1",), "fc2", between=between)
        elif is_class(module, "transformers", GATED):
            yield Neurons(name, ("gate_proj", "up_proj"), "down_proj")
