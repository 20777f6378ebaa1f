"""Published face adapters are known by their tensors, whatever the file is called."""

from __future__ import annotations

import math

import pytest
import torch

from ip_adapter_core.adapter import AdapterSpec, IPAdapter
from ip_adapter_core.files.adapter_file import CheckpointError, recognize
from ip_adapter_core.files.header import Shape
from tests.support.checkpoint_layouts import SD15, SDXL

RANK = 128
FACE = {"feature_dim": 512, "tokens": 4, "hidden": 1024}
PLUS = {"feature_dim": 1280, "face_dim": 512, "depth": 4, "expansion": 4, "shortcut": 1}


def file(variant, size, half=True, lora=False, **sizes):
    """A file's tensors as its header gives them."""
    sizes = {"cross_attention_dim": size.context, **sizes}
    spec = AdapterSpec(variant, tuple(sizes.items()), size.widths)
    dtype = torch.float16 if half else torch.float32
    state = IPAdapter(spec, device="meta").state_dict()
    made = {key: Shape(tuple(x.shape), dtype) for key, x in state.items()}
    for i, width in enumerate(size.widths if lora else ()):
        for number, into in ((2 * i, width), (2 * i + 1, size.context)):
            for part, wide in (("q", width), ("k", into), ("v", into), ("out", width)):
                name = f"ip_adapter.{number}.to_{part}_lora"
                made[f"{name}.down.weight"] = Shape((RANK, wide), dtype)
                made[f"{name}.up.weight"] = Shape((width, RANK), dtype)
    return made


def unnorm():
    sizes = {"feature_dim": 512, "tokens": 16, "dim": 1280, "depth": 4, "heads": 20, "expansion": 4}
    made = file("plus", SDXL, **sizes)
    single = {k: Shape(x.shape, torch.float32) for k, x in made.items() if k[:10] == "image_proj"}
    return {**made, **single}


def kolors():
    sizes = {"feature_dim": 1024, "tokens": 16, "dim": 2048, "depth": 4, "heads": 12}
    return file("plus", SDXL, **sizes, expansion=4)


PUBLISHED = {  # file: megabytes on the hub, tensors, variant, tokens
    "faceid_sd15": (96.7, file("faceid", SD15, lora=True, **FACE), "faceid", 4),
    "faceid_sdxl": (1070, file("faceid", SDXL, lora=True, **FACE), "faceid", 4),
    "faceid-plusv2_sd15": (
        156.6,
        file("faceid-plus", SD15, lora=True, **{**FACE, **PLUS, "heads": 12}),
        "faceid-plus",
        4,
    ),
    "faceid-plusv2_sdxl": (
        1490,
        file("faceid-plus", SDXL, lora=True, **{**FACE, **PLUS, "heads": 32}),
        "faceid-plus",
        4,
    ),
    "portrait_sd15": (64.6, file("faceid", SD15, **{**FACE, "tokens": 16}), "faceid", 16),
    "portrait_sdxl": (749.8, file("faceid", SDXL, **{**FACE, "tokens": 16}), "faceid", 16),
    "portrait_sdxl_unnorm": (1010, unnorm(), "faceid-unnorm", 16),
    "kolors plus": (1010, kolors(), "plus", 16),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_faces(name):
    megabytes, weights, variant, tokens = PUBLISHED[name]
    size = sum(math.prod(x.shape) * x.dtype.itemsize for x in weights.values()) / 1e6
    assert size == pytest.approx(megabytes, rel=0.006)
    spec = recognize(weights, "misleading-plus-face_sd15.bin")
    assert (spec.variant, spec.tokens) == (variant, tokens)
    assert spec.kolors is (name == "kolors plus")
    reads = {"faceid-plus": 2}.get(variant, 1)
    assert len(spec.reads) == reads
    if variant.startswith("faceid"):
        assert spec.width("face_embeds") == 512


@pytest.mark.parametrize("name, shortcut", [
    ("ip-adapter-faceid-plus_sd15.bin", 0),
    ("FaceID Plus.safetensors", 0),
    ("ip-adapter-faceid-plusv2_sd15.bin", 1),
    ("faceid_plus_v2_sd15.bin", 1),
    ("renamed.bin", 1),
])  # fmt: skip
def test_the_versions_of_plus_are_told_by_name(name, shortcut):
    weights = PUBLISHED["faceid-plusv2_sd15"][1]
    assert recognize(weights, name).sizes["shortcut"] == shortcut
    sdxl = PUBLISHED["faceid-plusv2_sdxl"][1]
    assert recognize(sdxl, name).sizes["shortcut"] == 1, "SDXL has v2 alone"


def changed(name, **replaced):
    weights = dict(PUBLISHED[name][1])
    for key, shape in replaced.items():
        weights[key] = Shape(shape, torch.float16)
    return weights


def one_precision(weights, dtype):
    return {key: Shape(x.shape, dtype) for key, x in weights.items()}


def without(weights, part):
    return {key: x for key, x in weights.items() if part not in key}


def base_with_lora():
    sizes = {"feature_dim": 1024, "tokens": 4}
    lora = {k: x for k, x in PUBLISHED["faceid_sd15"][1].items() if "_lora." in k}
    return {**file("base", SD15, **sizes), **lora}


@pytest.mark.parametrize("weights, said", [
    (one_precision(unnorm(), torch.float32), r"InstantID adapter.*FaceID Portrait Unnorm"),
    (one_precision(unnorm(), torch.float16), r"InstantID adapter.*FaceID Portrait Unnorm"),
    (changed("faceid-plusv2_sdxl", **{
        "image_proj.perceiver_resampler.proj_in.weight": (4096, 1024)}), "Plus.*of Kolors"),
    (without(PUBLISHED["faceid_sd15"][1], ".9.to_q_lora.up"), r"incomplete.*to_q_lora\.up"),
    (without(PUBLISHED["faceid_sd15"][1], "to_out_lora"), r"incomplete.*to_out_lora"),
    (base_with_lora(), r"base adapter with a LoRA of FaceID"),
    (without(PUBLISHED["faceid-plusv2_sd15"][1], "image_proj.norm"), r"incomplete faceid-plus"),
    (changed("portrait_sd15", **{"ip_adapter.1.to_k_ip.weight": (320, 1024)}), r"has shape"),
])  # fmt: skip
def test_what_is_nearly_one(weights, said):
    with pytest.raises(CheckpointError, match=rf"(?s)'file'.*{said}"):
        recognize(weights, "file")
