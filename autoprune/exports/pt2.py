"""torch.export's own file: loads without the model's code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from autoprune.exports import compare, free_batch, other_samples
from autoprune.tracing.inputs import call_model
from autoprune.tracing.quiet import quiet


class Pt2:
    """model.pt2, read by `torch.export.load`."""

    suffix = "pt2"

    def __call__(self, model: nn.Module, inputs: tuple[Any, ...], path: Path) -> Any:
        """Write, load and run: on the inputs, and on other ones with one sample more."""
        positional, keywords, shapes = free_batch(model, inputs)
        with quiet():
            program = torch.export.export(model, positional, keywords, dynamic_shapes=shapes)
            torch.export.save(program, path)
            loaded = torch.export.load(path).module()
            if (other := other_samples(model, inputs)) is not None:
                compare(call_model(loaded, other[0]), other[1], path)
            return call_model(loaded, inputs)
