"""Float32 or bfloat16: which of them a model is evaluated in, and a model that computes in bfloat16 for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

Precision = Literal["fp32", "bf16"]
Wanted = Literal["auto", "fp32", "bf16"]
LARGEST_ERROR = 1e-3
"""Loss between the dense outputs in both precisions beyond which bfloat16 is not used."""
SMALL_MACS = 2e6
"""MACs a sample below which casting costs more than faster products save."""
_CPU_FEATURES = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")


def choose_precision(wanted: Wanted, device: torch.device, macs: float) -> Precision:
    """`wanted`; auto is bf16 for all but small models where the hardware has instructions for it (never by timing).

    `macs` are those of the dense model for one sample.
    """
    if wanted != "auto":
        return wanted
    return "bf16" if macs >= SMALL_MACS and has_bfloat16(device) else "fp32"


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 faster than float32: AMX or AVX512-BF16, or a GPU that has it."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    known = (getattr(torch.cpu, name, None) for name in _CPU_FEATURES)
    return device.type == "cpu" and any(bool(is_supported()) for is_supported in known if is_supported is not None)


@contextmanager
def computing(model: nn.Module, precision: Precision) -> Iterator[None]:
    """Inside, the forward of `model` runs in `precision` and returns float32; what surrounds it computes as ever.

    Weights stay in float32 and are cast call by call, so that a mode above sees them as they are. On a GPU the same
    call gives the same figures each time, and float32 is float32 (cuDNN takes TF32 for convolutions if it may).
    """
    with repeatable(model), cast(model, precision):
        yield


@contextmanager
def repeatable(model: nn.Module) -> Iterator[None]:
    """Half of `computing`: what holds for the whole process."""
    if _device_type(model) != "cuda":
        yield
        return
    cudnn = torch.backends.cudnn
    with cudnn.flags(enabled=cudnn.enabled, benchmark=False, deterministic=True, allow_tf32=False):
        yield


@contextmanager
def cast(model: nn.Module, precision: Precision) -> Iterator[None]:
    """The other half, which holds for `model` and the thread that runs it."""
    if precision == "fp32":
        yield
        return
    device = _device_type(model)
    entered: list[torch.autocast] = []

    def enter(*_: Any) -> None:
        entered.append(torch.autocast(device, torch.bfloat16))
        entered[-1].__enter__()

    def leave(module: nn.Module, inputs: Any, outputs: Any) -> Any:
        if entered:  # else another hook failed before the forward began
            entered.pop().__exit__(None, None, None)
        return tree_map(lambda t: widened(t) if isinstance(t, Tensor) else t, outputs)

    hooks = [model.register_forward_pre_hook(enter), model.register_forward_hook(leave, always_call=True)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _device_type(model: nn.Module) -> str:
    return next((p.device.type for p in model.parameters()), "cpu")


@contextmanager
def exactly(device: torch.device) -> Iterator[None]:
    """Inside, nothing is cast to a lower precision, also where a mode is called amid a forward that is."""
    with torch.autocast(device.type, enabled=False):
        yield


def widened(t: Tensor) -> Tensor:
    """In float32 where it came in half precision, else as it is."""
    return t.float() if t.dtype in (torch.bfloat16, torch.float16) else t


def computed_dtype(x: Tensor) -> torch.dtype:
    """The type of a product of `x` and a float32 weight where it stands."""
    lowered = x.dtype == torch.float32 and torch.is_autocast_enabled(x.device.type)
    return torch.get_autocast_dtype(x.device.type) if lowered else x.dtype
