"""Other packs in the same attention slots: both act, whoever came first, none is overwritten."""

from __future__ import annotations

import pytest
import torch

from tests.support.sets import nightly


@pytest.fixture(params=["sd15", *nightly("sdxl")])
def family(request):
    return request.param


def some(layers):
    """Places that the other pack patches: not all, so that both cases lie side by side."""
    return [key for key, _ in layers][::2]


def scaled(q, k, v, options):
    from comfy.ldm.modules.attention import optimized_attention

    return 0.5 * optimized_attention(q, k, v, options["n_heads"])


def replace_3(model, layers):
    for key in some(layers):
        model.set_model_attn2_replace(scaled, *key)


def replace_2(model, layers):
    """Under (side, number): for every transformer of the block."""
    for key in some(layers):
        model.set_model_attn2_replace(scaled, *key[:2])


def replace_2_and_3(model, layers):
    """The longer key counts where both are there."""
    replace_2(model, layers)
    for key in some(layers)[::2]:
        model.set_model_attn2_replace(lambda q, k, v, options: 2 * q, *key)


def change_inputs(model, layers):
    model.set_model_attn2_patch(lambda n, context, value, options: (n * 0.7, context, value * 1.2))


def change_output(model, layers):
    model.set_model_attn2_output_patch(lambda n, options: n * 0.8 + 0.1)


def override(model, layers):
    """The host's own hook for other implementations of attention."""

    def attention(function, *args, **kwargs):
        return 0.5 * function(*args, **kwargs)

    model.model_options["transformer_options"]["optimized_attention_override"] = attention


FOREIGN = [replace_3, replace_2, replace_2_and_3, change_inputs, change_output, override]


@pytest.mark.parametrize("foreign", FOREIGN, ids=lambda f: f.__name__)
def test_order_does_not_matter(small, truth, family, foreign):
    model, adapter, images = small.model(family), small.adapter(family), small.images()
    layers, texts = small.LAYERS[family], (small.text(1), small.text(2))
    settings = {"weight": 0.8, "mask": torch.rand(1, 8, 8), "start_at": 0.4}
    sides = truth.sides(adapter, images, **settings)

    def run(model):
        return small.run(small.guider(model, *texts))

    alone = model.clone()
    foreign(alone, layers)
    before = run(alone)
    assert not torch.allclose(before, run(model), atol=0.1), "the other pack does nothing"
    expected = run(truth.apply(alone, layers, *zip(texts, sides, strict=True)))
    after_it = small.apply(alone, adapter, images, **settings)
    before_it = small.apply(model, adapter, images, **settings)
    foreign(before_it, layers)
    results = [run(m) for m in (after_it, before_it)]
    assert torch.equal(*results)
    truth.check(results[0], expected, before)
    assert torch.equal(run(alone), before)


@pytest.mark.parametrize("number", [0, 1, 2, None], ids=["query", "key", "value", "cached"])
def test_what_a_patch_returns_is_not_changed(small, number):
    model, held = small.model(), []

    def foreign(q, k, v, options):
        if number is None:
            out = held[0][0] if held and held[0][0].shape == q.shape else torch.randn_like(q)
        else:
            out = (q, k, v)[number][:, : q.shape[1]]
        held.append((out, out.clone()))
        return out

    # A block of 4 tokens, where key and value are long enough to be returned as they are.
    model.set_model_attn2_replace(foreign, "output", 4, 0)
    patched = small.apply(model, small.adapter(), small.images())
    small.run(small.guider(patched, small.text(1), small.text(2)), size=16)
    assert len(held) == 2
    assert all(torch.equal(out, copy) for out, copy in held)


def test_what_an_attention_override_returns_is_not_changed(small):
    model, held = small.model(), []

    def attention(function, *args, **kwargs):
        out = function(*args, **kwargs)
        held.append((out, out.clone()))
        return out

    model.model_options["transformer_options"]["optimized_attention_override"] = attention
    patched = small.apply(model, small.adapter(), small.images())
    small.run(small.guider(patched, small.text(1), small.text(2)))
    assert held
    assert all(torch.equal(out, copy) for out, copy in held)
