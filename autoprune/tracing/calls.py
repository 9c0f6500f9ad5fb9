"""Calls of convolutions and linears as data, caught while a model runs: inputs as matrix rows, weights as matrices.

One algebra serves Grams, compensation and refit: every such call is y = u W' with u [rows, taps * channels], for each
conv group. A transposed convolution is a convolution of its zero-inserted input with the flipped kernel.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

CONVS: dict[Any, int] = {torch.conv1d: 1, torch.conv2d: 2, torch.conv3d: 3}
TRANSPOSED: dict[Any, int] = {torch.conv_transpose1d: 1, torch.conv_transpose2d: 2, torch.conv_transpose3d: 3}
ADDS = frozenset({torch.add, torch.Tensor.add, torch.Tensor.add_, torch.Tensor.__add__, torch.Tensor.__iadd__})
_RESHAPES = frozenset({torch.Tensor.view, torch.Tensor.reshape, torch.reshape, torch.Tensor.flatten, torch.flatten})
_CONV_ARGS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_NORM_ARGS = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
_TRANSPOSED_ARGS = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")


LINEAR = frozenset({"linear", "addmm"})
"""Kinds whose inputs and outputs are rows of features; the weight of `addmm` is [inputs, outputs]: GPT-2's Conv1D."""


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a conv, transposed conv or linear; `pads` are (before, after) a spatial dimension."""

    kind: Literal["conv", "transposed", "linear", "addmm"]
    func: Callable[..., Tensor]
    x: Tensor
    weight: Tensor
    bias: Tensor | None
    stride: tuple[int, ...] = ()
    pads: tuple[tuple[int, int], ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    kwargs: Mapping[str, Any] | None = None

    def run(self, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        """The call itself, with other weights if given."""
        kwargs = {k: v for k, v in (self.kwargs or {}).items() if k not in ("weight", "bias")}
        weight, bias = self.weight if weight is None else weight, self.bias if bias is None else bias
        if self.kind == "addmm":
            return self.func(bias, self.x, weight)
        return self.func(self.x, weight, bias, **kwargs)


def parse_call(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call | None:
    """The call behind a torch function, or None if it is neither convolution nor linear."""
    if func is torch.addmm and not kwargs and len(args) == 3:
        return Call("addmm", func, args[1], args[2], args[0])
    if func is F.linear:
        given = dict(zip(("input", "weight", "bias"), args, strict=False), **kwargs)
        return Call("linear", func, given["input"], given["weight"], given.get("bias"))
    transposed = func in TRANSPOSED
    if not transposed and func not in CONVS:
        return None
    n = TRANSPOSED[func] if transposed else CONVS[func]
    given = dict(zip(_TRANSPOSED_ARGS if transposed else _CONV_ARGS, args, strict=False), **kwargs)
    x, weight, bias = given.pop("input"), given["weight"], given.get("bias")
    kernel, stride, dilation = weight.shape[2:], _tuple(given.get("stride", 1), n), _tuple(given.get("dilation", 1), n)
    padding = given.get("padding", 0)
    if padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        pads = tuple((t // 2, t - t // 2) for t in total)
    else:
        pads = tuple((p, p) for p in _tuple(0 if padding == "valid" else padding, n))
    if transposed:
        extra = _tuple(given.get("output_padding", 0), n)
        span = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        pads = tuple((s - p, s - p + e) for s, (p, _), e in zip(span, pads, extra, strict=True))
    kind: Literal["conv", "transposed"] = "transposed" if transposed else "conv"
    return Call(kind, func, x, weight, bias, stride, pads, dilation, given.get("groups", 1), given)


@dataclass(frozen=True, slots=True)
class NormCall:
    """One call of batch norm with running statistics in eval mode."""

    x: Tensor
    mean: Tensor
    var: Tensor
    gamma: Tensor | None
    beta: Tensor | None
    eps: float

    def run(self, x: Tensor | None = None, mean: Tensor | None = None, var: Tensor | None = None) -> Tensor:
        """The call itself, on other inputs or statistics if given."""
        x, mean, var = (a if b is None else b for a, b in ((self.x, x), (self.mean, mean), (self.var, var)))
        return F.batch_norm(x, mean, var, self.gamma, self.beta, False, 0.0, self.eps)


def undropped(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The input of a dropout that drops nothing, which is its output; None of any other function."""
    if func is not F.dropout:
        return None
    given = dict(zip(("input", "p", "training", "inplace"), args, strict=False), **kwargs)
    x: Tensor = given["input"]
    return x if not given.get("training", True) or not given.get("p", 0.5) else None


