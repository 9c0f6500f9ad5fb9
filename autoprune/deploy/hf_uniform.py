"""Hugging Face's own configurations: one width for all layers, so that `from_pretrained` loads the result as it is."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from autoprune.deploy import IN_FLOAT, tied, without
from autoprune.errors import InputError, one_line
from autoprune.policy import Policy
from autoprune.structure import Group, Structure

GATED = "mlp.gate_proj"
"""Layers of the Llama kind, whose configurations say how wide a head is, so that there may be fewer of them."""


VALIDATING = "LlamaRMSNorm"
"""Of a model whose configuration takes only numbers of heads that divide its width, whatever head_dim says."""
NEURONS = ("intermediate_size", "ffn_dim", "n_inner", "d_ff", "encoder_ffn_dim", "hidden_dim")
"""What configurations call the width of a feed-forward layer."""


class HfUniform:
    """Neurons and, where the configuration has a head_dim, key-value groups: one group over all layers each."""

    def check(self, model: nn.Module) -> None:
        """InputError where it is no model of transformers."""
        if not hasattr(model, "save_pretrained") or getattr(model, "config", None) is None:
            raise InputError(f"deploy: hf-uniform holds models of transformers, not a {type(model).__name__}")

    def restrict(self, structure: Structure) -> Structure:
        """Blocks, channels and other heads stay; the rest is tied over the layers, but for zeros."""
        tensors = [part.tensor for group in structure for part in group.slices]
        llama = any(GATED in name for name in (*tensors, *(spec.name for op in structure.ops for spec in op.tensors)))

        def reason(group: Group) -> str | None:
            if group.kind in ("neuron", "weight") or (group.kind == "kv_group" and llama):
                return None  # zeros are numbers like others
            if group.kind in ("head", "kv_group"):
                return "the configuration ties the number of heads to the width of the model"
            if group.kind == "bits":
                return IN_FLOAT
            return f"a configuration cannot hold a {group.kind} of one layer"

        held = _dividing(without(structure, reason))
        return tied(held, [group for group in held if group.kind != "weight"])

    def write(self, model: nn.Module, structure: Structure, policy: Policy, folder: Path) -> None:
        """`model`, the pruned one, as a folder of transformers' own.

        Raises:
            InputError: it is none of transformers, or its configuration does not say how wide a group is.
        """
        self.check(model)
        held: Any = model
        config = copy.deepcopy(held.config)
        for group in structure:
            if group.kind == "neuron":
                _set_neurons(config, held.config, group, policy.as_dict()[group.name])
            elif group.kind == "kv_group":
                _set_heads(config, policy.as_dict()[group.name])
        try:
            type(config).from_dict(config.to_dict())
        except Exception as error:  # each configuration has rules of its own
            raise InputError(
                f"deploy: hf-uniform: a {type(config).__name__} refuses this point: {one_line(error, 240)}"
            ) from error
        before, held.config = held.config, config
        try:
            held.save_pretrained(folder)
        finally:
            held.config = before


def _dividing(structure: Structure) -> Structure:
    """The structure with the numbers of heads that the configuration takes, where that looks at them."""
    shapes = {spec.name: spec.shape for op in structure.ops for spec in op.tensors}
    if all(op.type != VALIDATING for op in structure.ops):
        return structure
    groups = []
    for group in structure:
        read = [s for s in group.slices if s.role == "consume"]
        if group.kind == "kv_group" and read[0].tensor in shapes:
            hidden, each = shapes[read[0].tensor][0], read[0].repeat // min(s.repeat for s in group.slices)
            grid = tuple(w for w in group.grid if w == group.width or hidden % (w * each) == 0)
            group = replace(group, grid=grid)
        groups.append(group)
    held = Structure(tuple(groups), structure.ops, structure.frozen, structure.fingerprint)
    return without(held, lambda g: None if len(g.grid) > 1 else "no smaller number of heads divides the width")


def _set_neurons(config: Any, dense: Any, group: Group, width: int) -> None:
    """Under whatever name the configuration has the width; GPT-2's says nothing where it is the usual one."""
    named = [key for key in NEURONS if getattr(dense, key, None) == group.width]
    if not named and getattr(dense, "n_inner", 0) is None:
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
