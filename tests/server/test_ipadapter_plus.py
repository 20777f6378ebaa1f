"""Requests of clients of ComfyUI_IPAdapter_plus, as they send them, to a running server."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from tools.comfyui.client import PromptError

ADAPTER = "ip-adapter_sd15.safetensors"
PLUS = "ip-adapter-plus_sd15.safetensors"
ENCODER = "CLIP-ViT-H-14-laion2B-s32B-b79K.safetensors"


@pytest.fixture
def plain(graph):
    """The workflow without an image prompt; `plain.model`, `plain.image`: links to these."""

    def plain():
        made = graph()
        model = [made.of("CheckpointLoaderSimple"), 0]
        image = [made.of("LoadImage"), 0]
        for kind in ("IPA_Apply", "IPA_EncodeImage", "IPA_LoadAdapter", "CLIPVisionLoader"):
            del made[made.of(kind)]
        made.set("KSampler", model=model)
        made.model, made.image = model, image
        for node in made.values():
            node.pop("_meta", None)
        return made

    return plain


def link(made, class_type, index=0, **inputs):
    """Add a node, whatever else is called like its class."""
    name = f"{class_type} {len(made)}"
    made[name] = {"class_type": class_type, "inputs": inputs}
    return [name, index]


def ran(server, made, model):
    made.set("KSampler", model=model)
    result = server.run(made)
    assert result.outputs[made.of("SaveLatent")]["latents"]
    return result


STRENGTHS = {"start_at": 0.0, "end_at": 1.0}


@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize("weight_type", ["linear", "style transfer", "composition"])
def test_krita(server, plain, images, weight_type):
    made = plain()
    vision = link(made, "CLIPVisionLoader", clip_name=ENCODER)
    adapter = link(made, "IPAdapterModelLoader", ipadapter_file=PLUS)
    given = {"image": made.image, "ipadapter": adapter, "clip_vision": vision}
    embeds = [link(made, "IPAdapterEncoder", weight=0.4 + i, **given) for i in range(images)]
    if images > 1:
        several = {f"embed{i}": embed for i, embed in enumerate(embeds, 1)}
        embeds = [link(made, "IPAdapterCombineEmbeds", method="concat", **several)]
    shared = {"model": made.model, "ipadapter": adapter, "clip_vision": vision, **STRENGTHS}
    model = link(
        made,
        "IPAdapterEmbeds",
        pos_embed=embeds[0],
        weight=1.0,
        weight_type=weight_type,
        embeds_scaling="V only",
        attn_mask=None,
        **shared,
    )
    ran(server, made, model)


def test_swarm_by_preset(server, plain):
    made = plain()
    batch = link(made, "ImageBatch", image1=made.image, image2=made.image)
    loader = link(made, "IPAdapterUnifiedLoader", model=made.model, preset="PLUS (high strength)")
    given = {"model": loader, "ipadapter": [loader[0], 1], "image": batch}
    model = link(made, "IPAdapter", weight=1, weight_type="standard", **given, **STRENGTHS)
    ran(server, made, model)


def test_swarm_before_the_unified_loader(server, plain):
    """Nothing more than this is sent; the rest has to have defaults."""
    made = plain()
    given = {
        "ipadapter": link(made, "IPAdapterModelLoader", ipadapter_file=ADAPTER),
        "clip_vision": link(made, "CLIPVisionLoader", clip_name=ENCODER),
        "image": made.image,
        "model": made.model,
    }
    more = {"weight": 1, "noise": 0, "weight_type": "original"}
    ran(server, made, link(made, "IPAdapterApply", **given, **more))


@pytest.mark.parametrize(
    "weight_type, more",
    [
        ("linear", {}),  # before 2024-03-25 there was no scaling
        ("style transfer (SDXL)", {}),
        ("original", {"embeds_scaling": "K+mean(V) w/ C penalty"}),
        ("ease in", {"embeds_scaling": "V only", "encode_batch_size": 0, "unheard_of": [1, 2]}),
    ],
)
def test_early_and_surplus_inputs(server, plain, weight_type, more):
    made = plain()
    given = {
        "ipadapter": link(made, "IPAdapterModelLoader", ipadapter_file=ADAPTER),
        "clip_vision": link(made, "CLIPVisionLoader", clip_name=ENCODER),
        "image": made.image,
        "model": made.model,
        "weight": 1,
        "weight_type": weight_type,
        "combine_embeds": "concat",
        "start_at": 0,
        "end_at": 1,
    }
    more = {name: value for name, value in more.items() if name != "unheard_of"}
    ran(server, made, link(made, "IPAdapterAdvanced", **given, **more, speak_and_recognation=True))


def test_the_encoder_of_the_first_version(server, plain):
    made = plain()
    adapter = link(made, "IPAdapterModelLoader", ipadapter_file=PLUS)
    vision = link(made, "CLIPVisionLoader", clip_name=ENCODER)
    images = {"image_1": made.image, "image_2": made.image, "weight_1": 0.8, "weight_2": 1.0}
    embeds = link(
        made, "IPAdapterEncoder", clip_vision=vision, ipadapter_plus=True, noise=0.3, **images
    )
    given = {"ipadapter": adapter, "embeds": embeds, "model": made.model, "weight": 0.7}
    more = {"weight_type": "channel penalty", "unfold_batch": False, **STRENGTHS}
    ran(server, made, link(made, "IPAdapterApplyEncoded", **given, **more))


def test_pictures_weights_and_regions(server, plain):
    made = plain()
    loader = link(
        made, "IPAdapterUnifiedLoader", model=made.model, preset="STANDARD (medium strength)"
    )
    prepared = link(
        made,
        "PrepImageForClipVision",
        image=made.image,
        interpolation="LANCZOS",
        crop_position="top",
        sharpening=0.2,
    )
    noise = link(made, "IPAdapterNoise", type="fade", strength=0.3, blur=5, image_optional=prepared)
    weights = link(
        made,
        "IPAdapterWeights",
        weights="1.0, 0.0",
        timing="linear",
        frames=2,
        start_frame=0,
        end_frame=9999,
        add_starting_frames=0,
        add_ending_frames=0,
        method="full batch",
        image=prepared,
    )
    given = {"model": loader, "ipadapter": [loader[0], 1], **STRENGTHS}
    model = link(
        made,
        "IPAdapterBatch",
        image=[weights[0], 3],
        weight=weights,
        weight_type="linear",
        embeds_scaling="K+V",
        encode_batch_size=0,
        image_negative=noise,
        **given,
    )
    mask = link(made, "SolidMask", value=1.0, width=64, height=64)
    region = link(
        made,
        "IPAdapterRegionalConditioning",
        image=prepared,
        image_weight=0.8,
        prompt_weight=1.0,
        weight_type="ease in",
        mask=mask,
        **STRENGTHS,
    )
    both = link(made, "IPAdapterCombineParams", params_1=region, params_2=region)
    model = link(
        made,
        "IPAdapterFromParams",
        model=model,
        ipadapter=[loader[0], 1],
        ipadapter_params=both,
        combine_embeds="concat",
        embeds_scaling="V only",
    )
    ran(server, made, model)


def test_what_clients_read_of_a_node(server):
    info = server.object_info("IPAdapterUnifiedLoader")["IPAdapterUnifiedLoader"]
    assert info["input"]["required"]["preset"][0][3] == "PLUS (high strength)"
    info = server.object_info("IPAdapterModelLoader")["IPAdapterModelLoader"]
    assert ADAPTER in info["input"]["required"]["ipadapter_file"][0]
    assert info["output"] == ["IPADAPTER"] and info["name"] == "IPAdapterModelLoader"
    assert info["python_module"].startswith("custom_nodes.")
    assert not info.get("deprecated")
    assert server.object_info("IPAdapterApply")["IPAdapterApply"]["deprecated"]


def test_a_preset_without_its_file_says_what_to_get(server, plain):
    made = plain()
    preset = {"preset": "VIT-G (medium strength)"}
    loader = link(made, "IPAdapterUnifiedLoader", model=made.model, **preset)
    given = {"model": loader, "ipadapter": [loader[0], 1], "image": made.image, "weight": 1.0}
    made.set(
        "KSampler", model=link(made, "IPAdapter", weight_type="standard", **given, **STRENGTHS)
    )
    with pytest.raises(PromptError, match=r"(?s)bigG.*No adapter is published"):
        server.run(made)
    ran(server, plain(), made.model)


OF_BLOCKS = [
    ("IPAdapterAdvanced", {"weight_type": "style transfer precise"}),
    ("IPAdapterAdvanced", {"weight_type": "style and composition"}),
    ("IPAdapterPreciseComposition", {"composition_boost": 0.3}),
    ("IPAdapterStyleComposition", {"weight_style": 1.2, "weight_composition": 0.7}),
]


@pytest.mark.parametrize(
    "type_, inputs",
    [
        ("IPAdapterAdvanced", {"weight_type": "weak middle"}),
        ("IPAdapterAdvanced", {"embeds_scaling": "K+mean(V) w/ C penalty"}),
        *(pytest.param(*case, marks=pytest.mark.nightly) for case in OF_BLOCKS),
    ],
)
def test_what_the_converter_makes_gives_the_same_to_the_bit(server, plain, request, type_, inputs):
    from ip_adapter_core.ipadapter_plus.convert import convert

    made = plain()
    if (type_, inputs) in OF_BLOCKS:  # which only the real layouts have
        request.getfixturevalue("models_sdxl")
        made.set("CheckpointLoaderSimple", ckpt_name="sd_xl_base_1.0.safetensors")
    loader = link(made, "IPAdapterUnifiedLoader", model=made.model, preset="PLUS (high strength)")
    given = {"model": loader, "ipadapter": [loader[0], 1], "image": made.image, **STRENGTHS}
    given |= {"combine_embeds": "concat", "embeds_scaling": "V only", "weight_type": "linear"}
    given |= {"weight": 0.7, "expand_style": False}
    if type_ == "IPAdapterStyleComposition":  # ComfyUI passes surplus links on
        given |= {"image_style": given.pop("image"), "image_composition": made.image}
    made.set("KSampler", model=link(made, type_, **{**given, **inputs}))
    made.add("VAEDecode", samples=[made.of("KSampler"), 0], vae=[made.model[0], 2])
    made.add("SaveImage", images=["VAEDecode", 0], filename_prefix="test")
    new, report = convert(dict(made))
    assert report[-1].endswith("taken out.") and not any("kept" in line for line in report)
    pictures = []
    for each in (made, new):
        (data,) = server.run(each).images["SaveImage"]
        pictures.append(np.asarray(Image.open(io.BytesIO(data))))
    assert np.array_equal(*pictures)
