"""Image prompts on Flux while it is sampled: settings, rows, other packs, what is left behind."""

from __future__ import annotations

import copy
from unittest.mock import patch

import pytest
import torch
from einops import rearrange
from torch.nn.functional import scaled_dot_product_attention

KINDS = ["xlabs", "instantx"]


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def adapter(flux, kind):
    return flux.adapter(flux.FILES[kind]())


def close(found, expected, tolerance=1e-4):
    return float((found - expected).abs().max()) <= tolerance * float(expected.abs().max())


@pytest.fixture
def applied(flux, adapter):
    def applied(model=None, prompt=None, **settings):
        given = model or flux.model(), adapter, prompt or flux.images()
        return flux.small.apply(*given, **settings)

    return applied


@pytest.mark.parametrize("size", [(8, 12), (7, 9)])
def test_nothing_happens_where_nothing_is_asked(flux, applied, size):
    """λ 0, outside the window, a black mask: the latents of the bare model, to the bit."""
    bare, given = flux.model(), {"cfg": 2.0, "size": size}
    expected = flux.sample(bare, **given)
    assert applied(bare, weight=0.0) is bare
    for settings in (
        {"start_at": 0.7},
        {"mask": torch.zeros(1, 8, 8)},
        {"latent_weights": [0.0]},
    ):
        assert torch.equal(flux.sample(applied(bare, **settings), **given), expected)
    assert not close(flux.sample(applied(bare), **given), expected, 0.01)


def test_a_window_ends(flux, applied):
    """At each step what is in force there: the run is the runs of its steps, one after another."""
    patched = applied(end_at=0.5)
    first = flux.sample(patched, at=(0.2,))
    assert torch.equal(first, flux.sample(applied(), at=(0.2,)))
    assert not torch.equal(first, flux.sample(flux.model(), at=(0.2,)))
    last = {"at": (0.6,)}
    assert torch.equal(flux.sample(patched, **last), flux.sample(flux.model(), **last))


def test_no_more_calls_and_nothing_left_behind(flux, applied):
    seen = []
    for model in (flux.model(), applied(mask=torch.rand(1, 8, 8))):
        counted, calls = flux.small.counted(model)
        flux.sample(counted, cfg=2.0)
        seen.append(calls)
        options = model.model_options["transformer_options"]
        assert not options.get("patches") and not options.get("patches_replace")
    assert seen[0] == seen[1]


def test_one_image_a_latent(flux, applied):
    two = flux.images(2)
    found = flux.sample(applied(prompt=two, combine="per_latent"), cfg=2.0)
    for i in (0, 1):
        features = flux.ImageFeatures(
            two.positive.image_embeds[i : i + 1], two.positive.penultimate_hidden_states[i : i + 1]
        )
        one = flux.ImagePrompt(features, two.negative, two.encoder, black=two.black)
        alone = flux.sample(applied(prompt=one), cfg=2.0)
        assert close(found[i], alone[i])
        assert not close(found[1 - i], alone[1 - i], 0.01)


def test_masks_and_weights_of_each_latent(flux, applied):
    """A number for the whole picture counts for the text's rows too."""
    halved = flux.sample(applied(weight=0.5))
    for settings in ({"mask": torch.full((1, 4, 4), 0.5)}, {"latent_weights": [0.5]}):
        assert close(flux.sample(applied(**settings)), halved)
    each = flux.sample(applied(latent_weights=[0.5, 1.0]))
    assert close(each[0], halved[0]) and close(each[1], flux.sample(applied())[1])


