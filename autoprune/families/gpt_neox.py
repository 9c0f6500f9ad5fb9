"""GPT-NeoX and Pythia: one linear makes query, key and value of each head, one behind the other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from autoprune.families._layouts import Heads, Neurons, Part, branch, is_class


class GptNeox:
    """Attention with a fused projection by head, partly rotary; a feed-forward layer of two linears."""

    traced = False

    def parts(self, name: str, module: Any) -> Iterator[Part]:
        if is_class(module, "transformers", ["GPTNeoXAttention"]):
            heads = module.query_key_value.weight.shape[0] // (3 * module.head_size)
            yield Heads(name, "dense", heads, module.head_size, fused="query_key_value", layout="by head")
        elif is_class(module, "transformers", ["GPTNeoXMLP"]):
            yield Neurons(name, ("dense_h_to_4h",), "dense_4h_to_h")
        elif is_class(module, "transformers", ["GPTNeoXLayer"]):
            yield branch(name, "attention", "attention.dense", norm="input_layernorm", results=2)
            yield branch(name, "mlp", "mlp.dense_4h_to_h", norm="post_attention_layernorm")
