"""Blocks and calls of other packs: less said, other classes, other forwards, odd sizes, windows."""

from __future__ import annotations

import types

import pytest
import torch
from torch import nn
from torch.nn.functional import interpolate


@pytest.fixture
def texts(small):
    return small.text(1), small.text(2)


@pytest.fixture
def attention(host):
    import comfy.ldm.modules.attention as attention

    return attention


def in_unet(model):
    """The cross-attention modules of a model in checkpoint order, and the transformers around."""
    from comfyui_ip_adapter.ip_adapter_core.comfyui.layers import cross_attentions

    return [module for _, module in cross_attentions(model.model.diffusion_model)]


def compared(small, truth, model, texts, prompt=None, before=None, **given):
    """Latents with the pack, the explicit truth's, and those without an image."""
    prompt = prompt or small.images()
    sides = truth.sides(small.adapter(), prompt, **given)
    base = model if before is None else before
    expected = truth.apply(base, small.LAYERS["sd15"], *zip(texts, sides, strict=True))
    return small.apply(model, small.adapter(), prompt, **given), expected, base


def test_a_block_that_tells_patches_its_heads_alone(small, truth, texts, attention, monkeypatch):
    """As AnimateDiff's ContextRef and Advanced-ControlNet's Reference do."""

    def forward(self, x, context=None, transformer_options={}):  # noqa: B006 as in the host
        options = transformer_options
        told = {k: options[k] for k in options if k not in ("patches", "patches_replace")}
        told |= {"n_heads": self.n_heads, "dim_head": self.d_head}
        for silent in ("activations_shape", "original_shape"):
            told.pop(silent, None)
        x = self.attn1(self.norm1(x)) + x
        place = (*options["block"], options["block_index"])
        slot = options.get("patches_replace", {}).get("attn2", {}).get(place)
        n = self.norm2(x)
        if slot is None:
            n = self.attn2(n, context)
        else:
            n = slot(self.attn2.to_q(n), self.attn2.to_k(context), self.attn2.to_v(context), told)
            n = self.attn2.to_out(n)
        x = n + x
        return self.ff(self.norm3(x)) + x

    mask = torch.rand(1, 40, 40, generator=torch.Generator().manual_seed(3))
    ours, expected, plain = compared(small, truth, small.model(), texts, mask=mask)
    usual = [small.run(small.guider(m, *texts)) for m in (ours, expected, plain)]
    truth.check(*usual)
    monkeypatch.setattr(attention.BasicTransformerBlock, "forward", forward)
    found = small.run(small.guider(ours, *texts))
    truth.check(found, usual[0], usual[2], tolerance=1e-5)


def test_classes_that_are_swapped_while_a_model_is_loaded(small, texts, attention, monkeypatch):
    """The second run of the very same prompt is as the first."""
    model = small.apply(small.model(), small.adapter(), small.images())
    once = small.run(small.guider(model, *texts))
    usual = attention.SpatialTransformer
    other = type("Transformer", (nn.Module,), {"forward": usual.forward})
    monkeypatch.setattr("comfy.ldm.modules.diffusionmodules.openaimodel.SpatialTransformer", other)
    for module in list(model.model.diffusion_model.modules()):
        if type(module) is usual:
            monkeypatch.setattr(module, "__class__", other)
    model = small.apply(small.model(), small.adapter(), small.images())
    assert torch.equal(small.run(small.guider(model, *texts)), once)


def guided(module, text, attention):
    """A forward, and a patch of the same: attention to the text and some to a second one."""

    def both(q, k, v):
        heads = module.heads
        second = text.to(q).expand(len(q), -1, -1)
        other = attention.optimized_attention(q, module.to_k(second), module.to_v(second), heads)
        return attention.optimized_attention(q, k, v, heads) + 0.4 * other

    def forward(self, x, context=None, value=None, mask=None, transformer_options=None):
        value = context if value is None else value
        return self.to_out(both(self.to_q(x), self.to_k(context), self.to_v(value)))

    def patch(q, k, v, options):
        return both(q, k, v)

    return types.MethodType(forward, module), patch


