"""Other nodes and packs on the same model: both act, whoever came first, none is overwritten."""

from __future__ import annotations

import importlib

import pytest
import torch

from tests.support.sets import nightly

SIZE = 16
NODES = {  # of the host, by module and class, with their settings
    "freelunch.FreeU": (1.1, 1.2, 0.9, 0.2),
    "freelunch.FreeU_V2": (1.3, 1.4, 0.9, 0.2),
    "hypertile.HyperTile": (64, 2, 1, False),
    "tomesd.TomePatchModel": (0.5,),
    "differential_diffusion.DifferentialDiffusion": (1.0,),
    # To 5 × 5 where a mask has 8 × 8 and 4 × 4.
    "model_downscale.PatchModelAddDownscale": (3, 1.6, 0.0, 0.5, True, "bicubic", "bicubic"),
    "model_advanced.RescaleCFG": (0.7,),
}


def through(name):
    """A function that sends a model through that node."""

    def change(model, layers):
        module, node = name.split(".")
        node = getattr(importlib.import_module(f"comfy_extras.nodes_{module}"), node)
        execute = node.execute if hasattr(node, "execute") else node().patch
        out = execute(model, *NODES[name])
        return getattr(out, "args", out)[0]  # some nodes return a plain tuple

    return change


def scaled(q, k, v, options):
    from comfy.ldm.modules.attention import optimized_attention

    return 0.5 * optimized_attention(q, k, v, options["n_heads"])


# Layers are patched in part, so that both cases lie side by side.
def replace_3(model, layers):
    for key, _ in layers[::2]:
        model.set_model_attn2_replace(scaled, *key)


def replace_2(model, layers):
    """Under (side, number): for every transformer of the block."""
    for key, _ in layers[::2]:
        model.set_model_attn2_replace(scaled, *key[:2])


def replace_2_and_3(model, layers):
    """The longer key counts where both are there."""
    replace_2(model, layers)
    for key, _ in layers[::4]:
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


PATCHES = [replace_3, replace_2, replace_2_and_3, change_inputs, change_output, override]
PLACES = [("input", 1, "attn2_to_q"), ("output", 5, "attn2_to_k"), ("input", 4, "attn1_to_v")]
WIDTHS = [(32, 32), (128, 64), (64, 64)]  # out, in


