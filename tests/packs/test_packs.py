"""Each pack's small real run beside an image prompt, against the explicit truth, in both orders."""

from __future__ import annotations

import functools
import sys
import types
from unittest.mock import MagicMock

import pytest
import torch

from tests.packs.conftest import commit, nodes_of
from tests.support.random_models import sections

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

    def compare(
        change, name, prompt=None, tolerance=1e-4, texts=None, run=None, family=FAMILY, **given
    ):
        record_property("pack", f"{name}@{commit(name).hash} {commit(name).date}")
        texts = texts or (small.text(1), small.text(2))
        prompt, plain, adapter = (
            prompt or small.images(),
            small.model(family),
            small.adapter(family),
        )
        sides = truth.sides(adapter, prompt, **given)
        expected = truth.apply(change(plain), small.LAYERS[family], *zip(texts, sides, strict=True))
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


def other_image(small):
    """An adapter as the old pack has it, and features of an image."""
    adapter, other = small.adapter(seed=11), small.images(seed=21)
    embeds = {
        "pos_embed": other.positive.image_embeds[:, None],
        "neg_embed": other.negative.image_embeds[:, None],
    }
    return sections(adapter.module.state_dict()), embeds


def test_a_second_image_through_ipadapter_plus(use, small, compare):
    name, (parts, embeds) = "ComfyUI_IPAdapter_plus", other_image(small)

    def change(model):
        return use(name, "IPAdapterEmbeds", model=model, ipadapter=parts, **embeds)

    compare(change, name)


def test_two_packs_and_windows_at_once(use, small, compare):
    """AnimateDiff-Evolved's windows, IPAdapter_plus in every slot, perturbed attention."""
    name, parts, embeds = "ComfyUI_IPAdapter_plus", *other_image(small)

    def change(model):
        options = use(ADE, *WINDOWS["static"][:1], **WINDOWS["static"][1])
        model = use(ADE, "ADE_UseEvolvedSampling", model=model, context_options=options)
        model = use(name, "IPAdapterEmbeds", model=model, ipadapter=parts, **embeds)
        return use(PAG, "PerturbedAttention", model=model)

    compare(change, ADE, small.images(8), run={"batch": 8, "size": 8}, combine="per_latent")


def impact():
    """Load the Impact Pack, with its other half (detectors) imitated, as the host would."""
    import nodes as host_nodes

    half = types.ModuleType("impact.subpack_nodes")
    half.NODE_CLASS_MAPPINGS, half.NODE_DISPLAY_NAME_MAPPINGS = {}, {}
    sys.modules.setdefault("impact.subpack_nodes", half)
    for imitated in ("segment_anything", "segment_anything.utils"):
        sys.modules.setdefault(imitated, MagicMock())
    host_nodes.NODE_CLASS_MAPPINGS.update(nodes_of("ComfyUI-Impact-Pack"))
    return nodes_of("ComfyUI-Impact-Pack")