def test_regions(flux, adapter):
    """The node of regions is as many prompts, each with its mask."""
    from comfyui_ip_adapter.nodes.apply import ApplyIPAdapterRegions

    left, prompts = torch.zeros(1, 8, 12), (flux.images(seed=1), flux.images(seed=2))
    left[..., :6] = 1
    masks = left, 1 - left
    expected = flux.model()
    for prompt, mask in zip(prompts, masks, strict=True):
        expected = flux.small.apply(expected, adapter, prompt, mask=mask)
    made = ApplyIPAdapterRegions.execute(
        model=flux.model(),
        adapter=adapter,
        image_prompts={f"image_prompt{i}": prompt for i, prompt in enumerate(prompts)},
        masks={f"mask{i}": mask for i, mask in enumerate(masks)},
        overlap="normalize",
        **flux.small.knobs(),
    ).args[0]
    assert close(flux.sample(made), flux.sample(expected))
    assert not close(flux.sample(made), flux.sample(flux.model()), 0.01)


def test_conditionings_that_carry_a_prompt(flux, adapter, kind):
    """One of two texts has it: the same as a model with it, and one without, evaluated apart."""
    from nodes import ConditioningCombine

    with_it, without = flux.text(1), flux.text(3)
    given = flux.model(), with_it, flux.text(2), adapter, flux.images()
    model, carrying, negative = flux.small.apply_conditioning(*given)
    both = ConditioningCombine().combine(carrying, without)[0]
    found = flux.sample(model, both, negative, cfg=3.0, at=(0.4,))
    patched = flux.small.apply(flux.model(), adapter, flux.images())
    of_prompt = flux.sample(patched, with_it, flux.text(2), at=(0.4,))
    of_text = flux.sample(flux.model(), without, flux.text(2), at=(0.4,))
    against = flux.sample(model, negative, negative, at=(0.4,))
    # InstantX's has nothing on the other side, XLabs' a black picture.
    bare = flux.sample(flux.model(), flux.text(2), flux.text(2), at=(0.4,))
    assert torch.equal(against, bare) is (kind == "instantx")
    positive = (of_prompt + of_text) / 2
    assert close(found, against + 3.0 * (positive - against))


def other_pack(seen):
    """A pack that stands in a block's slot, and changes what the block gives."""

    def replaced(given, more):
        seen.append(given["transformer_options"]["block_index"])
        out = more["original_block"](given)
        return {**out, "img": 1.01 * out["img"]}

    return replaced


@pytest.mark.parametrize("block", ["double_block", "single_block"])
def test_another_pack_in_a_blocks_slot(flux, applied, block):
    """In either order both act, each as it does alone."""
    found = []
    for first in (True, False):
        seen, model = [], flux.model()
        if first:
            model = applied(model)
        model = model.clone()
        model.set_model_patch_replace(other_pack(seen), "dit", block, 1)
        if not first:
            model = applied(model)
        found.append(flux.sample(model, at=(0.4,)))
        assert seen == [1]
    assert torch.equal(*found)
    alone = flux.model().clone()
    alone.set_model_patch_replace(other_pack([]), "dit", block, 1)
    assert not close(found[0], flux.sample(alone, at=(0.4,)), 0.01)
    assert not close(found[0], flux.sample(applied(), at=(0.4,)), 1e-3)


def test_a_pack_that_leaves_blocks_out(flux, adapter, kind):
    """As caches of earlier steps do: where the block does not run, no image's part is added."""
    every, kept, model = len(adapter.spec.layer_dims), {}, flux.model().clone()

    def cached(given, more):
        if "out" not in kept:
            kept["out"] = {k: x.clone() for k, x in more["original_block"](given).items()}
        return {k: x.clone() for k, x in kept["out"].items()}

    model.set_model_patch_replace(cached, "dit", "double_block", 0)
    given = {"batch": 1, "at": (0.3,)}
    flux.sample(model, **given)  # what the block gives without an image
    others = [0.0, *[1.0] * (every - 1)]
    found, expected = (
        flux.sample(flux.small.apply(model, adapter, flux.images(), **weights), **given)
        for weights in ({}, {"layer_weights": others})
    )
    assert torch.equal(found, expected)
    assert not close(found, flux.sample(model, **given), 0.01)


