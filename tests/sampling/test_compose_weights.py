"""LoRA on the model, LoRA hooks on conditionings, and merged models."""

from __future__ import annotations

import pytest
import torch

BLOCK = "{}_blocks_{}_1_transformer_blocks_0_{}"
PLACES = [("input", 1, "attn2_to_q"), ("output", 5, "attn2_to_k"), ("input", 4, "attn1_to_v")]
WIDTHS = [(32, 32), (128, 64), (64, 64)]  # out, in


def lora(seed: int) -> dict[str, torch.Tensor]:
    """A LoRA as the common trainers save it."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for place, (out, width) in zip(PLACES, WIDTHS, strict=True):
        key = "lora_unet_" + BLOCK.format(*place)
        weights[f"{key}.lora_up.weight"] = torch.randn(out, 4, generator=generator)
        weights[f"{key}.lora_down.weight"] = torch.randn(4, width, generator=generator)
    return weights


def with_lora(small, model):
    import comfy.sd

    return comfy.sd.load_lora_for_models(model, None, lora(1), 0.5, 0.0)[0]


def merged(small, model):
    from comfy_extras.nodes_model_merging import ModelMergeSimple

    return ModelMergeSimple().merge(model, small.model("tiny", seed=1), 0.6)[0]


@pytest.mark.parametrize("change, family", [(with_lora, "sd15"), (merged, "tiny")])
def test_changed_weights_in_either_order(small, truth, change, family):
    model, adapter, images = small.model(family), small.adapter(family), small.images()
    texts = small.text(1), small.text(2)
    sides = truth.sides(adapter, images, weight=0.8)

    def run(model):
        return small.run(small.guider(model, *texts))

    bare, alone = run(model), change(small, model)
    before = run(alone)
    assert not torch.allclose(before, bare, atol=0.1), "the weights do nothing"
    expected = run(truth.apply(alone, small.LAYERS[family], *zip(texts, sides, strict=True)))
    change_first = small.apply(alone, adapter, images, weight=0.8)
    images_first = change(small, small.apply(model, adapter, images, weight=0.8))
    for patched in (change_first, images_first):
        truth.check(run(patched), expected, before)
    assert torch.equal(run(alone), before) and torch.equal(run(model), bare)


def hooks(strengths=((1.0, 0.0), (0.3, 0.4), (0.0, 0.6)), seed=1):
    """A LoRA hook whose strength changes at fractions of the schedule."""
    import comfy.hooks

    group = comfy.hooks.create_hook_lora(lora(seed), 0.6, 0.0)
    keyframes = comfy.hooks.HookKeyframeGroup()
    for strength, start in strengths:
        keyframes.add(comfy.hooks.HookKeyframe(strength=strength, start_percent=start))
    group.set_keyframes_on_hooks(keyframes)
    return group


def on_positive(text):
    return text(1, hooks=hooks()), text(2)


def on_both(text):
    group = hooks()
    return text(1, hooks=group), text(2, hooks=group)


def different(text):
    return text(1, hooks=hooks()) + text(3, hooks=hooks(seed=2)), text(2)


def with_default(text):
    """A masked region has the LoRA; the rest is the default conditioning's, which has none."""
    import comfy.hooks

    mask = torch.zeros(1, 8, 8)
    mask[..., :5] = 1
    given = [text(1, hooks=hooks(), mask=mask)], [text(3)]
    (positive,) = comfy.hooks.set_default_conds_and_combine(*given)
    return positive, text(2)


@pytest.mark.parametrize("make", [on_positive, on_both, different, with_default])
@pytest.mark.parametrize("route", ["model", "conditioning"])
def test_scheduled_lora_hooks_on_conditionings(small, truth, route, make):
    model, adapter, images = small.model("tiny"), small.adapter("tiny"), small.images()
    settings = {"start_at": 0.3, "weight": 0.8}
    positive, negative = make(small.text)
    sides = truth.sides(adapter, images, **settings)

    def run(model, *conds):
        watched, calls = small.counted(model)
        return small.run(small.guider(watched, *conds), at=(0.2, 0.4, 0.6)), calls

    bare, _ = run(model, small.text(1), small.text(2))
    before, plain_calls = run(model, positive, negative)
    assert not torch.allclose(before, bare, atol=0.1), "the hooks do nothing"
    rules = zip((positive, negative), sides, strict=True)
    expected, _ = run(truth.apply(model, small.TINY_LAYERS, *rules), positive, negative)
    if route == "model":
        patched = small.apply(model, adapter, images, **settings), positive, negative
    else:
        patched = small.apply_conditioning(model, positive, negative, adapter, images, **settings)
    found, calls = run(*patched)
    truth.check(found, expected, before)
    assert calls == plain_calls
    assert torch.equal(run(model, positive, negative)[0], before)
