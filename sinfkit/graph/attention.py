"""torch's multi-head attention as plain layers, whose channels can be followed and sliced."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["plain_attention"]


def plain_attention(root: nn.Module) -> None:
    """Replace each `nn.MultiheadAttention` in a private copy, where the numbers stay the same."""
    for parent in list(root.modules()):
        for name, module in list(parent.named_children()):
            if type(module) is nn.MultiheadAttention and module.bias_k is None:
                if not module.add_zero_attn and not _is_hooked(module):
                    plain = PlainAttention(module)
                    if _same(plain, module):
                        setattr(parent, name, plain)


class PlainAttention(nn.Module):
    """Multi-head attention of four linear layers."""

    _qkv_same_embed_dim, in_proj_bias = False, None  # encoder layers leave their fused kernel

    def __init__(self, old: nn.MultiheadAttention) -> None:
        super().__init__()
        self.num_heads, self.batch_first, self.dropout = old.num_heads, old.batch_first, old.dropout
        self.scale = old.head_dim**-0.5
        if old.in_proj_weight is not None:
            weights = list(old.in_proj_weight.detach().chunk(3))
        else:
            parts = (old.q_proj_weight, old.k_proj_weight, old.v_proj_weight)
            weights = [part.detach() for part in parts]
        biases: Any = [None] * 3 if old.in_proj_bias is None else old.in_proj_bias.chunk(3)
        made = []
        for weight, bias in zip(weights, biases, strict=True):
            out, inputs = weight.shape
            layer = nn.Linear(inputs, out, bias=bias is not None, device="meta")
            layer.weight = nn.Parameter(weight, requires_grad=old.out_proj.weight.requires_grad)
            if bias is not None:
                layer.bias = nn.Parameter(bias.detach(), layer.weight.requires_grad)
            made.append(layer)
        self.q_proj, self.k_proj, self.v_proj = made
        self.out_proj = old.out_proj
        self.train(old.training)

    def forward(
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
        """As that of `nn.MultiheadAttention`."""
        swapped = not self.batch_first and query.ndim == 3
        if swapped:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        q, k, v = (
            layer(x).unflatten(-1, (self.num_heads, -1)).transpose(-3, -2)
            for layer, x in ((self.q_proj, query), (self.k_proj, key), (self.v_proj, value))
        )
        mask = self._mask(attn_mask, key_padding_mask, q)
        p = self.dropout if self.training else 0.0
        found = F.scaled_dot_product_attention(q, k, v, mask, dropout_p=p, scale=self.scale)
        found = self.out_proj(found.transpose(-3, -2).flatten(-2))
        weights = None
        if need_weights:
            weights = q @ k.transpose(-2, -1) * self.scale
            weights = (weights if mask is None else weights + mask).softmax(-1)
            weights = weights.mean(-3) if average_attn_weights else weights
        return (found.transpose(0, 1) if swapped else found), weights

    def _mask(self, attention: Tensor | None, padding: Tensor | None, q: Tensor) -> Tensor | None:
        """Both masks as numbers to be added."""
        if attention is not None:
            attention = _added(attention, q)
            if attention.ndim == 3:  # one for each head of each sample
                attention = attention.unflatten(0, (-1, self.num_heads))
        if padding is None:
            return attention
        padding = _added(padding, q)[..., None, None, :]
        return padding if attention is None else attention + padding


def _added(mask: Tensor, like: Tensor) -> Tensor:
    """A mask of True where nothing may be seen, as numbers."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, float("-inf"))


def _is_hooked(module: nn.Module) -> bool:
    """Whether it does more than its class says."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def _same(plain: PlainAttention, old: nn.MultiheadAttention) -> bool:
    """Whether both give the same for numbers that are drawn."""
    weight = old.out_proj.weight
    generator = torch.Generator().manual_seed(0)
    widths = (layer.in_features for layer in (plain.q_proj, plain.k_proj, plain.v_proj))
    given = [torch.randn(3, 3, n, generator=generator).to(weight) for n in widths]
    was = plain.training
    plain.eval(), old.eval()
    with torch.no_grad():
        found, wanted = plain(*given), old(*given)
    plain.train(was), old.train(was)
    if weight.is_meta:
        return True
    at_most = 10 * torch.finfo(weight.dtype).eps ** 0.5
    return all(map(lambda a, b: torch.allclose(a, b, at_most, at_most), found, wanted))
