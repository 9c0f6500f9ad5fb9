"""BERT and those built like it: RoBERTa, XLM-R, CamemBERT, ELECTRA, MiniLM (which is a BERT), DistilBERT."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from autoprune.families._layouts import Heads, Neurons, Tied, is_class

NAMES = ("Bert", "Roberta", "XLMRoberta", "Camembert", "Electra", "RobertaPreLayerNorm", "Data2VecText", "Ernie")


class Bert:
    """One layer is an attention with query, key and value below `self` and its output beside it, then two linears."""

    traced = False

    def parts(self, name: str, module: Any) -> Iterator[Heads | Neurons | Tied]:
        if is_class(module, "transformers", [f"{n}Layer" for n in NAMES]):
            for at in ("attention", "crossattention"):
                if isinstance(getattr(module, at, None), nn.Module):
                    yield _attention(f"{name}.{at}", getattr(module, at).self)
            yield Neurons(name, ("intermediate.dense",), "output.dense")
        elif is_class(module, "transformers", ["DistilBertSelfAttention"]):
            numbers = ("n_heads", "dim")
            yield Heads(
                name, "out_lin", module.n_heads, module.attention_head_size, "q_lin", "k_lin", "v_lin", numbers=numbers
            )
        elif type(module).__name__ == "FFN" and is_class(module, "transformers", ["FFN"]):
            yield Neurons(name, ("lin1",), "lin2")


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
