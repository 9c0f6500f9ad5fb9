"""T5 and MPNet: the heads of all layers go together, for they share one bias by position."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from autoprune.families._layouts import Branch, Heads, Neurons, Part, Tied, branch, is_class
from autoprune.structure import Stand

DENSE = {"T5DenseActDense": ("wi",), "T5DenseGatedActDense": ("wi_0", "wi_1")}


class T5:
    """A stack of layers whose first one (in MPNet the stack itself) holds a table with a value a head."""

    traced = False

    def parts(self, name: str, module: Any) -> Iterator[Part]:
        if is_class(module, "transformers", ["T5Stack"]):
            for part in ("SelfAttention", "EncDecAttention"):  # zeros of the first layer's heads bias the latter
                own = [(n, m) for n, m in module.named_modules(prefix=name) if n.endswith(f".{part}")]
                if own:
                    yield Tied(tuple(_attention(n, m) for n, m in own))
        elif is_class(module, "transformers", ["MPNetEncoder"]):
            own = [(n, m) for n, m in module.named_modules(prefix=name) if type(m).__name__ == "MPNetSelfAttention"]
            yield Tied(tuple(_under(name, n, m, first=not i) for i, (n, m) in enumerate(own)))
        elif is_class(module, "transformers", ["MPNetLayer"]):
            yield Neurons(name, ("intermediate.dense",), "output.dense")
            yield branch(name, "attention.attn", "attention.attn.o", results=1)
            yield Branch(
                name, "output", (Stand("intermediate", "input"), Stand("output.dense", "zero")), ("output.dense",)
            )
        elif is_class(module, "transformers", ["T5LayerFF"]):  # an attention hands on what all add to their scores
            yield branch(name, "DenseReluDense", "DenseReluDense.wo", norm="layer_norm")
        elif is_class(module, "transformers", DENSE):
            yield Neurons(name, DENSE[type(module).__name__], "wo")


def _attention(name: str, module: Any) -> Heads:
    tables = ("relative_attention_bias.weight",) if module.has_relative_attention_bias else ()
    numbers = ("n_heads", "inner_dim")
    return Heads(name, "o", module.n_heads, module.key_value_proj_dim, "q", "k", "v", numbers=numbers, tables=tables)


def _under(stack: str, name: str, module: Any, first: bool) -> Heads:
    """An attention of MPNet, its paths from the stack; the first one brings the stack's own table and number."""
    at = name.removeprefix(f"{stack}.")
    numbers = (f"{at}.num_attention_heads", f"{at}.all_head_size", *(("n_heads",) if first else ()))
    return Heads(
        stack,
        f"{at}.o",
        module.num_attention_heads,
        module.attention_head_size,
        f"{at}.q",
        f"{at}.k",
        f"{at}.v",
        numbers=numbers,
        tables=("relative_attention_bias.weight",) if first else (),
    )
