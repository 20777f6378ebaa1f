"""Decoupled cross-attention against softmax written out in float64."""

from __future__ import annotations

import pytest
import torch
from comfyui_ip_adapter.ip_adapter_core.attention import add, image_attention


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def explicit(query, key, value, heads):
    parts = []
    for q, k, v in zip(*(x.double().chunk(heads, -1) for x in (query, key, value)), strict=True):
        scores = torch.einsum("blc,btc->blt", q, k) / q.shape[-1] ** 0.5
        exponentials = (scores - scores.amax(-1, keepdim=True)).exp()
        parts.append(exponentials / exponentials.sum(-1, keepdim=True) @ v)
    return torch.cat(parts, -1)


@pytest.mark.parametrize("heads, width", [(8, 320), (8, 1280), (10, 640), (20, 1280), (1, 40)])
@pytest.mark.parametrize("tokens", [1, 4, 16, 257])
def test_image_attention_is_softmax_attention(heads, width, tokens):
    query = 3 * randn(2, 12, width, seed=1)
    key, value = randn(2, tokens, width, seed=2), randn(2, tokens, width, seed=3)
    found = image_attention(query, key, value, heads)
    expected = explicit(query, key, value, heads)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_keys_and_values_of_zero_add_exactly_nothing():
    text = randn(2, 9, 32)
    zero = torch.zeros(2, 4, 32)
    assert torch.equal(add(text, image_attention(text, zero, zero, 4), None), text)


@pytest.mark.parametrize("mask", [None, randn(2, 9, 1, seed=5), randn(1, 9, 1, seed=6)])
def test_add_is_masked_and_leaves_its_inputs_alone(mask):
    text, image = randn(2, 9, 32, seed=1), randn(2, 9, 32, seed=2)
    copies = text.clone(), image.clone()
    found = add(text, image, mask)
    torch.testing.assert_close(found, text + image * (1 if mask is None else mask))
    assert torch.equal(text, copies[0]) and torch.equal(image, copies[1])


def test_gradients_reach_query_key_and_value():
    """The trainer uses these functions: neither may overwrite what backward needs."""
    query, text = (randn(2, 9, 32, seed=s).requires_grad_() for s in (1, 2))
    key, value = (randn(2, 4, 32, seed=s).requires_grad_() for s in (3, 4))
    with torch.enable_grad():
        own = image_attention(text, text, text, 4)
        add(own, image_attention(query, key, value, 4), None).sum().backward()
    assert all(x.grad is not None and x.grad.abs().sum() > 0 for x in (query, text, key, value))
