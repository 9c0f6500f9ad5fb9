"""BERT and those built like it: RoBERTa, XLM-R, CamemBERT, ELECTRA, MiniLM (which is a BERT), DistilBERT."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from autoprune.families._layouts import Branch, Heads, Neurons, Part, branch, is_class
from autoprune.structure import Stand

NAMES = ("Bert", "Roberta", "XLMRoberta", "Camembert", "Electra", "RobertaPreLayerNorm", "Data2VecText", "Ernie")


class Bert:
    """One layer is an attention with query, key and value below `self` and its output beside it, then two linears."""

    traced = False

    def parts(self, name: str, module: Any) -> Iterator[Part]:
        if is_class(module, "transformers", [f"{n}Layer" for n in NAMES]):
            for at in ("attention", "crossattention"):
                if isinstance(getattr(module, at, None), nn.Module):
                    yield _attention(f"{name}.{at}", getattr(module, at).self)
            yield Neurons(name, ("intermediate.dense",), "output.dense")
            yield from _branches(name, module)
        elif is_class(module, "transformers", ["DistilBertSelfAttention"]):
            numbers = ("n_heads", "dim")
            yield Heads(
                name, "out_lin", module.n_heads, module.attention_head_size, "q_lin", "k_lin", "v_lin", numbers=numbers
            )
        elif type(module).__name__ == "FFN" and is_class(module, "transformers", ["FFN"]):
            yield Neurons(name, ("lin1",), "lin2")
        elif type(module).__name__ == "TransformerBlock" and is_class(module, "transformers", ["TransformerBlock"]):
            yield branch(name, "attention", "attention.out_lin", results=2)
            yield branch(name, "ffn", "ffn.lin2")


def _branches(name: str, layer: Any) -> Iterator[Part]:
    """The norms behind the sums stay; those before a branch (RoBERTa-PreLayerNorm) pass on what comes."""
    first = ("attention.LayerNorm",) if hasattr(layer.attention, "LayerNorm") else ()
    second = ("LayerNorm",) if hasattr(layer, "LayerNorm") else ()
    attention = (*(Stand(n, "input") for n in first), Stand("attention.self", "input", 2))
    feed_forward = (*(Stand(n, "input") for n in second), Stand("intermediate", "input"))
    for at, stands, out in (
        ("attention", attention, "attention.output.dense"),
        ("output", feed_forward, "output.dense"),
    ):
        yield Branch(name, at, (*stands, Stand(out, "zero")), (out,))


def _attention(at: str, own: Any) -> Heads:
    numbers = ("self.num_attention_heads", "self.all_head_size")
    return Heads(
        at,
        "output.dense",
        own.num_attention_heads,
        own.attention_head_size,
        "self.query",
        "self.key",
        "self.value",
        numbers=numbers,
    )
