"""Small random decoders of the Llama kind, cut as a container allows it; for the tests of what is written of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from autoprune.deploy import searched
from autoprune.families import analyze
from autoprune.policy import Policy
from autoprune.space import Space
from autoprune.structure import Structure
from autoprune.tracing.copies import copied
from autoprune.tracing.slim import slim
from tests.transformer_models import MISSING

SIZES = {
    **{"vocab_size": 64, "hidden_size": 32, "intermediate_size": 768, "num_hidden_layers": 4},
    **{"num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 40},
}
LLAMA3 = {
    **{"rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "original_max_position_embeddings": 16,
}
DECODERS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "grouped queries": ("Llama", {}),
    "a key for each query": ("Llama", {"num_key_value_heads": 8}),
    "tied embeddings": ("Llama", {"tie_word_embeddings": True}),
    "biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "scaled positions": ("Llama", {"rope_parameters": LLAMA3}),
    "stretched positions": (
        "Llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}},
    ),
    "mistral": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {}),
}
IDS = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(1))
INPUTS = ({"input_ids": IDS},)


@dataclass(frozen=True)
class Cut:
    """A pruned decoder, what was allowed of it, and the policy that it has."""

    model: Any
    structure: Structure
    policy: Policy

    @property
    def logits(self) -> Tensor:
        with torch.no_grad():
            found: Tensor = self.model(**INPUTS[0]).logits
        return found


def decoder(name: str = "grouped queries", **more: Any) -> nn.Module:
    """One of `DECODERS`, the same at every call; weights large enough that whatever is wrong in it shows."""
    library = pytest.importorskip("transformers", reason=MISSING)
    kind, settings = DECODERS[name]
    config = getattr(library, f"{kind}Config")(**{**SIZES, **settings, **more})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: nn.Module = getattr(library, f"{kind}ForCausalLM")(config).eval()
        for parameter in model.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, 0.0, 0.1)
            else:  # norms and biases of their own, or they could be mixed up
                nn.init.uniform_(parameter, 0.5, 1.5)
    return model


@cache
def analysed(name: str) -> Structure:
    """The whole structure of one of `DECODERS`."""
    return analyze(decoder(name), INPUTS)


def cut(name: str, deploy: str | None, seed: int = 0, **widths: int) -> Cut:
    """A decoder at random widths that `deploy` allows, or dense but for `widths`; random atoms stay."""
    model, structure = decoder(name), searched(analysed(name), Space(), deploy)
    rng = np.random.default_rng(seed)
    if widths:
        policy = Policy.of({**Policy.dense(structure).as_dict(), **widths})
    else:
        policy = Policy.from_array(structure, [int(rng.choice(g.grid)) for g in structure])
    policy.check(structure)
    chosen = {g.name: rng.permutation(g.width)[: policy.as_dict()[g.name]] for g in structure}
    small = copied(model)
    slim(small, structure, {name: tuple(sorted(map(int, atoms))) for name, atoms in chosen.items()})
    return Cut(small, structure, policy)
