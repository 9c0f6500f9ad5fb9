"""Hugging Face's own configurations: one width for all layers, so that `from_pretrained` loads the result as it is."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from torch import nn

from autoprune.deploy import tied, without
from autoprune.errors import InputError
from autoprune.policy import Policy
from autoprune.structure import Group, Structure

GATED = "mlp.gate_proj"
"""Layers of the Llama kind, whose configurations say how wide a head is, so that there may be fewer of them."""


NEURONS = ("intermediate_size", "ffn_dim", "n_inner", "d_ff", "encoder_ffn_dim", "hidden_dim")
"""What configurations call the width of a feed-forward layer."""


class HfUniform:
    """Neurons and, where the configuration has a head_dim, key-value groups: one group over all layers each."""

    def restrict(self, structure: Structure) -> Structure:
        """Blocks, channels and other heads stay; the rest is tied over the layers."""
        tensors = [part.tensor for group in structure for part in group.slices]
        llama = any(GATED in name for name in (*tensors, *(spec.name for op in structure.ops for spec in op.tensors)))

        def reason(group: Group) -> str | None:
            if group.kind == "neuron" or (group.kind == "kv_group" and llama):
                return None
            if group.kind in ("head", "kv_group"):
                return "the configuration ties the number of heads to the width of the model"
            return f"a configuration cannot hold a {group.kind} of one layer"

        held = without(structure, reason)
        return tied(held, held.groups)

    def write(self, model: nn.Module, structure: Structure, policy: Policy, folder: Path) -> None:
        """`model`, the pruned one, as a folder of transformers' own.

        Raises:
            InputError: it is none of transformers, or its configuration does not say how wide a group is.
        """
        config: Any = copy.deepcopy(getattr(model, "config", None))
        if not hasattr(model, "save_pretrained") or config is None:
            raise InputError(f"deploy: hf-uniform holds models of transformers, not a {type(model).__name__}")
        for group in structure:
            if group.kind == "neuron":
                _set_neurons(config, group, policy.as_dict()[group.name])
            elif group.kind == "kv_group":
                _set_heads(config, policy.as_dict()[group.name])
        held: Any = model
        before, held.config = held.config, config
        try:
            held.save_pretrained(folder)
        finally:
            held.config = before


def _set_neurons(config: Any, group: Group, width: int) -> None:
    """Under whatever name the configuration has the width; GPT-2's says nothing where it is the usual one."""
    named = [key for key in NEURONS if getattr(config, key, None) == group.width]
    if not named and getattr(config, "n_inner", 0) is None:
        named = ["n_inner"]
    if not named:
        raise InputError(f"deploy: the configuration does not say that {group.name} is {group.width} wide")
    for key in named:
        setattr(config, key, width)


def _set_heads(config: Any, width: int) -> None:
    each = config.num_attention_heads // config.num_key_value_heads
    if getattr(config, "head_dim", None) is None:
        config.head_dim = config.hidden_size // config.num_attention_heads
    config.num_key_value_heads, config.num_attention_heads = width, width * each
