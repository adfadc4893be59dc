"""torch's own attention where a cut left it other heads or another width than its embedding has.

``nn.MultiheadAttention`` takes the width of its heads, and their scale, from its embedding. What a cut leaves of it
becomes a subclass that takes them from its tensors, under the same names.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cut import sliced_tensor
from .groups import Channels


class SlicedAttention(nn.MultiheadAttention):
    """Attention whose heads are as wide as its tensors say.

    Attributes:
        num_heads: Those that are left.
        scale: Of the products of queries and keys: that of the whole network.
    """

    scale: float

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
        """As torch's: arguments, shapes and masks are those of ``nn.MultiheadAttention.forward``.

        Raises:
            RuntimeError: ``is_causal`` without ``attn_mask``.
        """
        if is_causal and attn_mask is None:
            raise RuntimeError("is_causal needs attn_mask")
        is_batched = query.dim() == 3
        if not is_batched:
            query, key, value = query[None], key[None], value[None]
            key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
        elif not self.batch_first:
            query, key, value = query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1)
        q, k, v = self._projected(query, key, value)
        if self.bias_k is not None and self.bias_v is not None:
            k = torch.cat([k, self.bias_k.expand(len(k), -1, -1)], 1)
            v = torch.cat([v, self.bias_v.expand(len(v), -1, -1)], 1)
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        q, k, v = (x.reshape(*x.shape[:2], self.num_heads, -1).transpose(1, 2) for x in (q, k, v))
        mask = self._mask(attn_mask, key_padding_mask, q, k)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            products = q * self.scale @ k.transpose(-2, -1)
            weights = F.dropout((products if mask is None else products + mask).softmax(-1), dropout)
            y = weights @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v, mask, dropout, scale=self.scale)
        y = self.out_proj(y.transpose(1, 2).flatten(2))
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        if not is_batched:
            return y[0], None if weights is None else weights[0]
        return y if self.batch_first else y.transpose(0, 1), weights

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        inner, packed = self.out_proj.in_features, self._parameters["in_proj_weight"]
        if packed is not None:
            narrow = (len(packed) - inner) // 2
            weights: Any = torch.split(packed, [narrow, narrow, inner])
        else:
            weights = self.q_proj_weight, self.k_proj_weight, self.v_proj_weight
        sizes = [len(weight) for weight in weights]
        bias = self._parameters["in_proj_bias"]
        biases: Any = [None] * 3 if bias is None else torch.split(bias, sizes)
        return [F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True)]

    def _mask(self, attn_mask: Tensor | None, padding: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
        """To add to the products, ``[n or 1, heads or 1, queries, keys]``."""
        found: Tensor | None = None
        if attn_mask is not None:
            per_head = attn_mask.dim() == 3 and len(attn_mask) > 1
            shape = (len(q), self.num_heads, *attn_mask.shape[1:]) if per_head else (1, 1, *attn_mask.shape[-2:])
            found = _additive(attn_mask, q.dtype).reshape(shape)
        if padding is not None:
            hidden = _additive(padding, q.dtype)[:, None, None]
            more = 0 if found is None else found.shape[-1] - hidden.shape[-1]
            found = hidden if found is None else found + F.pad(hidden, (0, more))
        return None if found is None else F.pad(found, (0, k.shape[-2] - found.shape[-1]))


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype is not torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -torch.inf)


def slice_attentions(module: nn.Module, channels: Channels, kept: Tensor) -> None:
    """Make what is left of torch's attentions, whose tensors are sliced already, a ``SlicedAttention``.

    Args:
        kept: bool over all channels.
    """
    for path, part in module.named_modules():
        if isinstance(part, nn.MultiheadAttention):
            _slice(part, f"{path}." if path else "", channels, kept)
    for part in module.modules():
        # A nested tensor needs the fast path of torch's class.
        if isinstance(part, nn.TransformerEncoder) and any(isinstance(m, SlicedAttention) for m in part.modules()):
            part.use_nested_tensor = False


def _slice(part: nn.MultiheadAttention, prefix: str, channels: Channels, kept: Tensor) -> None:
    name = f"{prefix}out_proj.weight"
    if name not in channels.weights:
        return
    whole = channels.module.get_parameter(name).shape
    places = torch.arange(whole[1]).expand(whole)
    columns = sliced_tensor(channels, kept, name, places)[0]
    rows = sum(len(w) for name, w in part.named_parameters() if name.endswith("proj_weight"))
    if part.out_proj.weight.shape == whole and rows == 3 * part.embed_dim:
        return
    if not isinstance(part, SlicedAttention):
        part.__class__ = SlicedAttention
        vars(part)["scale"] = 1 / math.sqrt(part.head_dim)
    part.num_heads = len((columns // (whole[1] // part.num_heads)).unique())
    part.head_dim = len(columns) // part.num_heads
    part.embed_dim = len(part.out_proj.weight)
    part._qkv_same_embed_dim = False  # torch's layers go by it before they leave this class's forward out
