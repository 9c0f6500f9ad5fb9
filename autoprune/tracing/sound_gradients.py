"""Sound gradients on CPUs: a backward pass that oneDNN gets wrong, computed in another way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch.overrides import TorchFunctionMode

from autoprune.tracing.calls import Call, parse_call

WIDEST_BLOCK = 16
"""Channels that oneDNN's kernels take at a time, at most."""


class SoundGradients(TorchFunctionMode):
    """Runs strided 1x1 convolutions of few channels as a slice and a convolution of stride 1, which is the same.

    oneDNN's gradient of their weights writes past its buffer in channels_last (uxlfoundation/oneDNN issue 6035): wrong
    values on some CPUs, a crash on others. Pruning makes few channels of many. The mode goes around a forward pass
    whose backward pass follows, outside of other modes.
    """

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        call = parse_call(func, args, kwargs or {})
        if call is None or not _at_risk(call):
            return func(*args, **(kwargs or {}))
        taken: Any = call.x
        for dim, step in enumerate(call.stride, start=call.x.dim() - len(call.stride)):
            taken = taken[(slice(None),) * dim + (slice(None, None, step),)]
        return func(taken, call.weight, call.bias, groups=call.groups)


def _at_risk(call: Call) -> bool:
    pointwise = call.kind == "conv" and all(k == 1 for k in call.weight.shape[2:]) and not any(map(any, call.pads))
    return pointwise and max(call.stride) > 1 and call.weight.shape[1] < WIDEST_BLOCK and call.x.device.type == "cpu"
