"""Llama and those built like it: Mistral, Qwen2 and 3, Gemma, SmolLM (which is a Llama), Phi-3 is not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from autoprune.families._layouts import Heads, Neurons, Part, branch, is_class

NAMES = ("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma", "Gemma2", "Gemma3", "SmolLM3", "Granite", "StableLm")


class Llama:
    """Attention with separate projections, rotary positions and grouped queries; a gated feed-forward layer."""

    traced = False

    def parts(self, name: str, module: Any) -> Iterator[Part]:
        if is_class(module, "transformers", [f"{n}Attention" for n in NAMES]):
            yield attention(name, module)
        elif is_class(module, "transformers", [f"{n}MLP" for n in NAMES]):
            yield Neurons(name, ("gate_proj", "up_proj"), "down_proj", numbers=("intermediate_size",))
        elif is_class(module, "transformers", [f"{n}DecoderLayer" for n in NAMES]):
            own = (
                "pre_feedforward_layernorm"
                if hasattr(module, "pre_feedforward_layernorm")
                else "post_attention_layernorm"
            )
            yield branch(name, "self_attn", "self_attn.o_proj", norm="input_layernorm", results=2)
            yield branch(name, "mlp", "mlp.down_proj", norm=own)


def attention(at: str, module: Any) -> Heads:
    """Its heads by the shapes of the projections: configurations are shared and may say otherwise."""
    heads = module.q_proj.weight.shape[0] // module.head_dim
    queries = heads // (module.k_proj.weight.shape[0] // module.head_dim)
    return Heads(
        at,
        "o_proj",
        heads,
        module.head_dim,
        "q_proj",
        "k_proj",
        "v_proj",
        queries=queries,
        numbers=("num_heads", "num_key_value_heads"),
        within_numbers=("num_key_value_groups", "num_heads"),
    )
