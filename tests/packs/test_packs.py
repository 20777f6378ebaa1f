"""Each pack's small real run beside an image prompt, against the explicit truth, in both orders."""

from __future__ import annotations

import functools

import pytest
import torch

from tests.packs.conftest import commit

PAG = "sd-perturbed-attention"
CHANGES = {  # pack, node, inputs
    "PAG": (PAG, "PerturbedAttention", {}),
    "SEG": (PAG, "SmoothedEnergyGuidanceAdvanced", {}),
    "SWG": (PAG, "SlidingWindowGuidanceAdvanced", {"tile_width": 64, "tile_height": 64}),
    "PLADIS": (PAG, "PLADIS", {}),
    "NAG": (PAG, "NormalizedAttentionGuidance", {"negative": 3}),
    "TPG": (PAG, "TokenPerturbationGuidance", {}),
    "FDG": (PAG, "FrequencyDecoupledGuidance", {}),
    "MG": (PAG, "MomentumGuidance", {}),
    "thresholding": ("sd-dynamic-thresholding", "DynamicThresholdingSimple", {}),
    "RAUNet": ("comfyui_jankhidiffusion", "ApplyRAUNetSimple", {}),
    "MSW-MSA": ("comfyui_jankhidiffusion", "ApplyMSWMSAAttentionSimple", {}),
    "tiles": (
        "ComfyUI-TiledDiffusion",
        "TiledDiffusion",
        {"tile_width": 64, "tile_height": 64, "tile_overlap": 0},
    ),
    "block cache": ("Comfy-WaveSpeed", "ApplyFBCacheOnModel", {}),
    "CFGZeroStar": ("ComfyUI-KJNodes", "CFGZeroStarAndInit", {}),
    "patch order": ("ComfyUI-KJNodes", "PatchModelPatcherOrder", {}),
}
SIZE = 16
FAMILY = "sd15"


@pytest.fixture
def compare(small, truth, record_property):
    """Sample with a pack's change in both orders, and compare with the truth behind it."""

    def compare(change, name, prompt=None, tolerance=1e-4, texts=None, run=None, **given):
        record_property("pack", f"{name}@{commit(name).hash} {commit(name).date}")
        texts = texts or (small.text(1), small.text(2))
        prompt, plain, adapter = prompt or small.images(), small.model(FAMILY), small.adapter()
        sides = truth.sides(adapter, prompt, **given)
        expected = truth.apply(change(plain), small.LAYERS[FAMILY], *zip(texts, sides, strict=True))
        pack_first = small.apply(change(plain), adapter, prompt, **given)
        image_first = change(small.apply(plain, adapter, prompt, **given))
        latents = []
        for model in (expected, change(plain), pack_first, image_first):
            torch.manual_seed(0)
            guider = small.guider(model, *texts)
            latents.append(small.run(guider, **{"batch": 2, "size": SIZE, **(run or {})}))
        wanted, without, *ours = latents
        for found in ours:
            error = float((found - wanted).abs().max() / (wanted - without).abs().max())
            record_property("error", f"{error:.1e}")
            truth.check(found, wanted, without, tolerance=tolerance)

    return compare


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_the_model(use, small, compare, change):
    name, node, inputs = CHANGES[change]
    given = {**inputs, **({"negative": small.text(3)} if "negative" in inputs else {})}
    compare(functools.partial(use_model, use, name, node, given), name)


def use_model(use, name, node, given, model):
    return use(name, node, model=model, **given)


def left():
    mask = torch.zeros(1, 8 * SIZE, 8 * SIZE)
    mask[..., : 4 * SIZE] = 1
    return mask


def kritas_regions(use, small, model):
    pack = "comfyui-tooling-nodes"
    regions = use(pack, "ETN_BackgroundRegion", conditioning=small.text(5))
    given = {"mask": left(), "conditioning": small.text(6), "regions": regions}
    regions = use(pack, "ETN_DefineRegion", **given)
    return use(pack, "ETN_AttentionMask", model=model, regions=regions)


def cgems_couple(use, small, model):
    given = {"base_mask": 1 - left()[0], "mask_1": left()[0], "cond_1": small.text(6)}
    return use("cgem156-ComfyUI", "AttentionCouple|cgem156", model=model, **given)


COUPLES = {"comfyui-tooling-nodes": kritas_regions, "cgem156-ComfyUI": cgems_couple}


@pytest.mark.parametrize("case", ["one", "per latent", "mask"])
@pytest.mark.parametrize("name", COUPLES)
def test_an_attention_couple(use, small, compare, name, case):
    given = {"per latent": {"combine": "per_latent"}, "mask": {"mask": left()}}.get(case, {})
    prompt = small.images(2) if case == "per latent" else None
    change = functools.partial(COUPLES[name], use, small)
    compare(change, name, prompt, tolerance=1e-5, **given)