SAMPLERS = {  # pack: node, inputs, place of the latents
    "ComfyUI-Inspire-Pack": ("KSampler //Inspire", {"noise_mode": "CPU"}, 0),
    "efficiency-nodes-comfyui": (
        "KSampler (Efficient)",
        {"preview_method": "none", "vae_decode": "false", "my_unique_id": "1", "prompt": {}},
        3,
    ),
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers_of_other_packs(use, small, name, record_property):
    """The same picture as ComfyUI's own KSampler, to the bit, with an image for each latent."""
    import nodes as host_nodes

    node, more, place = SAMPLERS[name]
    if name == "ComfyUI-Inspire-Pack":
        impact()
    record_property("pack", f"{name}@{commit(name).hash} {commit(name).date}")
    nodes_of(name)
    model = small.apply(small.model(), small.adapter(), small.images(2), combine="per_latent")
    latent = {"samples": torch.zeros(2, 4, 8, 8)}
    given = {
        "model": model,
        "seed": 7,
        "steps": 2,
        "cfg": 3.0,
        "sampler_name": "euler",
        "scheduler": "normal",
        "positive": small.text(1),
        "negative": small.text(2),
        "latent_image": latent,
        "denoise": 1.0,
    }
    wanted = host_nodes.KSampler().sample(**given)[0]["samples"]
    kind = nodes_of(name)[node]
    out = getattr(kind(), kind.FUNCTION)(**given, **more)
    out = out["result"] if isinstance(out, dict) else out
    assert torch.equal(out[place]["samples"], wanted)
    record_property("error", "0.0e+00")


@pytest.mark.parametrize("sampler", ["res_2m", "res_2s", "deis_2m"])
def test_samplers_of_res4lyf(use, small, compare, sampler):
    name = "RES4LYF"
    assert nodes_of(name)
    compare(lambda model: model, name, run={"sampler": sampler, "at": (0.2, 0.4, 0.6)})


@pytest.mark.parametrize("kind", ["reference_attn", "reference_adain", "reference_attn+adain"])
def test_a_reference_controlnet(use, small, compare, kind):
    name = "ComfyUI-Advanced-ControlNet"
    nodes_of(name)
    module = next(m for n, m in sys.modules.items() if n.endswith("adv_control.control_reference"))
    net = use(name, "ACN_ReferenceControlNet", reference_type=kind)
    generator = torch.Generator().manual_seed(3)
    hint = module.ReferencePreprocWrapper(torch.randn(1, 4, SIZE, SIZE, generator=generator))
    apply = nodes_of(name)["ACN_AdvancedControlNetApply_v2"].execute
    texts = apply(small.text(1), small.text(2), net, hint, 1.0, 0.0, 1.0).args
    compare(lambda model: model, name, texts=tuple(texts), run={"size": SIZE})


def test_instant_id(use, small, compare, monkeypatch):
    """Its own attention over a face, on SDXL; what finds faces is imitated."""
    name = "ComfyUI_InstantID"
    app = types.ModuleType("insightface.app")
    app.FaceAnalysis = object
    monkeypatch.setitem(sys.modules, "insightface", types.ModuleType("insightface"))
    monkeypatch.setitem(sys.modules, "insightface.app", app)
    nodes_of(name)
    module = next(m for n, m in sys.modules.items() if n.endswith("InstantID.InstantID"))
    layers = small.LAYERS["sdxl70"]
    state = {"image_proj": module.Resampler(
        dim=64, depth=1, dim_head=64, heads=1, num_queries=4, embedding_dim=512,
        output_dim=small.CONTEXT, ff_mult=4,
    ).state_dict(), "ip_adapter": {}}  # fmt: skip
    generator = torch.Generator().manual_seed(5)
    for number, (_, width) in enumerate(layers):
        for part in ("k", "v"):
            weight = torch.randn(width, small.CONTEXT, generator=generator) / 8
            state["ip_adapter"][f"{2 * number + 1}.to_{part}_ip.weight"] = weight
    made = module.InstantID.__new__(module.InstantID)
    torch.nn.Module.__init__(made)
    made.image_proj_model = module.Resampler(
        dim=64, depth=1, dim_head=64, heads=1, num_queries=4, embedding_dim=512,
        output_dim=small.CONTEXT, ff_mult=4,
    )  # fmt: skip
    made.image_proj_model.load_state_dict(state["image_proj"])
    made.ip_layers = module.To_KV(state["ip_adapter"])
    face = {"embedding": torch.randn(512, generator=generator).numpy(), "bbox": [0, 0, 9, 9]}
    faces = types.SimpleNamespace(
        get=lambda image: [face], det_model=types.SimpleNamespace(input_size=(640, 640))
    )
    patch = nodes_of(name)["InstantIDAttentionPatch"]

    def change(model):
        image = torch.rand(1, 64, 64, 3)
        given = {"instantid": made, "insightface": faces, "image": image, "model": model}
        return patch().patch_attention(**given, weight=0.8, start_at=0.0, end_at=1.0)[0]

    compare(change, name, run={"size": 8}, family="sdxl70")


class Pixels:
    """What nodes ask of an autoencoder: the latents are means over 8 × 8 pixels, and back."""

    def encode(self, pixels):
        means = torch.nn.functional.avg_pool2d(pixels.movedim(-1, 1)[:, :3], 8)
        return torch.cat([means, means[:, :1]], 1) * 8 - 4

    def decode(self, latents):
        large = torch.nn.functional.interpolate(latents[:, :3], scale_factor=8)
        return ((large + 40) / 80).clamp(0, 1).movedim(1, -1)

    def spacial_compression_encode(self):
        return 8

    downscale_ratio = upscale_ratio = 8


def test_an_upscaler_in_tiles(use, small, record_property):
    """Each tile is a sampling run of its own, in which the image acts as in any other."""
    name = "ComfyUI_UltimateSDUpscale"
    record_property("pack", f"{name}@{commit(name).hash} {commit(name).date}")
    node = nodes_of(name)["UltimateSDUpscaleNoUpscale"]
    image = torch.rand(1, 128, 128, 3, generator=torch.Generator().manual_seed(2))
    known = {}
    for kind, options in {**node.INPUT_TYPES()["required"]}.items():
        first, *rest = options if isinstance(options, tuple) else (options,)
        more = rest[0] if rest else {}
        known[kind] = more.get("default", first[0] if isinstance(first, list) else None)
    plain = small.model()
    texts = {"positive": small.text(1), "negative": small.text(2), "vae": Pixels()}
    sizes = {"tile_width": 64, "tile_height": 64, "steps": 1, "denoise": 0.6, "mask_blur": 0}
    sizes |= {"tile_padding": 0, "seed": 3, "upscaled_image": image}

    def drawn(model):
        given = {**known, "model": model, **texts, **sizes}
        return getattr(node(), node.FUNCTION)(**given)[0]

    without, none = (
        drawn(plain),
        drawn(small.apply(plain, small.adapter(), small.images(), weight=0)),
    )
    image_ = small.apply(plain, small.adapter(), small.images(), weight=0.5)
    assert torch.equal(without, none) and not torch.equal(drawn(image_), without)
    texts["positive"], texts["negative"] = small.text(1), small.text(2)
    model, *conditioned = small.apply_conditioning(
        plain, small.text(1), small.text(2), small.adapter(), small.images(), weight=0.5
    )
    texts["positive"], texts["negative"] = conditioned
    found = drawn(model)
    texts["positive"], texts["negative"] = small.text(1), small.text(2)
    wanted = drawn(image_)
    assert torch.equal(found, wanted)
    record_property("error", "0.0e+00")


@pytest.fixture
def served(pack, monkeypatch):
    """The ids of ComfyUI_IPAdapter_plus in ComfyUI's table, where other packs look for them."""
    from comfyui_ip_adapter.nodes import ipadapter_plus

    import nodes as host_nodes

    monkeypatch.setattr(host_nodes, "NODE_CLASS_MAPPINGS", dict(host_nodes.NODE_CLASS_MAPPINGS))
    ipadapter_plus.serve("custom_nodes.here")
    return host_nodes.NODE_CLASS_MAPPINGS


class Pictures:
    """What an encoder is asked for, of features that only the picture's mean decides."""

    model_type, image_size = "clip_vision_model", 8

    def __init__(self, small):
        self.size, self.hidden = small.EMBED, small.HIDDEN
        self.model = types.SimpleNamespace(visual_projection=None)

    def encode_image(self, image, crop=True):
        count = len(image)
        generator = torch.Generator().manual_seed(int(image.mean() * 1000))
        embeds = torch.randn(count, self.size, generator=generator)
        states = torch.randn(count, 5, self.hidden, generator=generator)
        return {"image_embeds": embeds, "penultimate_hidden_states": states}


def test_impacts_detailer_asks_for_a_served_node(use, small, served, record_property):
    name = "ComfyUI-Impact-Pack"
    nodes_of_impact = impact()
    record_property("pack", f"{name}@{commit(name).hash} {commit(name).date}")
    parts, _ = other_image(small)
    vision, image = Pictures(small), torch.rand(1, 64, 64, 3)
    module = sys.modules["impact.core"]
    seg = module.SEG(image, torch.ones(64, 64), 1.0, (0, 0, 64, 64), (0, 0, 64, 64), "face", None)
    pipe = parts, None, vision, None, lambda model: model
    given = {"segs": ((64, 64), [seg]), "ipadapter_pipe": pipe, "weight": 0.7, "noise": 0.4}
    given |= {"weight_type": "channel penalty", "start_at": 0.0, "end_at": 0.9}
    given |= {"unfold_batch": False, "faceid_v2": False, "weight_v2": 1.0}
    given |= {"context_crop_factor": 1.0, "reference_image": image}
    (_, segs) = nodes_of_impact["ImpactIPAdapterApplySEGS"].doit(**given)[0]
    found, _ = segs[0].control_net_wrapper.doit_ipadapter(small.model())
    advanced = {"ipadapter": parts, "weight": 0.7, "end_at": 0.9, "image": image}
    wanted = served["IPAdapterAdvanced"]().apply_ipadapter(
        model=small.model(), clip_vision=vision, **advanced
    )[0]
    latents = [small.sample(model) for model in (found, wanted, small.model())]
    assert torch.equal(*latents[:2]) and not torch.equal(*latents[1:])
    record_property("error", "0.0e+00")


def test_inspires_regions_ask_for_served_nodes(use, small, served, record_property):
    name = "ComfyUI-Inspire-Pack"
    impact()
    record_property("pack", f"{name}@{commit(name).hash} {commit(name).date}")
    inspire = nodes_of(name)
    parts, embeds = other_image(small)
    vision, image = Pictures(small), torch.rand(1, 64, 64, 3)
    model = small.model()
    pipe = inspire["ToIPAdapterPipe //Inspire"].doit(parts, model, vision)[0]
    mask = torch.zeros(1, 64, 64)
    mask[..., :32] = 1
    one = inspire["RegionalIPAdapterMask //Inspire"].doit(mask, image, 0.7, 0.5, "linear")[0]
    embeds = {"embeds": embeds["pos_embed"][:, 0], "neg_embeds": embeds["neg_embed"][:, 0]}
    two = inspire["RegionalIPAdapterEncodedMask //Inspire"].doit(
        1 - mask, weight=0.4, weight_type="linear", **embeds
    )[0]
    found = inspire["ApplyRegionalIPAdapters //Inspire"].doit(
        ipadapter_pipe=pipe, regional_ipadapter1=one, regional_ipadapter2=two
    )[0]
    wanted = served["IPAdapterAdvanced"]().apply_ipadapter(
        model=model, ipadapter=parts, weight=0.7, image=image, clip_vision=vision, attn_mask=mask
    )[0]
    wanted = served["IPAdapterEmbeds"]().apply_ipadapter(
        wanted, parts, embeds["embeds"], 0.4, "linear", 0.0, 1.0, embeds["neg_embeds"], 1 - mask
    )[0]
    latents = [small.sample(each, size=8) for each in (found, wanted, model)]
    assert torch.equal(*latents[:2]) and not torch.equal(*latents[1:])
    record_property("error", "0.0e+00")


def test_easy_use_asks_for_served_nodes(use, small, served, record_property):
    name = "ComfyUI-Easy-Use"
    record_property("pack", f"{name}@{commit(name).hash} {commit(name).date}")
    node = nodes_of(name)["easy ipadapterApplyEmbeds"]
    parts, embeds = other_image(small)
    embeds = [x[:, 0] for x in embeds.values()]
    shared = 0.7, "ease in", 0.0, 0.9
    given = {"embeds_scaling": "K+V", "neg_embed": embeds[1]}
    found = node().apply(small.model(), parts, Pictures(small), embeds[0], *shared, **given)[0]
    wanted = served["IPAdapterEmbeds"]().apply_ipadapter(
        small.model(), parts, embeds[0], *shared, **given
    )[0]
    latents = [small.sample(model) for model in (found, wanted, small.model())]
    assert torch.equal(*latents[:2]) and not torch.equal(*latents[1:])
    record_property("error", "0.0e+00")


@pytest.fixture
def in_gguf(pack, tmp_path, monkeypatch):
    """Write tensors in Q8_0 to the UNet `unet.gguf`, and return what it leaves of each."""
    import folder_paths

    gguf = pytest.importorskip("gguf")
    f32, q8 = gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.Q8_0

    def in_gguf(architecture, state):
        writer = gguf.GGUFWriter(str(tmp_path / "unet.gguf"), architecture)
        rounded = {}
        for key, tensor in state.items():
            stored = q8 if tensor.ndim == 2 and tensor.shape[1] % 32 == 0 else f32
            array = gguf.quants.quantize(tensor.float().numpy(), stored)
            writer.add_tensor(key, array, raw_dtype=stored)
            left = gguf.quants.dequantize(array, stored)
            rounded[key] = torch.from_numpy(left).view(tensor.shape)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return rounded

    get = folder_paths.get_full_path
    monkeypatch.setattr(
        folder_paths,
        "get_full_path",
        lambda kind, file: str(tmp_path / file) if kind == "unet" else get(kind, file),
    )
    return in_gguf


@pytest.mark.parametrize("kind", ["xlabs", "instantx"])
def test_a_quantised_flux(use, flux, kind, in_gguf, record_property):
    """Q8_0, from a file, beside the same model with the weights that this leaves."""
    name, size = "ComfyUI-GGUF", flux.DETECTED
    nodes_of(name)
    plain = flux.model(size)
    inner = plain.model.diffusion_model
    rounded = in_gguf("flux", inner.state_dict())
    quantised = use(name, "UnetLoaderGGUF", unet_name="unet.gguf")
    adapter = flux.adapter(flux.FILES[kind](size))
    before = {key: x.clone() for key, x in inner.state_dict().items()}
    try:
        inner.load_state_dict(rounded)
        noise = torch.randn(1, 16, 8, 12, generator=torch.Generator().manual_seed(1))
        texts = flux.text(1, size), flux.text(2, size)
        found, expected, bare = (
            flux.sample(model, *texts, at=(0.4,), noise=noise)
            for model in (
                flux.small.apply(quantised, adapter, flux.images()),
                flux.small.apply(plain, adapter, flux.images()),
                plain,
            )
        )
    finally:
        inner.load_state_dict(before)
    # The pack calculates with half precision in between.
    error = float((found - expected).abs().max() / expected.abs().max())
    record_property("error", f"{error:.1e}")
    assert error < 1e-3 < float((expected - bare).abs().max() / expected.abs().max()) / 10


def test_a_quantised_unet(use, small, compare, in_gguf, monkeypatch):
    """Q8_0, from a file; ComfyUI knows the UNet by its layout, so that it is a stand-in's."""
    from safetensors.torch import load_file

    from tests.support import standins

    name = "ComfyUI-GGUF"
    nodes_of(name)
    checkpoint = "checkpoints/v1-5-pruned-emaonly-fp16.safetensors"
    state = load_file(standins.ensure(checkpoint) / "models" / checkpoint)
    prefix = "model.diffusion_model."
    in_gguf("sd1", {k[len(prefix) :]: x for k, x in state.items() if k.startswith(prefix)})
    unet = use(name, "UnetLoaderGGUF", unet_name="unet.gguf")
    small.LAYERS["quantised"] = [(key, 320) for key, _ in small.TINY_LAYERS]
    monkeypatch.setattr(small, "model", lambda family: unet.clone())
    adapter = small.adapter
    monkeypatch.setattr(small, "adapter", lambda family: adapter(family, cross_attention_dim=768))
    generator = torch.Generator().manual_seed(1)
    texts = [
        [[torch.randn(1, 77, 768, generator=generator), {"pooled_output": None}]] for _ in "pn"
    ]
    compare(lambda model: model, name, texts=texts, family="quantised")
