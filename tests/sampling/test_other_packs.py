"""What other packs do around sampling: run it twice, keep guiders, tile, bring their own texts."""

from __future__ import annotations

import pytest
import torch

KEY = "ip_adapter"


@pytest.fixture
def patched(small):
    return small.apply(small.model("tiny"), small.adapter("tiny"), small.images())


@pytest.fixture
def wrappers(host):
    from comfy.patcher_extension import WrappersMP

    return WrappersMP


def carried(guider) -> list[str]:
    """Kinds of prompts in the guider's conditionings."""
    entries = [entry for conditioning in guider.conds.values() for entry in conditioning]
    return [type(e["model_conds"][KEY]).__name__ for e in entries if KEY in e["model_conds"]]


@pytest.mark.parametrize("route", ["model", "conditioning"])
def test_sampling_twice_inside_one_run(small, wrappers, route):
    """As AnimateDiff does when it iterates."""
    given = small.model("tiny"), small.adapter("tiny"), small.images()
    model, *texts = small.applied(route, *given)
    once, results = small.sample(model, *texts), []

    def twice(executor, *args, **kwargs):
        results.extend(executor(*args, **kwargs) for _ in range(2))
        return results[-1]

    slot = model.wrappers[wrappers.OUTER_SAMPLE]
    model.wrappers[wrappers.OUTER_SAMPLE] = {"twice": [twice], **slot}
    small.sample(model, *texts)
    assert len(results) == 2
    assert all(torch.equal(result, once) for result in results)


@pytest.mark.parametrize("fails", [False, True])
def test_a_guider_keeps_no_prepared_prompt(small, wrappers, patched, fails):
    seen = []

    def look(executor, *args, **kwargs):
        try:
            return executor(*args, **kwargs)
        finally:
            seen.append(carried(executor.class_obj))

    def fail(executor, *args, **kwargs):
        assert carried(guider) == ["PromptRows"] * 2
        if fails:
            raise InterruptedError
        return executor(*args, **kwargs)

    slot = patched.wrappers[wrappers.OUTER_SAMPLE]
    patched.wrappers[wrappers.OUTER_SAMPLE] = {"look": [look], **slot}
    patched.add_wrapper_with_key(wrappers.SAMPLER_SAMPLE, "fail", fail)
    guider = small.guider(patched, small.text(1), small.text(2))
    if fails:
        with pytest.raises(InterruptedError):
            small.run(guider)
    else:
        small.run(guider)
    assert seen == [[]]


def with_unet_wrapper(function):
    def change(model):
        clone = model.clone()
        clone.set_model_unet_function_wrapper(function)
        return clone

    return change


@with_unet_wrapper
def tiled(apply_model, call):
    """Four quarters as one batch; tensors are repeated to it, as tiling packs do."""
    x, c = call["input"], dict(call["c"])
    h, w = (side // 2 for side in x.shape[-2:])
    tiles = torch.cat([x[..., a : a + h, b : b + w] for a in (0, h) for b in (0, w)])
    for name, value in c.items():
        if isinstance(value, torch.Tensor):
            c[name] = value.repeat(4, *[1] * (value.ndim - 1))
    out = apply_model(tiles, call["timestep"].repeat(4), **c).chunk(4)
    return torch.cat([torch.cat(out[:2], -1), torch.cat(out[2:], -1)], -2)


@with_unet_wrapper
def in_halves(apply_model, call):
    def part(x, i):
        return x.chunk(2)[i] if isinstance(x, torch.Tensor) else x

    out = []
    for i in range(2):
        c = {name: part(value, i) for name, value in call["c"].items()}
        out.append(apply_model(part(call["input"], i), part(call["timestep"], i), **c))
    return torch.cat(out)


@pytest.mark.parametrize("given", [{}, {"latent_weights": [0.4]}], ids=["plain", "weights"])
def test_tiles_follow_the_image(comparison, given):
    """Weights per latent have no place in the picture, and need no mask."""
    # The truth finds rows by their text, which is repeated too.
    comparison().on_model(**given).check(change=tiled, batch=1, size=16)


def test_tiles_with_a_mask_are_refused(small):
    given = small.model("tiny"), small.adapter("tiny"), small.images()
    model = small.apply(*given, mask=torch.rand(1, 64, 64))
    with pytest.raises(RuntimeError, match=r"mask.*8×8"):
        small.sample(tiled(model), batch=1, size=16)


def test_a_batch_run_in_parts_is_refused(small, patched):
    """A pack that cuts the tensors of a call cuts all but our list: no row would be right."""
    with pytest.raises(RuntimeError, match="run on 1 of the 2 rows"):
        small.sample(in_halves(patched), batch=1)


def test_attention_that_a_pack_puts_in_place_of_the_hosts(small, patched, monkeypatch):
    """Some packs replace the host's function itself, after this pack was imported."""
    import comfy.ldm.modules.attention as host_attention

    before = small.sample(patched)
    original, calls = host_attention.optimized_attention, []

    def replaced(*args, **kwargs):
        calls.append(args[0].shape)
        return original(*args, **kwargs)

    monkeypatch.setattr(host_attention, "optimized_attention", replaced)
    assert torch.equal(before, small.sample(patched))
    with_images = len(calls)
    small.sample(small.model("tiny"))
    assert 0 < with_images == len(calls) - with_images  # as often as without an image prompt


@pytest.mark.parametrize("sized", [{}, {"latent_weights": [0.3, 1.0]}], ids=["mask", "and weights"])
def test_a_sampler_that_enlarges_the_latents(comparison, enlarging, sized):
    """The mask lies over the whole picture, of whatever size."""
    compared = comparison(family="sd15").on_model(mask=torch.rand(1, 40, 40), **sized)
    found, _, _ = compared.check(at=(0.2, 0.5, 0.7), sampler=enlarging)
    assert found.shape[-1] == 16


def test_a_model_that_is_called_otherwise_than_a_unet(host):
    """Where there is no prompt the call goes on as it came."""
    from comfyui_ip_adapter.ip_adapter_core.comfyui import decoupled_attention as patch

    def call(*args, **kwargs):
        return args, kwargs

    given = ("x", "t", "context", 7, "attention mask"), {"transformer_options": {}}
    assert patch.inject_decoupled_attention(call, *given[0], **given[1]) == given


def test_unprepared_prompts_explain_themselves(small, empty_text):
    given = small.model("tiny"), small.adapter("tiny"), small.images()
    model, positive, negative = small.applied("conditioning", *given)
    with pytest.raises(RuntimeError, match="does not know of it"):
        small.sample(empty_text(model, negative), positive, negative)
