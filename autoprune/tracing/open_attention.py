"""torch.nn.MultiheadAttention whose forward goes by the shapes of its weights, so that heads may be removed of it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class OpenAttention(nn.MultiheadAttention):
    """The same parameters under the same names, in calls that can be watched; `num_heads` of any number, one head_dim.

    Torch's own forward derives all sizes from the width of its inputs, and in eval mode runs as one closed operation.
    """

    def forward(  # the arguments of torch's own
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As torch.nn.MultiheadAttention.forward; `is_causal` is a hint that `attn_mask` says so."""
        single = query.dim() == 2
        q, k, v = self._projected(query, key, value)
        if single:
            q, k, v = (t[None] for t in (q, k, v))
        elif not self.batch_first:
            q, k, v = (t.transpose(0, 1) for t in (q, k, v))
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in (q, k, v))
        mask = _joined_mask(q, key_padding_mask, attn_mask)
        dropped = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = q @ k.mT * q.shape[-1] ** -0.5
            weights = (scores if mask is None else scores + mask).softmax(-1)
            out = F.dropout(weights, dropped, self.training) @ v
        else:
            out = F.scaled_dot_product_attention(q, k, v, mask, dropped)
        out = out.transpose(1, 2).flatten(2)
        out = self.out_proj(out[0] if single else out if self.batch_first else out.transpose(0, 1))
        if weights is None:
            return out, None
        weights = weights.mean(1) if average_attn_weights else weights
        return out, weights[0] if single else weights

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        weight, bias = self.in_proj_weight, self.in_proj_bias
        if query is key and key is value:
            return F.linear(query, weight, bias).chunk(3, -1)
        weights = weight.chunk(3)
        biases = (None,) * 3 if bias is None else bias.chunk(3)
        return tuple(F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True))


def open_attentions(model: nn.Module) -> nn.Module:
    """Give every plain MultiheadAttention in `model` the forward of OpenAttention, in place.

    Those with keys of other widths or with extra keys stay as they are.
    """
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False  # it would look into its layers for that
        if type(module) is nn.MultiheadAttention and is_plain(module):
            module.__class__ = OpenAttention
            module._qkv_same_embed_dim = False  # torch's encoder layers then call it instead of going round it
    return model


def is_plain(module: nn.MultiheadAttention) -> bool:
    """Whether one weight makes queries, keys and values, and nothing is added to them."""
    return module.in_proj_weight is not None and module.bias_k is None and not module.add_zero_attn


def _joined_mask(q: Tensor, padding: Tensor | None, mask: Tensor | None) -> Tensor | None:
    """Both masks as one that is added to scores [N, heads, L, S]; one of [N * heads, L, S] keeps its heads."""
    found = None
    if mask is not None:
        found = _added(mask, q.dtype)
        if found.dim() == 3:
            found = found.unflatten(0, (q.shape[0], -1))
    if padding is not None:
        barred = _added(padding, q.dtype).view(q.shape[0], 1, 1, -1)
        found = barred if found is None else found + barred
    return found


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, float("-inf"))