def test_options_that_are_copied_deeply(flux, applied):
    """As packs do at every step: no weight is copied, and the image stays."""
    patched, given = applied(), {"cfg": 2.0, "at": (0.4,)}
    expected, seen = flux.sample(patched, **given), []
    inner = patched.model.diffusion_model

    def wrapper(call, told):
        options = copy.deepcopy(told["c"]["transformer_options"])
        seen.append(options["ip_adapter.blocks"].transformer is inner)
        return call(
            told["input"], told["timestep"], **{**told["c"], "transformer_options": options}
        )

    copying = patched.clone()
    copying.set_model_unet_function_wrapper(wrapper)
    assert torch.equal(flux.sample(copying, **given), expected) and all(seen)


def test_a_clone_of_the_model_on_another_device(flux, applied):
    """Whose blocks are others than those of the model that the run began with."""
    patched, given = applied(), {"at": (0.4,)}
    expected = flux.sample(patched, **given)
    model = patched.model
    clone = copy.deepcopy(model.diffusion_model)

    def wrapper(call, told):
        with patch.object(model, "diffusion_model", clone):
            return call(told["input"], told["timestep"], **told["c"])

    cloned = patched.clone()
    cloned.set_model_unet_function_wrapper(wrapper)
    assert torch.equal(flux.sample(cloned, **given), expected)


class AllInOne(torch.nn.Module):
    """A pack's block that runs all others one after another, by itself: it tells them nothing."""

    def __init__(self, model, options):
        super().__init__()
        self.first, self.rest, self.options = model.double_blocks, model.single_blocks, options

    def forward(self, img, txt, **more):
        if not self.options:
            more.pop("transformer_options", None)
        for block in self.first:
            img, txt = block(img, txt, **more)
        both = torch.cat([txt, img], dim=1)
        for block in self.rest:
            both = block(both, **more)
        return both[:, txt.shape[1] :], txt


@pytest.mark.parametrize("options", [True, False], ids=["with options", "without"])
def test_a_pack_that_runs_the_blocks_itself(flux, applied, options):
    """Caches of blocks do: every block gets its own image's part nevertheless."""
    patched, at = applied(mask=torch.rand(1, 8, 12)), {"at": (0.3, 0.6), "cfg": 2.0}
    expected = flux.sample(patched, **at)
    inner = patched.model.diffusion_model
    blocks = [*inner.double_blocks, *inner.single_blocks]
    before = [vars(block).keys() for block in blocks]
    one = torch.nn.ModuleList([AllInOne(inner, options)])

    def wrapper(call, given):
        with (
            patch.object(inner, "double_blocks", one),
            patch.object(inner, "single_blocks", torch.nn.ModuleList()),
        ):
            return call(given["input"], given["timestep"], **given["c"])

    wrapped = patched.clone()
    wrapped.set_model_unet_function_wrapper(wrapper)
    assert close(flux.sample(wrapped, **at), expected)
    assert [vars(block).keys() for block in blocks] == before


def test_a_pack_with_a_loop_of_its_own(flux, applied):
    """As TeaCache's is, which hands blocks no options."""
    patched, at = applied(), {"at": (0.3,), "cfg": 2.0}
    expected = flux.sample(patched, **at)
    inner, first = patched.model.diffusion_model, type(patched.model.diffusion_model).forward_orig

    def forward_orig(img, *args, **more):
        return first(inner, img, *args, **{**more, "transformer_options": {}})

    def wrapper(call, given):
        with patch.object(inner, "forward_orig", forward_orig):
            return call(given["input"], given["timestep"], **given["c"])

    wrapped = patched.clone()
    wrapped.set_model_unet_function_wrapper(wrapper)
    assert close(flux.sample(wrapped, **at), expected)


