"""Layers whose weight is a sparse CSR matrix: twins of linear layers and of convolutions in two dimensions."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PLANE = 2
"""Dimensions of the only kind of convolution that torch unfolds."""


class CsrLinear(nn.Module):
    """A linear layer: weight [outputs, inputs] of CSR times rows."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = csr(layer.weight), layer.bias

    def forward(self, x: Tensor) -> Tensor:
        """[..., inputs] -> [..., outputs], as contiguous as the dense layer's."""
        rows = x.reshape(-1, x.shape[-1])
        product = (self.weight @ rows.t()).t()
        if self.bias is None:
            out = product.contiguous()
        else:
            out = torch.add(product, self.bias, out=product.new_empty(product.shape))
        return out.view(*x.shape[:-1], out.shape[-1])


class CsrConv2d(nn.Module):
    """A convolution as a product with unfolded inputs, whose columns are [channels * kernel, positions] of a sample."""

    def __init__(self, layer: nn.Conv2d) -> None:
        super().__init__()
        self.weight, self.bias = csr(layer.weight.flatten(1)), layer.bias
        assert not isinstance(layer.padding, str)
        self.kernel, self.stride, self.padding, self.dilation = (
            layer.kernel_size,
            layer.stride,
            layer.padding,
            layer.dilation,
        )

    def forward(self, x: Tensor) -> Tensor:
        """[N, channels, height, width] -> [N, outputs, ...]."""
        sides = zip(x.shape[2:], self.kernel, self.stride, self.padding, self.dilation, strict=True)
        height, width = ((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in sides)
        plain = (*self.kernel, *self.stride, *self.padding) == (1, 1, 1, 1, 0, 0)
        unfolded = x.flatten(2) if plain else F.unfold(x, self.kernel, self.dilation, self.padding, self.stride)
        columns = unfolded.transpose(0, 1).reshape(unfolded.shape[1], -1)
        product = self.weight @ columns
        if self.bias is not None:
            product += self.bias[:, None]
        out, last = product.view(-1, len(x), height, width).transpose(0, 1), torch.channels_last
        as_given = not x.is_contiguous() and x.is_contiguous(memory_format=last)
        return out.contiguous(memory_format=last if as_given else torch.contiguous_format)


def csr(weight: Tensor) -> Tensor:
    """[outputs, inputs] as a CSR tensor with indices of 32 bits, which MKL takes as they are."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls the layout a beta at its first use
        found = weight.detach().to_sparse_csr()
        rows, columns = found.crow_indices().int(), found.col_indices().int()
        return torch.sparse_csr_tensor(rows, columns, found.values(), found.shape, check_invariants=False)


def csr_twin(layer: nn.Module) -> nn.Module | None:
    """What computes the same as `layer` from a sparse weight; None where there is no such twin.

    That is of any class but nn.Linear and nn.Conv2d themselves, of grouped convolutions, of paddings with anything but
    zeros, and of other numbers than float32 and float64.
    """
    if type(layer) is nn.Linear and _takes(layer.weight):
        return CsrLinear(layer).eval()
    if type(layer) is nn.Conv2d and _takes(layer.weight):
        plain = layer.groups == 1 and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
        return CsrConv2d(layer).eval() if plain else None
    return None


def _takes(weight: Tensor) -> bool:
    return (
        type(weight) is nn.Parameter and weight.dtype in (torch.float32, torch.float64) and weight.device.type == "cpu"
    )


def why_not() -> str:
    """Why torch multiplies no sparse matrices here; empty where it does."""
    try:
        product = csr(torch.eye(2)) @ torch.ones(2, 3)
    except (RuntimeError, NotImplementedError) as error:
        return str(error).splitlines()[0]
    return "" if bool((product == 1.0).all()) else "its product of two matrices is wrong"
