"""timm's vision transformers: fused qkv, Swin's windows, and the Mlp of their blocks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from autoprune.families._layouts import Heads, Neurons, Part, branch, is_class

ATTENTIONS = ("Attention", "WindowAttention", "AttentionRope")


class Timm:
    """Attention with a fused projection, thirds side by side; two linears in the Mlp beside it."""

    traced = True

    def parts(self, name: str, module: Any) -> Iterator[Part]:
        if is_class(module, "timm", ATTENTIONS) and _is_fused(module):
            head_dim = module.qkv.weight.shape[0] // (3 * module.num_heads)
            table = "relative_position_bias_table"
            yield Heads(
                name,
                "proj",
                module.num_heads,
                head_dim,
                fused="qkv",
                numbers=("num_heads", "attn_dim"),
                tables=(table,) if isinstance(getattr(module, table, None), nn.Parameter) else (),
            )
        elif _is_block(module) and isinstance(module.mlp.fc1, nn.Linear) and isinstance(module.mlp.norm, nn.Identity):
            yield Neurons(f"{name}.mlp" if name else "mlp", ("fc1",), "fc2")
            yield from _branches(name, module)


def _branches(name: str, block: Any) -> Iterator[Part]:
    """Where each norm stands before its branch, which every version of the library calls alike."""
    if is_class(block, "timm", ["Block", "SwinTransformerBlock"]) and _is_fused(block.attn):
        yield branch(name, "attn", "attn.proj", norm="norm1")
        yield branch(name, "mlp", "mlp.fc2", norm="norm2")


def _is_fused(module: Any) -> bool:
    return isinstance(getattr(module, "qkv", None), nn.Linear) and isinstance(getattr(module, "proj", None), nn.Linear)


def _is_block(module: Any) -> bool:
    """A block with an attention of ours and a plain Mlp."""
    own = is_class(getattr(module, "mlp", nn.Identity()), "timm", ["Mlp"])
    return own and is_class(getattr(module, "attn", nn.Identity()), "timm", ATTENTIONS)