def same_rows(func: Any, args: Sequence[Any], out: Any) -> bool:
    """Whether a call only gives rows of features another shape, as GPT-2's Conv1D does around its product."""
    x = args[0] if args else None  # by keyword it is another thing, which is left alone
    return func in _RESHAPES and isinstance(x, Tensor) and bool(x.shape[-1:] == out.shape[-1:])


def run_folded(call: Call, norm: NormCall) -> Tensor:
    """The norm of a convolution's or linear's output as one call, its scale and shift folded into the weight."""
    scale = (norm.var + norm.eps).rsqrt() * (1.0 if norm.gamma is None else norm.gamma)
    shift = (0.0 if call.bias is None else call.bias) - norm.mean
    bias = shift * scale + (0.0 if norm.beta is None else norm.beta)
    return call.run(call.weight * scale.view(-1, *[1] * (call.weight.dim() - 1)), bias)


def parse_norm(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> NormCall | None:
    """The batch norm behind a torch function, or None if it is none that uses running statistics."""
    if func is not F.batch_norm:
        return None
    given = dict(zip(_NORM_ARGS, args, strict=False), **kwargs)
    if given.get("training") or given.get("running_mean") is None:
        return None
    x, mean, var = given["input"], given["running_mean"], given["running_var"]
    return NormCall(x, mean, var, given.get("weight"), given.get("bias"), given.get("eps", 1e-5))


def rows(call: Call, positions: Tensor) -> Tensor:
    """Inputs as rows in memory of their own, [conv groups, samples * positions, taps * channels of a conv group].

    `positions` are flat output positions [P]; tokens of a linear, of which a 2-d input has one.
    """
    positions = positions.to(call.x.device)
    if call.kind in LINEAR:
        tokens = call.x.flatten(1, -2) if call.x.dim() > 2 else call.x[:, None]
        return tokens.index_select(1, positions).flatten(0, 1)[None]
    x, stride, pads = _as_convolution(call)
    index, outside = _gather_index(x.shape[2:], call, stride, pads, positions)
    u = x.movedim(1, -1).flatten(1, -2).index_select(1, index.flatten()).index_fill_(1, outside, 0.0)
    channels = x.shape[1] // call.groups
    u = u.reshape(len(x) * len(positions), index.shape[1], call.groups, channels)
    return u.permute(2, 0, 1, 3).flatten(2)


def kept_dim(kind: str) -> int:
    """The dimension of a weight along which its outputs lie, conv groups of a transposed convolution apart."""
    return 1 if kind in ("transposed", "addmm") else 0


def output_count(call: Call) -> int:
    """How many output positions a sample has."""
    if call.kind in LINEAR:
        return math.prod(call.x.shape[1:-1])
    x, stride, pads = _as_convolution(call)
    padded = [s + a + b for s, (a, b) in zip(x.shape[2:], pads, strict=True)]
    return math.prod(_output_size(padded, call.weight.shape[2:], stride, call.dilation))


def outputs_at(call_kind: str, y: Tensor, positions: Tensor) -> Tensor:
    """Outputs [N, C, ...] (linear: [N, ..., C]) at flat positions as [samples * positions, C], rows as in `rows`."""
    positions = positions.to(y.device)
    if call_kind in LINEAR:
        return y.flatten(1, -2).index_select(1, positions).flatten(0, 1) if y.dim() > 2 else y
    return y.movedim(1, -1).flatten(1, -2).index_select(1, positions).flatten(0, 1)


def to_matrix(weight: Tensor, kind: str, groups: int) -> Tensor:
    """A weight as [conv groups, rows, taps, channels], so that y = u W' with the columns of `rows`."""
    if kind in LINEAR:
        return (weight if kind == "linear" else weight.t())[None, :, None, :]
    if kind == "transposed":
        w = weight.flip(tuple(range(2, weight.dim()))).unflatten(0, (groups, -1)).transpose(1, 2)
    else:
        w = weight.unflatten(0, (groups, -1))
    matrix: Tensor = w.flatten(3).transpose(2, 3)
    return matrix


def from_matrix(matrix: Tensor, kind: str, kernel: Sequence[int]) -> Tensor:
    """The inverse of `to_matrix`."""
    if kind in LINEAR:
        return matrix[0, :, 0, :] if kind == "linear" else matrix[0, :, 0, :].t()
    w: Tensor = matrix.transpose(2, 3).unflatten(3, tuple(kernel))
    if kind == "transposed":
        return w.transpose(1, 2).flatten(0, 1).flip(tuple(range(2, 2 + len(kernel))))
    return w.flatten(0, 1)


def pick_positions(count: int, wanted: int, seed: int) -> Tensor:
    """`wanted` of `count` flat positions, ascending, the same for the same arguments; all where there are fewer."""
    if count <= wanted:
        return torch.arange(count)
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:wanted].sort().values


