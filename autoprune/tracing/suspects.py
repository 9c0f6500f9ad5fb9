"""Operations that usually make channels unprunable, in a user's words; they explain, certification decides."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

DECISIONS = frozenset(
    {"__bool__", "__int__", "__float__", "__index__", "item", "tolist", "numpy", "__array__", "__contains__"}
    | {"equal", "allclose", "is_nonzero"}
)
"""Torch functions that turn an activation into a Python value: a branch may hang on it."""

Tainted = Callable[[Tensor], bool]
_SHUFFLES = frozenset({"pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "native_channel_shuffle", "fold", "unfold"})
_RESHAPES = frozenset({"view", "reshape", "unflatten"})
_SPREADS = frozenset({"softmax", "log_softmax", "softmin", "normalize", "cumsum", "cumprod", "flip", "roll", "sort", "glu"})
_REDUCES = frozenset(
    {"mean", "sum", "max", "min", "amax", "amin", "std", "var", "norm", "vector_norm", "logsumexp", "argmax", "prod", "topk"}
)
_NORMS = frozenset({"layer_norm", "group_norm", "local_response_norm", "rms_norm"})
_PRODUCTS = frozenset(
    {"matmul", "bmm", "baddbmm", "einsum", "__matmul__", "mm", "dot", "scaled_dot_product_attention", "tensordot"}
    | {"multi_head_attention_forward"}
)
_CUTS = frozenset({"chunk", "split", "tensor_split", "narrow", "index_select", "gather", "__getitem__", "unbind"})


def suspicion(name: str, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any, tainted: Tainted) -> tuple[int, str] | None:
    """(rank, words) if the torch function `name`, called like this, tends to tie channels together; rank 0 explains best."""
    if name in ("cat", "concat", "concatenate"):
        return _cat(args, kwargs, tainted)
    x = args[0] if args else kwargs.get("input")
    if name == "einsum":
        x = next((a for a in args if isinstance(a, Tensor)), None)
    if not isinstance(x, Tensor):
        return None
    if name == "pad":
        return (0, "its channels are padded with constants (F.pad), so they sit at other positions afterwards") if _pads_channels(x, args, kwargs) else None
    if name in _SHUFFLES:
        return 0, f"its channels are moved into space or shuffled ({name})"
    if name in _RESHAPES and isinstance(result, Tensor) and result.dim() > x.dim() and x.dim() >= 3:
        return 1, "a reshape splits its channels into several dimensions (as a channel shuffle or attention heads do)"
    if name in _NORMS:
        return 0, f"a norm mixes all its channels ({name})"
    if name in _SPREADS and _over_channels(x, args, kwargs):
        return 0, f"{name} runs over its channels"
    if name in _PRODUCTS and sum(tainted(a) for a in (*args, *kwargs.values()) if isinstance(a, Tensor)) > 1:
        return 0, f"activations are multiplied with activations ({name.strip('_')}), as attention does"
    if name in _REDUCES and _over_channels(x, args, kwargs):
        return 0, f"its channels are reduced to one value ({name} over the channels)"
    if name in _CUTS and _cuts_channels(name, x, args, kwargs):
        return 2, f"its channels are split at a fixed place ({name.strip('_')})"
    if name in ("detach", "detach_"):
        return 2, "its output is detached, so the trace loses it"
    return None


def _cat(args: Sequence[Any], kwargs: Mapping[str, Any], tainted: Tainted) -> tuple[int, str] | None:
    parts = args[0] if args else kwargs.get("tensors", ())
    if not isinstance(parts, tuple | list) or all(tainted(p) for p in parts):
        return None
    return 1, "its channels are concatenated with a constant"


def _pads_channels(x: Tensor, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    pad = list(args[1] if len(args) > 1 else kwargs.get("pad", ()))
    channel = 1 if x.dim() > 1 else 0
    from_end = x.dim() - 1 - channel  # F.pad lists (before, after) from the last dimension
    return any(pad[2 * from_end : 2 * from_end + 2])


def _over_channels(x: Tensor, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    dims = next((kwargs[k] for k in ("dim", "axis", "dims") if k in kwargs), None)
    if dims is None:
        dims = next((a for a in args[1:] if isinstance(a, int | tuple | list) and not isinstance(a, bool)), None)
    if dims is None:
        return True  # over everything
    chosen = {d % max(x.dim(), 1) for d in ((dims,) if isinstance(dims, int) else dims) if isinstance(d, int)}
    return bool(chosen & ({1, 2} if x.dim() == 3 else {1}))


def _cuts_channels(name: str, x: Tensor, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    if name != "__getitem__":
        dim = kwargs.get("dim", args[2] if len(args) > 2 and isinstance(args[2], int) else 0)
        return bool(x.dim()) and dim % x.dim() in ({1, 2} if x.dim() == 3 else {1})
    index = args[1] if isinstance(args[1], tuple) else (args[1],)
    return any(i != slice(None) if isinstance(i, slice) else i is not Ellipsis for i in index[1:2])
