"""Operations that usually make channels unprunable, in a user's words; they explain, certification decides."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

DECISIONS = frozenset(
    {"__bool__", "__int__", "__float__", "__index__", "item", "tolist", "numpy", "__array__", "__contains__"}
    | {"equal", "allclose", "is_nonzero"}
)
"""Torch functions that turn an activation into a Python value: a branch may hang on it."""


@dataclass(frozen=True, slots=True)
class Seen:
    """A torch function with its first tensor `x`, arguments and result; `tainted` tells activations from constants.

    `last` says that channels lie along the last dimension of `x`.
    """

    name: str
    x: Tensor
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    result: Any
    tainted: Callable[[Tensor], bool]
    last: bool = False


def suspicion(seen: Seen) -> tuple[int, str] | None:
    """(rank, words) if this call tends to tie channels together; rank 0 explains best."""
    for names, holds, rank, words in _RULES:
        if seen.name in names and holds(seen):
            return rank, words.format(seen.name.strip("_"))
    return None


def along_channels(name: str, x: Tensor, other: Tensor) -> bool:
    """Whether the function `name` can lay `other` along the channels of `x`: broadcast there, or else as wide."""
    channels = {d for d in _channel_dims(x) if d < x.dim() and x.shape[d] > 1}
    if name.strip("_").removeprefix("r").removeprefix("i") in _BROADCAST:
        shift = x.dim() - other.dim()
        return any(d >= shift and other.shape[d - shift] == x.shape[d] for d in channels)
    return any(x.shape[d] in other.shape for d in channels)


def _always(seen: Seen) -> bool:
    return True


def _pads_channels(seen: Seen) -> bool:
    pad = list(seen.args[1] if len(seen.args) > 1 else seen.kwargs.get("pad", ()))
    from_end = seen.x.dim() - (2 if seen.x.dim() > 1 else 1)  # F.pad lists (before, after) from the last dimension
    return any(pad[2 * from_end : 2 * from_end + 2])


def _adds_constants(seen: Seen) -> bool:
    parts = seen.args[0] if seen.args else seen.kwargs.get("tensors", ())
    return isinstance(parts, tuple | list) and not all(seen.tainted(p) for p in parts)


def _splits_dimensions(seen: Seen) -> bool:
    return isinstance(seen.result, Tensor) and seen.result.dim() > seen.x.dim() >= 3


def _lays_out(seen: Seen) -> bool:
    return isinstance(seen.result, Tensor) and seen.result.dim() > seen.x.dim() == 2


def _slides_over_channels(seen: Seen) -> bool:
    """Whether channels lie where a sequence ought to: one channel that is as long as there are channels (ECA)."""
    weight = seen.args[1] if len(seen.args) > 1 else seen.kwargs["weight"]
    return seen.x.dim() == 3 and seen.x.shape[1] == 1 < min(seen.x.shape[2], weight.shape[-1])


def _multiplies_activations(seen: Seen) -> bool:
    values = tree_leaves((tuple(seen.args), dict(seen.kwargs)))
    return sum(seen.tainted(v) for v in values if isinstance(v, Tensor)) > 1


def _over_channels(seen: Seen) -> bool:
    dims = next((seen.kwargs[k] for k in ("dim", "axis", "dims") if k in seen.kwargs), None)
    if dims is None:
        dims = next((a for a in seen.args[1:] if isinstance(a, int | tuple | list) and not isinstance(a, bool)), None)
    if dims is None:
        return True  # over everything
    n = max(seen.x.dim(), 1)
    return bool({d % n for d in ((dims,) if isinstance(dims, int) else dims) if isinstance(d, int)} & _channels(seen))


def _cuts_channels(seen: Seen) -> bool:
    args, place = seen.args, 1 if seen.name in _DIM_FIRST else 2
    dim = seen.kwargs.get("dim", args[place] if len(args) > place and isinstance(args[place], int) else 0)
    return bool(seen.x.dim()) and dim % seen.x.dim() in _channels(seen)


def _indexes_channels(seen: Seen) -> bool:
    index = seen.args[1] if isinstance(seen.args[1], tuple) else (seen.args[1],)
    return seen.x.shape[1:2] != (1,) and any(
        i != slice(None) if isinstance(i, slice) else i is not Ellipsis for i in index[1:2]
    )


def _channels(seen: Seen) -> set[int]:
    return {seen.x.dim() - 1} if seen.last else _channel_dims(seen.x)


def lie_last(
    name: str, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any, last: Callable[[Tensor], bool]
) -> bool:
    """Whether the channels of a result lie along its last dimension, by `last`, which says so of the arguments."""
    x = args[0] if args else kwargs.get("input")
    if not isinstance(x, Tensor) or not isinstance(result, Tensor) or result.dim() < 4:
        return False
    if name == "permute" and len(args) > 1:
        dims = args[1] if isinstance(args[1], tuple | list) else args[1:]
        return bool(dims[-1] % x.dim() == (x.dim() - 1 if last(x) else 1))
    alike = (t for t in tree_leaves((args, dict(kwargs))) if isinstance(t, Tensor) and t.dim() == result.dim())
    return name == "linear" or (name not in _ELSEWHERE.split() and any(map(last, alike)))


def _channel_dims(x: Tensor) -> set[int]:
    """Dimensions that may hold channels: of [N, T, C] and [N, C, L] one does not know."""
    return {1, 2} if x.dim() == 3 else {1}


_ELSEWHERE = "conv1d conv2d conv3d transpose movedim swapaxes view reshape flatten unflatten einsum"
PRODUCT = "activations are multiplied with activations"
LIKE = frozenset({"to", "type_as", "expand_as", "view_as", "reshape_as"})
"""Torch functions that take no values of their second tensor."""
_BROADCAST = {"add", "sub", "mul", "div", "truediv", "true_divide", "pow", "maximum", "minimum", "where", "lerp"}
_CAT = "cat concat concatenate"
_SHUFFLE = "pixel_shuffle pixel_unshuffle channel_shuffle native_channel_shuffle fold unfold"
_NORM = "layer_norm group_norm local_response_norm rms_norm"
_SPREAD = "softmax log_softmax softmin normalize cumsum cumprod flip roll sort glu"
_REDUCE = "mean sum max min amax amin std var norm vector_norm logsumexp argmax prod topk"
_PRODUCT = (
    "matmul bmm baddbmm einsum __matmul__ mm dot tensordot scaled_dot_product_attention multi_head_attention_forward"
)
_DIM_FIRST = frozenset({"narrow", "index_select", "gather", "unbind"})
_CUT = "chunk split tensor_split narrow index_select gather unbind"
_PADDED = "its channels are padded with constants (F.pad), so they sit at other positions afterwards"
_MOVES = "sizes taken from the tensor would move with them"
_SPLIT = "a reshape splits its channels into several dimensions (as a channel shuffle or attention heads do)"

_RULES: tuple[tuple[frozenset[str], Callable[[Seen], bool], int, str], ...] = tuple(
    (frozenset(names.split()), holds, rank, words)
    for names, holds, rank, words in (
        ("pad", _pads_channels, 0, _PADDED),
        (_SHUFFLE, _always, 0, "its channels are moved into space or shuffled ({})"),
        (_NORM, _always, 0, "a norm mixes all its channels ({})"),
        (_SPREAD, _over_channels, 0, "{} runs over its channels"),
        (_PRODUCT, _multiplies_activations, 0, f"{PRODUCT} ({{}}), as attention does"),
        (_REDUCE, _over_channels, 0, "its channels are reduced to one value ({} over the channels)"),
        (_CAT, _adds_constants, 1, "its channels are concatenated with a constant"),
        ("view reshape unflatten", _splits_dimensions, 1, _SPLIT),
        ("conv1d", _slides_over_channels, 0, "a convolution runs along its channels ({})"),
        ("view reshape unflatten", _lays_out, 2, f"a reshape lays its channels out as a map ({{}}); {_MOVES}"),
        (_CUT, _cuts_channels, 2, f"its channels are split at a fixed place ({{}}); {_MOVES}"),
        ("__getitem__", _indexes_channels, 2, f"its channels are split at a fixed place ({{}}); {_MOVES}"),
        ("detach detach_", _always, 2, "its output is detached, so the trace loses it"),
    )
)
