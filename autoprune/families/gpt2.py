"""GPT-2: one Conv1D makes queries, keys and values, its weights lie the other way round."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from autoprune.families._layouts import Heads, Neurons, Part, branch, is_class


class Gpt2:
    """Attention with a fused projection, thirds side by side; a feed-forward layer of two Conv1D."""

    traced = False

    def parts(self, name: str, module: Any) -> Iterator[Part]:
        if is_class(module, "transformers", ["GPT2Attention"]) and not module.is_cross_attention:
            numbers = ("num_heads", "split_size", "embed_dim")
            yield Heads(name, "c_proj", module.num_heads, module.head_dim, fused="c_attn", numbers=numbers)
        elif is_class(module, "transformers", ["GPT2MLP"]):
            yield Neurons(name, ("c_fc",), "c_proj", numbers=("c_fc.nf",))
        elif is_class(module, "transformers", ["GPT2Block"]):
            yield branch(name, "attn", "attn.c_proj", norm="ln_1", results=2)
            yield branch(name, "mlp", "mlp.c_proj", norm="ln_2")
