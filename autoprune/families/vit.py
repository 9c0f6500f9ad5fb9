"""Vision transformers of transformers: ViT, DeiT, DINOv2, SegFormer, CLIP (its text model too)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from autoprune.families._layouts import Heads, Neurons, Part, branch, is_class

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
BLOCKS = ("ViTLayer", "DeiTLayer", "Dinov2Layer", "SegformerLayer", "CLIPEncoderLayer", "SiglipEncoderLayer")
NORMS = (("layernorm_before", "layernorm_after"), ("norm1", "norm2"), ("layer_norm1", "layer_norm2"))


class Vit:
    """Attention with separate projections; a feed-forward layer of two linears, with a depthwise one in SegFormer's."""

    traced = True

    def parts(self, name: str, module: Any) -> Iterator[Part]:
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
        elif is_class(module, "transformers", BLOCKS):
            yield from _branches(name, module)


def _branches(name: str, layer: Any) -> Iterator[Part]:
    """The attention and the feed-forward layer, each behind its norm, whatever they are called."""
    children = dict(layer.named_children())
    norms = next((pair for pair in NORMS if pair[0] in children), None)
    attention = next((a for a in ("attention", "self_attn") if a in children), None)
    if norms is None or attention is None:
        return
    out = "o_proj" if hasattr(children[attention], "o_proj") else "out_proj"
    last = "fc2" if hasattr(layer.mlp, "fc2") else "down_proj"
    yield branch(name, attention, f"{attention}.{out}", norm=norms[0], results=2)
    yield branch(name, "mlp", f"mlp.{last}", norm=norms[1])
