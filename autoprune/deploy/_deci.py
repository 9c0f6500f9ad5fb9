"""What vLLM's DeciLM and llama.cpp's deci share: decoders built like Llama whose layers differ."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from autoprune.errors import InputError
from autoprune.structure import Group, Structure

CLASSES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM")
"""What both compute exactly. Others of the Llama family scale, normalise or leave out what these do not."""
ATTENTION, FEED_FORWARD = "self_attn", "mlp"
PART = re.compile(rf"(?:^|\.)layers\.(\d+|\*)\.({ATTENTION}|{FEED_FORWARD})(?=\.|$)")
OTHERS = "it holds decoders built like Llama ({})".format(", ".join(CLASSES))


@dataclass(frozen=True)
class Layer:
    """What a layer of a pruned model has; none of what is absent."""

    heads: int
    kv_heads: int
    neurons: int


def check_decoder(model: nn.Module, container: str) -> Any:
    """The configuration of a model that both can compute.

    Raises:
        InputError: it is another one (says what of it).
    """
    kind, where = type(model), f"deploy: {container}"
    if kind.__name__ not in CLASSES or not kind.__module__.startswith("transformers."):
        raise InputError(f"{where} cannot hold a {kind.__name__}: {OTHERS}")
    config: Any = model.config
    if config.hidden_act != "silu":
        raise InputError(f"{where} cannot hold this {kind.__name__}: its hidden_act is {config.hidden_act}, not silu")
    window, most = getattr(config, "sliding_window", None), config.max_position_embeddings
    if window is not None and window < most:
        raise InputError(
            f"{where} cannot hold this {kind.__name__}: its attention sees {window} tokens (sliding_window), and there "
            f"it would see all of up to {most}; set sliding_window to null, or max_position_embeddings to {window}"
        )
    return config


def layers_of(model: Any) -> list[Layer]:
    """The layers of a pruned model that `check_decoder` lets pass, by the shapes of their weights."""
    head_dim = head_dim_of(model.config)
    found = []
    for layer in model.model.layers:
        attention, feed_forward = layer.self_attn, layer.mlp
        there = hasattr(attention, "q_proj")  # a stand-in has no weights
        heads = attention.q_proj.weight.shape[0] // head_dim if there else 0
        kv_heads = attention.k_proj.weight.shape[0] // head_dim if there else 0
        neurons = feed_forward.gate_proj.weight.shape[0] if hasattr(feed_forward, "gate_proj") else 0
        found.append(Layer(heads, kv_heads, neurons))
    return found


def head_dim_of(config: Any) -> int:
    """How wide a head is; removing heads does not change it."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """All weights of a pruned model on the CPU by their names in transformers, an output layer only where it is one."""
    tied = bool(getattr(model.config, "tie_word_embeddings", False))
    return {
        name: value.detach().cpu().contiguous()
        for name, value in model.state_dict().items()
        if not (tied and name == "lm_head.weight")
    }


def part_of(group: Group) -> tuple[str, str] | None:
    """(number of its layer, "self_attn" or "mlp") of a group of such a decoder; None of any other one."""
    found = PART.search(group.name)
    return None if found is None else (found[1], found[2])


def branches(structure: Structure) -> dict[tuple[int, str], Group]:
    """The blocks of single attentions and feed-forward layers, by layer and part."""
    parts = {g.name: part_of(g) for g in structure if g.kind == "block"}
    return {(int(p[0]), p[1]): g for g in structure if (p := parts.get(g.name)) is not None and p[0] != "*"}


def feed_forward_widths(structure: Structure) -> dict[str, int]:
    """How wide each feed-forward layer is in the dense model, by the name of what makes its neurons."""
    ending = f".{FEED_FORWARD}.gate_proj"
    found = {g.name: g.width for g in structure if g.kind == "neuron"}
    for op in structure.ops:
        found |= {spec.name.removesuffix(".weight"): spec.shape[0] for spec in op.tensors if ending in spec.name}
    return {name: width for name, width in found.items() if name.endswith(ending)}


def is_decoder(structure: Structure) -> bool:
    """Whether the names of groups and tensors are those of a decoder built like Llama; without any, who knows."""
    groups = [g for g in structure if not g.matrices]
    names = [g.name for g in groups] + [spec.name for op in structure.ops for spec in op.tensors]
    inside = [name for name in names if PART.search(name)]
    normed = any(".q_norm." in name or ".k_norm." in name for name in inside)
    return all(part_of(g) is not None or g.kind == "block" for g in groups) and bool(inside) and not normed


def common(values: Mapping[int, int], what: str, container: str) -> int:
    """The one value of all layers.

    Raises:
        InputError: there are several (names the layers and the value that most of them have).
    """
    counts = list(values.values())
    usual = max(dict.fromkeys(counts), key=counts.count)
    other = [f"layer {i} has {n}" for i, n in values.items() if n != usual]
    if other:
        raise InputError(
            f"deploy: {container} wants one number of {what} in all layers: {few(other)}, the others {usual}, which is "
            "the nearest that fits"
        )
    return usual


def few(lines: Iterable[str], most: int = 3) -> str:
    """The first of `lines`, and how many more there are."""
    every = list(lines)
    more = f" and {len(every) - most} more" if len(every) > most else ""
    return ", ".join(every[:most]) + more