def lora(seed: int) -> dict[str, torch.Tensor]:
    """A LoRA as the common trainers save it."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for (side, number, layer), (out, width) in zip(PLACES, WIDTHS, strict=True):
        key = f"lora_unet_{side}_blocks_{number}_1_transformer_blocks_0_{layer}"
        weights[f"{key}.lora_up.weight"] = torch.randn(out, 4, generator=generator)
        weights[f"{key}.lora_down.weight"] = torch.randn(4, width, generator=generator)
    return weights


def with_lora(model, layers):
    import comfy.sd

    return comfy.sd.load_lora_for_models(model, None, lora(1), 0.5, 0.0)[0]


def merged(model, layers):
    from comfy_extras.nodes_model_merging import ModelMergeSimple

    from tests.sampling import small

    return ModelMergeSimple().merge(model, small.model("tiny", seed=1), 0.6)[0]


@pytest.mark.parametrize(
    "change, family",
    [
        *(pytest.param(through(name), "sd15", id=name) for name in NODES),
        *(pytest.param(patch, "sd15", id=patch.__name__) for patch in PATCHES),
        *(
            pytest.param(p, "sdxl", id=f"{p.__name__}-sdxl", marks=pytest.mark.nightly)
            for p in PATCHES
        ),
        pytest.param(with_lora, "sd15", id="with_lora"),
        pytest.param(merged, "tiny", id="merged"),
    ],
)
def test_both_act_in_either_order(request, comparison, small, change, family):
    # Merging chooses tokens by their similarity: rounding must not decide.
    merging = "TomePatchModel" in request.node.name
    plain = small.model(family, dtype=torch.float64 if merging else torch.float32)
    layers = small.LAYERS[family]
    # Of the latent's size: layers of a size that no level has get theirs from this one.
    settings = {"weight": 0.8, "mask": torch.rand(1, SIZE, SIZE), "start_at": 0.4}
    given = {
        "size": SIZE,
        "batch": 1,
        "latent": torch.randn(1, 4, SIZE, SIZE),
        "denoise_mask": torch.linspace(0, 1, SIZE).expand(1, 1, SIZE, SIZE),
    }

    def changed(model):
        clone = model.clone()
        return change(clone, layers) or clone  # some change it in place

    compared = comparison(model=changed(plain), family=family).on_model(**settings)
    found, _, alone = compared.check(**given)
    images_first = small.apply(plain, small.adapter(family), small.images(), **settings)
    torch.manual_seed(0)
    assert torch.equal(small.sample(changed(images_first), **given), found)
    torch.manual_seed(0)
    bare = small.sample(plain, **given)
    assert not torch.allclose(alone, bare, atol=0.01), "the other one does nothing"


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
    small.sample(small.apply(model, small.adapter(), small.images()), size=16)
    assert len(held) == 2
    assert all(torch.equal(out, copy) for out, copy in held)


def test_what_an_attention_override_returns_is_not_changed(small):
    model, held = small.model("tiny"), []

    def attention(function, *args, **kwargs):
        out = function(*args, **kwargs)
        held.append((out, out.clone()))
        return out

    model.model_options["transformer_options"]["optimized_attention_override"] = attention
    small.sample(small.apply(model, small.adapter("tiny"), small.images()))
    assert held and all(torch.equal(out, copy) for out, copy in held)


def hooks(seed=1):
    """A LoRA hook whose strength changes at fractions of the schedule."""
    import comfy.hooks

    group = comfy.hooks.create_hook_lora(lora(seed), 0.6, 0.0)
    keyframes = comfy.hooks.HookKeyframeGroup()
    for strength, start in ((1.0, 0.0), (0.3, 0.4), (0.0, 0.6)):
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
@pytest.mark.parametrize("route", ["on_model", "on_texts"])
def test_scheduled_lora_hooks_on_conditionings(comparison, small, route, make):
    texts, at = make(small.text), (0.2, 0.4, 0.6)
    compared = comparison(*texts)
    getattr(compared, route)(start_at=0.3, weight=0.8)
    _, _, hooked = compared.check(at=at)
    bare = small.sample(compared.plain, at=at)
    assert not torch.allclose(hooked, bare, atol=0.1), "the hooks do nothing"


def controlnet(small):
    import comfy.cldm.cldm
    import comfy.controlnet

    layout = {k: v for k, v in small.CONFIGS["sd15"].items() if k != "out_channels"}
    layout["transformer_depth"] = layout["transformer_depth"][:]  # it takes them off the list
    net = comfy.cldm.cldm.ControlNet(**layout, hint_channels=3)
    small.fill(net, seed=30)
    return comfy.controlnet.ControlNet(net, load_device=small.CPU)


def t2i_adapter(small):
    import comfy.controlnet
    from comfy.t2i_adapter.adapter import Adapter_light

    net = small.fill(Adapter_light(channels=[32, 64, 128, 128], nums_rb=1, cin=3 * 64), seed=31)
    return comfy.controlnet.T2IAdapter(net, 3, 8, "nearest-exact", device=small.CPU)


@pytest.mark.parametrize("sides", ["both", "each its own", *nightly("positive")])
@pytest.mark.parametrize("kind", [controlnet, t2i_adapter], ids=lambda c: c.__name__)
def test_control_and_images(comparison, small, kind, sides):
    net = kind(small)
    first, second = (
        net.copy().set_cond_hint(torch.rand(1, 3, 64, 64), 0.7, window)
        for window in ((0.0, 1.0), (0.0, 0.4))
    )
    texts = (
        small.text(1, control=first, control_apply_to_uncond=sides == "both"),
        small.text(2, **({"control": second} if sides == "each its own" else {})),
    )
    compared = comparison(*texts, family="sd15").on_model(start_at=0.5)
    _, _, controlled = compared.check()
    bare = small.sample(compared.plain)
    assert not torch.allclose(controlled, bare, atol=0.1), "the control does nothing"
