"""Which encoder an adapter was trained with, by what training notes in its file."""

from __future__ import annotations

import pytest
from comfyui_ip_adapter.ip_adapter_core.adapter import AdapterSpec
from comfyui_ip_adapter.ip_adapter_core.files.catalogue import AdapterFile, EncoderFile
from comfyui_ip_adapter.ip_adapter_core.files.encoder_header import EncoderSizes
from comfyui_ip_adapter.ip_adapter_core.files.origin import own

VIT_H, VIT_G, VIT_BIGG = (1024, 1280, 32, 257), (1024, 1408, 40, 257), (1280, 1664, 48, 257)
H_NAME = "CLIP-ViT-H-14-laion2B-s32B-b79K.safetensors"
BIGG_NAME = "CLIP-ViT-bigG-14-laion2B-39B-b160k.safetensors"  # without the tag's "s"


def adapter(trained_with, feature_dim=1024):
    sizes = {"feature_dim": feature_dim, "cross_attention_dim": 768, "tokens": 4}
    spec = AdapterSpec("base", tuple(sizes.items()), (320,) * 16)
    return AdapterFile("x.safetensors", "/x", spec, trained_with)


def encoder(name, sizes, quick_gelu=False):
    return EncoderFile(name, f"/{name}", EncoderSizes("open_clip", *sizes, 5120, True, quick_gelu))


@pytest.mark.parametrize(
    "noted, name, sizes, expected",
    [
        # open_clip's tags, and the names on the hub, stand for sizes, whatever the file's name
        ("laion2b_s32b_b79k", H_NAME, VIT_H, True),
        ("laion2b_s32b_b79k", "e.bin", VIT_H, True),
        ("laion2b_s32b_b79k", H_NAME, VIT_G, False),
        ("laion2b_s39b_b160k", BIGG_NAME, VIT_BIGG, True),
        ("laion2b_s39b_b160k", BIGG_NAME, VIT_H, False),
        ("CLIP-ViT-bigG-14-laion2B-39B-b160k", "e.bin", VIT_BIGG, True),
        ("hf-hub:CLIP-ViT-H-14-laion2B-s32B-b79K", "e.bin", VIT_H, True),
        # files
        ("tower.safetensors", "tower.pt", VIT_G, True),
        ("tower.safetensors", "towers.pt", VIT_G, False),
        ("tower.safetensors", "clip/My-Tower.safetensors", VIT_G, True),
        ("open_clip:tower.safetensors", "tower.safetensors", VIT_G, True),
        ("open_clip:ViT-H-14@x.pt", "x.pt", VIT_H, True),
        ("open_clip:ViT-H-14@x.pt", "y.pt", VIT_H, False),
        ("編碼器.safetensors", "編碼器.safetensors", VIT_G, True),
        ("編碼器.safetensors", "e.safetensors", VIT_H, False),
        ("Ｔｏｗｅｒ", "tower.pt", VIT_G, True),  # full width
        # what tells nothing goes by sizes
        ("image_encoder", "e.safetensors", VIT_H, True),
        ("image_encoder", "image_encoder.safetensors", VIT_G, False),
        ("model.safetensors", "model.safetensors", VIT_G, False),
        ("", "e.safetensors", VIT_H, True),
        ("---", "e.safetensors", VIT_G, False),
        (None, "e.safetensors", VIT_H, True),
    ],
)
def test_own(noted, name, sizes, expected):
    width = 1280 if sizes == VIT_BIGG else 1024
    assert own(adapter(noted, width), encoder(name, sizes)) is expected


def test_another_activation_is_another_encoder():
    assert not own(adapter(None), encoder(H_NAME, VIT_H, quick_gelu=True))
    assert own(adapter("dfn5b"), encoder("dfn5b.pt", VIT_H, quick_gelu=True))


def test_where_no_published_encoder_is_so_wide():
    assert own(adapter(None, 768), encoder("e.pt", (768, 1024, 24, 257)))
