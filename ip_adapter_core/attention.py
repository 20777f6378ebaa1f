"""Decoupled cross-attention (paper eq. 5) as pure functions: `Z = Attn(Q,K,V) + λ·Attn(Q,K',V')`.

λ is not here: it is linear in V' and folded into it beforehand (`packing.fold`). Called by
`comfyui/decoupled_attention.py` while ComfyUI samples, and by `training/unet.py` in training.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def image_attention(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    """`Attn(Q, K', V')`, `(B, L, C)`, for projected `query (B, L, C)`, `key, value (B, T, C)`."""
    return attend(rearrange(query, "b l (h d) -> b h l d", h=heads), key, value)


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Return the same for a query that is split into heads already, `(B, heads, L, C / heads)`."""
    k, v = (rearrange(x, "b t (h d) -> b h t d", h=query.shape[1]) for x in (key, value))
    return rearrange(scaled_dot_product_attention(query, k, v), "b h l d -> b l (h d)")


def add(text: Tensor, image: Tensor, mask: Tensor | None) -> Tensor:
    """`text + image · mask`, one kernel; `mask (B, L, 1)` or `(B, 1, 1)`; None: 1 everywhere.

    Not in place: `text` may be another pack's tensor, and training needs both for the gradient.
    """
    return text + image if mask is None else torch.addcmul(text, image, mask)