@pytest.mark.parametrize("case", ["plain", "mask"])
def test_images_come_on_top_of_a_layers_own_forward(small, truth, texts, attention, case):
    """Packs guide inside cross-attention by putting their own forward in its place."""
    given = {"mask": torch.rand(1, 20, 20)} if case == "mask" else {}
    second, plain = small.text(7)[0][0], small.model()
    forwards, patches = plain.clone(), plain.clone()
    paths = {module: name for name, module in plain.model.diffusion_model.named_modules()}
    for (key, _), module in zip(small.LAYERS["sd15"], in_unet(plain), strict=True):
        forward, patch = guided(module, second, attention)
        forwards.add_object_patch(f"diffusion_model.{paths[module]}.forward", forward)
        patches.set_model_attn2_replace(patch, *key)
    ours, expected, before = compared(small, truth, forwards, texts, before=patches, **given)
    latents = [small.run(small.guider(m, *texts)) for m in (ours, expected, before)]
    truth.check(*latents)
    ours.unpatch_model()
    usual = attention.CrossAttention.forward
    assert all(module.forward.__func__ is usual for module in in_unet(plain))


def test_masks_at_sizes_that_another_pack_makes(small, truth, texts, attention, monkeypatch):
    """From the mask itself, whatever size a block's latent is shrunk to."""
    usual = attention.SpatialTransformer.forward

    def shrunk(self, x, *args, **kwargs):
        size = x.shape[-2:]
        if size[0] == 8:
            x = interpolate(x, (5, 6), mode="bilinear")
        return interpolate(usual(self, x, *args, **kwargs), size, mode="bilinear")

    monkeypatch.setattr(attention.SpatialTransformer, "forward", shrunk)
    mask = (torch.rand(2, 37, 41, generator=torch.Generator().manual_seed(3)) > 0.5).float()
    ours = compared(small, truth, small.model(), texts, mask=mask)
    truth.check(*[small.run(small.guider(m, *texts)) for m in ours])


def windows(model, frames):
    """As AnimateDiff-Evolved samples `frames`: rows cut in its own way, told in `ad_params`."""

    def calculate(executor, model, conds, x, timestep, options):
        options = {**options, "transformer_options": {**options["transformer_options"]}}
        total, count = [torch.zeros_like(x) for _ in conds], torch.zeros(len(x), 1, 1, 1)
        for window in frames:
            told = {"sub_idxs": window, "full_length": len(x)}
            options["transformer_options"]["ad_params"] = told
            cut = [entries and [sliced(e, window, len(x)) for e in entries] for entries in conds]
            out = executor(model, cut, x[window], timestep[window], options)
            for whole, part in zip(total, out, strict=True):
                whole[window] += part
            count[window] += 1
        return [whole / count for whole in total]

    def sliced(entry, window, full):
        conds = {
            key: value._copy_with(value.cond[window])
            if isinstance(value.cond, torch.Tensor) and len(value.cond) == full
            else value
            for key, value in entry["model_conds"].items()
        }
        return {**entry, "model_conds": conds}

    from comfy.patcher_extension import WrappersMP

    clone = model.clone()
    clone.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, "windows", calculate)
    return clone


FRAMES = [[0, 1, 2, 3], [2, 3, 4, 5]]


@pytest.mark.parametrize("first", ["windows", "image"])
@pytest.mark.parametrize("perp_neg", [False, True])
def test_frames_of_animatediffs_windows(small, truth, texts, first, perp_neg):
    """With a text that the guider does not know, whose rows nobody cuts but us."""
    from comfy_extras.nodes_perpneg import PerpNeg

    given = {"latent_weights": [0.2, 0.4, 0.6, 0.8, 1.0, 1.2], "combine": "per_latent"}
    prompt, plain, empty = small.images(6), small.model(), small.text(3)
    sides = truth.sides(small.adapter(), prompt, **given)
    pairs = [*zip(texts, sides, strict=True), (empty, sides[1])]
    expected = truth.apply(windows(plain, FRAMES), small.LAYERS["sd15"], *pairs)
    model = windows(plain, FRAMES) if first == "windows" else plain
    model = small.apply(model, small.adapter(), prompt, **given)
    model = model if first == "windows" else windows(model, FRAMES)
    latents = []
    for m in (model, expected, windows(plain, FRAMES)):
        if perp_neg:
            (m,) = PerpNeg.execute(m, empty, 1.0).args
        latents.append(small.run(small.guider(m, *texts), batch=6))
    truth.check(*latents)