def spatial_count(kind: str, y: Tensor) -> int:
    """How many positions a sample has in the output `y` of a call."""
    return math.prod(y.shape[1:-1]) if kind in LINEAR else math.prod(y.shape[2:])


def _gather_index(
    size: Sequence[int],
    call: Call,
    stride: Sequence[int],
    pads: Sequence[tuple[int, int]],
    positions: Tensor,
) -> tuple[Tensor, Tensor]:
    """Flat input positions [P, taps] under each output position, and which of the P * taps lie in the zero padding.

    Gathering from the input as it is saves the padded copy of it.
    """
    kernel = call.weight.shape[2:]
    padded = [s + a + b for s, (a, b) in zip(size, pads, strict=True)]
    grid = _output_size(padded, kernel, stride, call.dilation)
    at, tap, step = positions, torch.arange(math.prod(kernel), device=positions.device), 1
    index = torch.zeros(len(at), len(tap), dtype=torch.long, device=positions.device)
    inside = torch.ones_like(index, dtype=torch.bool)
    for d in reversed(range(len(size))):
        place = ((at % grid[d]) * stride[d] - pads[d][0])[:, None] + ((tap % kernel[d]) * call.dilation[d])[None]
        inside &= (place >= 0) & (place < size[d])
        index += place.clamp(0, size[d] - 1) * step
        at, tap, step = at // grid[d], tap // kernel[d], step * size[d]
    return index, (~inside).flatten().nonzero()[:, 0]


def _as_convolution(call: Call) -> tuple[Tensor, tuple[int, ...], tuple[tuple[int, int], ...]]:
    """Input, stride and padding of the plain convolution that the call is."""
    x, stride, pads = call.x, call.stride, call.pads
    if call.kind == "transposed":
        size = [(s - 1) * t + 1 for s, t in zip(x.shape[2:], stride, strict=True)]
        wide = x.new_zeros(*x.shape[:2], *size)
        wide[(slice(None), slice(None), *(slice(None, None, t) for t in stride))] = x
        x, stride = wide, (1,) * len(stride)
    if any(p < 0 for pair in pads for p in pair):  # a transposed convolution may crop
        crops = [min(p, 0) for pair in reversed(pads) for p in pair]
        x, pads = F.pad(x, crops), tuple((max(a, 0), max(b, 0)) for a, b in pads)
    return x, stride, pads


def _output_size(
    size: Sequence[int], kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> list[int]:
    return [(s - d * (k - 1) - 1) // t + 1 for s, k, t, d in zip(size, kernel, stride, dilation, strict=True)]


def _tuple(value: Any, n: int) -> tuple[int, ...]:
    return (int(value),) * n if isinstance(value, int) else tuple(int(v) for v in value) * (n if len(value) == 1 else 1)
