"""Each pack's small real run beside an image prompt, against the explicit truth, in both orders."""

from __future__ import annotations

import functools
import sys

import pytest
import torch

from tests.packs.conftest import commit, nodes_of

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
    given = {"base_mask": 1 - left(), "mask_1": left(), "cond_1": small.text(6)}
    return use("cgem156-ComfyUI", "AttentionCouple|cgem156", model=model, **given)


COUPLES = {"comfyui-tooling-nodes": kritas_regions, "cgem156-ComfyUI": cgems_couple}


@pytest.mark.parametrize("case", ["one", "per latent", "mask"])
@pytest.mark.parametrize("name", COUPLES)
def test_an_attention_couple(use, small, compare, name, case):
    given = {"per latent": {"combine": "per_latent"}, "mask": {"mask": left()}}.get(case, {})
    prompt = small.images(2) if case == "per latent" else None
    change = functools.partial(COUPLES[name], use, small)
    compare(change, name, prompt, tolerance=1e-5, **given)


def prompt_controls_couple(use, small):
    """A hook on the positive text: no node makes it but the one that parses COUPLE(…)."""
    nodes_of("comfyui-prompt-control")
    (name,) = (name for name in sys.modules if name.endswith("attention_couple_ppm"))
    region = small.text(6)[0]
    region[1].update(mask=left(), mask_strength=1.0)
    return sys.modules[name].set_cond_attnmask(small.text(1), [region], fill=True)


@pytest.mark.parametrize("case", ["one", "per latent", "mask"])
def test_prompt_controls_couple(use, small, compare, case):
    given = {"per latent": {"combine": "per_latent"}, "mask": {"mask": left()}}.get(case, {})
    prompt = small.images(2) if case == "per latent" else None
    texts = prompt_controls_couple(use, small), small.text(2)
    name = "comfyui-prompt-control"
    compare(lambda model: model, name, prompt, tolerance=1e-5, texts=texts, **given)


WINDOWS = {
    "static": ("ADE_StandardStaticContextOptions", {"context_length": 4, "context_overlap": 2}),
    "standard": ("ADE_StandardUniformContextOptions", {"context_length": 4, "context_overlap": 2}),
    "looped": ("ADE_LoopedUniformContextOptions", {"context_length": 4, "context_overlap": 2}),
    "batched": ("ADE_BatchedContextOptions", {"context_length": 4}),
}
ADE = "ComfyUI-AnimateDiff-Evolved"


@pytest.mark.parametrize(
    "weights", [None, [0.2, 0.4, 0.6, 0.8, 1.0, 1.2, 0.7, 0.5]], ids=["one", "a weight each"]
)
@pytest.mark.parametrize("windows", WINDOWS)
def test_animatediffs_windows(use, small, compare, windows, weights):
    """Frame i follows image i, in the pack's own windows; no motion module is needed for them."""
    node, inputs = WINDOWS[windows]

    def change(model):
        options = use(ADE, node, **inputs)
        return use(ADE, "ADE_UseEvolvedSampling", model=model, context_options=options)

    given = {"combine": "per_latent"} | ({"latent_weights": weights} if weights else {})
    compare(change, ADE, small.images(8), run={"batch": 8, "size": 8}, **given)


def test_animatediffs_windows_and_guidance_at_once(use, small, compare):
    def change(model):
        options = use(ADE, *WINDOWS["static"][:1], **WINDOWS["static"][1])
        model = use(ADE, "ADE_UseEvolvedSampling", model=model, context_options=options)
        return use(PAG, "PerturbedAttention", model=model)

    compare(change, ADE, small.images(8), run={"batch": 8, "size": 8}, combine="per_latent")


def test_a_second_image_through_ipadapter_plus(use, small, compare):
    name, adapter, other = "ComfyUI_IPAdapter_plus", small.adapter(seed=11), small.images(seed=21)
    state = adapter.module.state_dict()
    parts = {
        part: {k.removeprefix(f"{part}."): x for k, x in state.items() if k.startswith(part)}
        for part in ("image_proj", "ip_adapter")
    }
    embeds = {
        "pos_embed": other.positive.image_embeds[:, None],
        "neg_embed": other.negative.image_embeds[:, None],
    }

    def change(model):
        return use(name, "IPAdapterEmbeds", model=model, ipadapter=parts, **embeds)

    compare(change, name)
