"""What other packs do around sampling: run it twice, keep guiders, tile, bring their own texts."""

from __future__ import annotations

import pytest
import torch

KEY = "ip_adapter"


@pytest.fixture
def setup(small):
    texts = small.text(1), small.text(2)
    return small.apply(small.model(), small.adapter(), small.images()), texts


@pytest.fixture
def wrappers(host):
    from comfy.patcher_extension import WrappersMP

    return WrappersMP


def carried(guider) -> list[str]:
    """Kinds of prompts in the guider's conditionings."""
    entries = [entry for conditioning in guider.conds.values() for entry in conditioning]
    return [type(e["model_conds"][KEY]).__name__ for e in entries if KEY in e["model_conds"]]


@pytest.mark.parametrize("route", ["model", "conditioning"])
def test_sampling_twice_inside_one_run(small, wrappers, setup, route):
    """As AnimateDiff does when it iterates."""
    model, texts = setup
    if route == "conditioning":
        given = (*texts, small.adapter(), small.images())
        model, *texts = small.apply_conditioning(small.model(), *given)
    once = small.run(small.guider(model, *texts))
    results = []

    def twice(executor, *args, **kwargs):
        results.extend(executor(*args, **kwargs) for _ in range(2))
        return results[-1]

    outer = small.model() if route == "conditioning" else model
    outer = outer.clone()
    outer.wrappers = {k: dict(v) for k, v in model.wrappers.items()}
    slot = outer.wrappers[wrappers.OUTER_SAMPLE]
    outer.wrappers[wrappers.OUTER_SAMPLE] = {"twice": [twice], **slot}
    small.run(small.guider(outer, *texts))
    assert len(results) == 2
    assert all(torch.equal(result, once) for result in results)


@pytest.mark.parametrize("fails", [False, True])
def test_a_guider_keeps_no_prepared_prompt(small, wrappers, setup, fails):
    model, texts = setup
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

    slot = model.wrappers[wrappers.OUTER_SAMPLE]
    model.wrappers[wrappers.OUTER_SAMPLE] = {"look": [look], **slot}
    model.add_wrapper_with_key(wrappers.SAMPLER_SAMPLE, "fail", fail)
    guider = small.guider(model, *texts)
    if fails:
        with pytest.raises(InterruptedError):
            small.run(guider)
    else:
        small.run(guider)
    assert seen == [[]]


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


@pytest.mark.parametrize("given", [{}, {"latent_weights": [0.4]}], ids=["plain", "weights"])
def test_tiles_follow_the_image(small, truth, setup, given):
    """Weights per latent have no place in the picture, and need no mask."""
    _, texts = setup
    plain = small.model()
    sides = truth.sides(small.adapter(), small.images(), **given)
    expected = truth.apply(plain, small.LAYERS["sd15"], *zip(texts, sides, strict=True))
    model = small.apply(plain, small.adapter(), small.images(), **given)
    latents = []
    for m in (model, expected, plain):
        m = m.clone()
        # The truth finds rows by their text, which is repeated too.
        m.set_model_unet_function_wrapper(tiled)
        latents.append(small.run(small.guider(m, *texts), batch=1, size=16))
    truth.check(*latents)


def test_a_batch_run_in_parts_is_refused(small, setup):
    """A pack that cuts the tensors of a call cuts all but our list: no row would be right."""
    model, texts = setup

    def halves(apply_model, call):
        def part(x, i):
            return x.chunk(2)[i] if isinstance(x, torch.Tensor) else x

        out = []
        for i in range(2):
            c = {name: part(value, i) for name, value in call["c"].items()}
            out.append(apply_model(part(call["input"], i), part(call["timestep"], i), **c))
        return torch.cat(out)

    model.set_model_unet_function_wrapper(halves)
    with pytest.raises(RuntimeError, match="run on 1 of the 2 rows"):
        small.run(small.guider(model, *texts), batch=1)