def test_patches_of_attention_by_others_stay(flux, applied):
    calls, model = [], flux.model().clone()

    def see(q, k, v, **more):
        calls.append("before")
        return {}

    def halve(attention, options):
        calls.append("after")
        return 0.5 * attention

    model.set_model_patch(see, "attn1_patch")
    model.set_model_patch(halve, "attn1_output_patch")
    bare = flux.sample(model, at=(0.4,))
    assert calls == ["before", "after"] * 7
    assert not close(flux.sample(applied(model), at=(0.4,)), bare, 0.01)
    assert len(calls) == 2 * 14


WINDOW = {"start_at": 0.35, "end_at": 0.5}


@pytest.mark.parametrize("window", [{}, pytest.param(WINDOW, marks=pytest.mark.nightly)])
def test_traced_in_one_piece(flux, applied, traced, window):
    from torch._dynamo.utils import counters

    patched, at = applied(mask=torch.rand(1, 8, 12), **window), (0.3, 0.4, 0.6)
    compiled = traced(patched)
    found, expected = (flux.sample(m, at=at) for m in (compiled, patched))
    assert close(found, expected)
    graphs = 2 if window else 1
    assert counters["stats"]["unique_graphs"] == graphs and not counters["graph_break"]
    flux.sample(compiled, at=at)
    assert counters["stats"]["unique_graphs"] == graphs


def test_heat_maps(flux, applied):
    """Where a mask lets the image act, in patches; the picture stays the same to the bit."""
    from comfyui_ip_adapter.ip_adapter_core.comfyui.record import recording

    left = torch.zeros(1, 8, 12)
    left[..., :6] = 1
    patched = applied(mask=left)
    watched, record = recording(patched)
    samples = flux.sample(watched, cfg=2.0)
    assert torch.equal(samples, flux.sample(patched, cfg=2.0))
    run = record.of(samples)
    heat = run.heat([("all", None)], 0, 1, 0)
    assert heat.shape == (2, 8, 12)
    assert heat[..., :4].mean() > 0.05 and heat[..., 9:].abs().max() < 1e-6
    assert {share.block[0] for share in run.shares} >= {"double"}


def test_heat_maps_of_both_kinds_at_once(flux):
    """Each in its own half, by its number; a block that both act on is seen for both."""
    from comfyui_ip_adapter.ip_adapter_core.comfyui.record import recording

    left = torch.zeros(1, 8, 12)
    left[..., :6] = 1
    model = flux.model()
    for kind, mask in (("instantx", left), ("xlabs", 1 - left)):
        model = flux.small.apply(model, flux.adapter(flux.FILES[kind]()), flux.images(), mask=mask)
    watched, record = recording(model)
    samples = flux.sample(watched, cfg=2.0)
    run = record.of(samples)
    first, second, both = (run.heat([("all", None)], 0, 1, number) for number in (1, 2, 0))
    for heat, here, there in (
        (first, slice(0, 3), slice(9, 12)),
        (second, slice(9, 12), slice(0, 3)),
    ):
        assert heat[..., here].mean() > 0.05 and heat[..., there].abs().max() < 1e-6
        assert (both[..., here] > 0.01).all()
    assert {share.block for share in run.shares} == {
        *(("double", n) for n in range(3)),
        *(("single", n) for n in range(4)),
    }


def test_what_rows_take(flux, kind, applied):
    """The model's precision, before and while sampling."""
    from comfyui_ip_adapter.ip_adapter_core.comfyui.layers import KEY

    patched = applied(flux.model(dtype=torch.bfloat16))
    (positive, negative), *_ = patched.get_attachment(KEY)
    layers = {"xlabs": 3, "instantx": 7}[kind]
    tokens = {"xlabs": 4, "instantx": 6}[kind]
    packed = positive.packed.tensor
    assert packed.dtype == torch.bfloat16 and packed.shape == (1, tokens, 2 * layers * flux.WIDTH)
    assert (negative is None) is (kind == "instantx")
    at = {"at": (0.4,)}
    errors = [
        float((flux.sample(half, **at).float() - flux.sample(exact, **at)).abs().mean())
        for half, exact in (
            (patched, applied()),
            (flux.model(dtype=torch.bfloat16), flux.model()),
        )
    ]
    assert 0 < errors[0] < 2 * errors[1]


