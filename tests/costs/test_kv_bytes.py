"""Bytes of the cache of keys and values, against what the shapes say."""

from __future__ import annotations

import numpy as np
import pytest

from autoprune.costs.kv_bytes import KvBytes
from autoprune.deploy import searched
from autoprune.errors import InputError
from autoprune.families import analyze
from autoprune.space import Space
from tests.deploy.decoders import analysed
from tests.synthetic import attending, chain
from tests.transformer_models import MODELS


def test_four_heads_of_eight_hold_keys_and_values() -> None:
    cost = KvBytes(attending())
    assert cost.dense == 4 * 8 * 2 * 4  # heads, size, keys and values, bytes
    widths = np.array([g.width for g in attending()])
    widths[-1] = 1
    assert float(cost(widths)) == 0.25


def test_a_model_without_heads_is_refused() -> None:
    with pytest.raises(InputError, match=r"kv_bytes.*no key-value heads"):
        KvBytes(chain())


@pytest.mark.parametrize(("name", "heads"), [("llama", 2), ("gpt2", 4), ("gpt_neox", 4), ("opt", 4)])
def test_a_layer_holds_a_key_and_a_value_of_eight_for_each_head(name: str, heads: int) -> None:
    structure = analyze(MODELS[name].build(), MODELS[name].example())
    assert KvBytes(structure).dense == 2 * heads * 8 * 2 * 4


def test_query_heads_of_a_key_value_head_cost_nothing() -> None:
    structure = analyze(MODELS["llama"].build(), MODELS["llama"].example(), kinds=("head",))
    with pytest.raises(InputError, match="no key-value heads"):
        KvBytes(structure)


def test_heads_that_are_tied_over_layers_cache_nothing_in_an_absent_attention() -> None:
    structure = searched(analysed("grouped queries"), Space(), "vllm-deci")
    cost, widths = KvBytes(structure), np.array([g.width for g in structure])
    assert cost.dense == KvBytes(analysed("grouped queries")).dense
    widths[structure.names.index("model.layers.*.self_attn.q_proj")] = 2
    assert float(cost(widths)) == 0.5
    widths[structure.names.index("model.layers.1.self_attn")] = 0
    assert float(cost(np.stack([widths, widths]))[1]) == 0.375


def test_an_absent_attention_caches_nothing() -> None:
    structure = analyze(MODELS["llama"].build(), MODELS["llama"].example())
    cost, widths = KvBytes(structure), np.array([g.width for g in structure])
    widths[structure.names.index("model.layers.0.self_attn")] = 0
    assert float(cost(widths)) == 0.5