def test_attention_that_a_pack_puts_in_place_of_the_hosts(small, setup, monkeypatch):
    """Some packs replace the host's function itself, after this pack was imported."""
    import comfy.ldm.modules.attention as host_attention

    model, texts = setup
    before = small.run(small.guider(model, *texts))
    original, calls = host_attention.optimized_attention, []

    def replaced(*args, **kwargs):
        calls.append(args[0].shape)
        return original(*args, **kwargs)

    monkeypatch.setattr(host_attention, "optimized_attention", replaced)
    after = small.run(small.guider(model, *texts))
    assert torch.equal(before, after)
    plain = len(calls)
    small.run(small.guider(small.model(), *texts))
    assert plain == len(calls) - plain  # as often as without an image prompt


def test_tiles_with_a_mask_are_refused(small, setup):
    _, texts = setup
    mask = torch.rand(1, 64, 64)
    model = small.apply(small.model(), small.adapter(), small.images(), mask=mask)
    model.set_model_unet_function_wrapper(tiled)
    with pytest.raises(RuntimeError, match=r"mask.*8×8"):
        small.run(small.guider(model, *texts), batch=1, size=16)


@pytest.mark.parametrize("sized", [{}, {"latent_weights": [0.3, 1.0]}], ids=["mask", "and weights"])
def test_a_sampler_that_enlarges_the_latents(small, truth, setup, sized):
    """The mask lies over the whole picture, of whatever size."""
    from comfy_extras.nodes_advanced_samplers import SamplerLCMUpscale

    _, texts = setup
    (sampler,) = SamplerLCMUpscale.execute(2.0, -1, "bilinear").args
    plain = small.model()
    mask = torch.rand(1, 40, 40, generator=torch.Generator().manual_seed(3))
    given = {"mask": mask, **sized}
    sides = truth.sides(small.adapter(), small.images(), **given)
    expected = truth.apply(plain, small.LAYERS["sd15"], *zip(texts, sides, strict=True))
    model = small.apply(plain, small.adapter(), small.images(), **given)
    latents = []
    for m in (model, expected, plain):
        torch.manual_seed(0)
        latents.append(small.run(small.guider(m, *texts), at=(0.2, 0.5, 0.7), sampler=sampler))
    assert latents[0].shape[-1] == 16
    truth.check(*latents)


def test_a_model_that_is_called_otherwise_than_a_unet(host):
    """Where there is no prompt the call goes on as it came."""
    from comfyui_ip_adapter.ip_adapter_core.comfyui import decoupled_attention as patch

    def call(*args, **kwargs):
        return args, kwargs

    given = ("x", "t", "context", 7, "attention mask"), {"transformer_options": {}}
    assert patch.inject_decoupled_attention(call, *given[0], **given[1]) == given


def test_a_patch_that_makes_more_rows_is_named(small, setup):
    model, texts = setup

    def grow(n, context, value, options):
        return tuple(x.repeat(2, 1, 1) for x in (n, context, value))

    model.set_model_attn2_patch(grow)
    with pytest.raises(RuntimeError, match="attn2 patch made 8 rows of the 4"):
        small.run(small.guider(model, *texts))


def test_a_text_that_the_guider_does_not_know_gets_the_zero_image(small, truth, setup):
    """The PerpNeg node brings its empty text past the guider."""
    from comfy_extras.nodes_perpneg import PerpNeg

    model, texts = setup
    empty = small.text(3)
    sides = truth.sides(small.adapter(), small.images())
    sides = (*sides, sides[1])
    plain = small.model()
    expected = truth.apply(plain, small.LAYERS["sd15"], *zip((*texts, empty), sides, strict=True))
    latents = []
    for m in (model, expected, plain):
        (m,) = PerpNeg.execute(m, empty, 1.0).args
        latents.append(small.run(small.guider(m, *texts)))
    truth.check(*latents)


def test_unprepared_prompts_explain_themselves(small):
    from comfy_extras.nodes_perpneg import PerpNeg

    texts = small.text(1), small.text(2)
    given = (*texts, small.adapter(), small.images())
    model, positive, negative = small.apply_conditioning(small.model(), *given)
    (model,) = PerpNeg.execute(model, negative, 1.0).args
    with pytest.raises(RuntimeError, match="does not know of it"):
        small.run(small.guider(model, positive, negative))