def test_room_beside_an_adapter(flux, kind, applied, small, monkeypatch):
    """A weight is cast to float32 beside it: the host is asked to keep room for the largest."""
    from comfy import model_management

    asked, load = [], model_management.load_models_gpu

    def watched(models, *args, **kwargs):
        asked.append(kwargs.get("memory_required"))
        return load(models, *args, **kwargs)

    monkeypatch.setattr(model_management, "load_models_gpu", watched)
    applied()
    assert asked == [4 * max(x.numel() for x in flux.FILES[kind]().values())]
    small.apply(small.model("tiny"), small.adapter("tiny"), small.images())
    assert asked[1:] == [None]


def test_weights_of_eight_bits(flux, applied):
    """Stored so, and calculated with as float32: as a model of the same weights in float32."""
    eight = flux.model(dtype=torch.float8_e4m3fn, cast=torch.float32)
    plain = flux.model(flux.Size(text=flux.TEXT, axes=flux.AXES, head=flux.HEAD))
    before = {k: x.clone() for k, x in plain.model.diffusion_model.state_dict().items()}
    rounded = {k: x.float() for k, x in eight.model.diffusion_model.state_dict().items()}
    try:
        plain.model.diffusion_model.load_state_dict(rounded)
        assert close(flux.sample(applied(eight)), flux.sample(applied(plain)))
    finally:
        plain.model.diffusion_model.load_state_dict(before)


def test_chroma(flux, kind):
    """Beside hooks of torch on Chroma's own modules, which add the formula's part."""
    state, prompt = flux.FILES[kind](flux.REAL_DEPTH), flux.images()
    model = flux.chroma()
    patched = flux.small.apply(model, flux.adapter(state), prompt, weight=0.8)
    found, bare = (flux.sample(m, at=(0.4,)) for m in (patched, model))
    inner, tokens = model.model.diffusion_model, flux.tokens_of(state, prompt.positive.image_embeds)
    hooks, query = [], {}

    def attended(number, q):
        k, v = (
            torch.nn.functional.linear(
                tokens,
                state[f"ip_adapter.{number}.to_{c}_ip.weight"],
                state.get(f"ip_adapter.{number}.to_{c}_ip.bias"),
            )
            for c in "kv"
        )
        k, v = (rearrange(x, "b t (h d) -> b h t d", h=flux.HEADS) for x in (k, v))
        if kind == "instantx":
            k = k * torch.rsqrt(k.pow(2).mean(-1, keepdim=True) + 1e-5)
        k, v = (x.expand(len(q), -1, -1, -1) for x in (k, v))
        return 0.8 * rearrange(scaled_dot_product_attention(q, k, v), "b h l d -> b l (h d)")

    def hook(module, function):
        hooks.append(module.register_forward_hook(function))

    def before(module, function):
        hooks.append(module.register_forward_pre_hook(function))

    for i, block in enumerate(inner.double_blocks):
        hook(block.img_attn.norm, lambda m, a, out: query.update(q=out[0]))
        if kind == "xlabs":
            hook(block, lambda m, a, out, i=i: (out[0] + attended(i, query["q"]), out[1]))
        else:
            inside = lambda m, a, i=i: (a[0] + attended(i, query["q"]),)  # noqa: E731
            before(block.img_attn.proj, inside)
    for i, block in enumerate(inner.single_blocks if kind == "instantx" else ()):
        hook(block.norm, lambda m, a, out: query.update(q=out[0]))

        def joined(m, a, i=i):
            part = attended(19 + i, query["q"])
            return (torch.cat([a[0][..., : flux.WIDTH] + part, a[0][..., flux.WIDTH :]], -1),)

        before(block.linear2, joined)
    try:
        expected = flux.sample(model, at=(0.4,))
    finally:
        for each in hooks:
            each.remove()
    assert close(found, expected) and not close(found, bare, 0.01)
