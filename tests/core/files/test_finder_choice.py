"""Between files that all fit: what makes one better, in order, and what is said of it."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
from comfyui_ip_adapter.ip_adapter_core.adapter import AdapterSpec
from comfyui_ip_adapter.ip_adapter_core.files import published
from comfyui_ip_adapter.ip_adapter_core.files.encoder_file import EncoderSizes
from comfyui_ip_adapter.ip_adapter_core.files.finder import (
    ADAPTER_PRESETS,
    AdapterFile,
    EncoderFile,
    Unusable,
    choose,
    name_words,
    own,
)

VIT_H, VIT_G, VIT_BIGG = (1024, 1280, 32, 257), (1024, 1408, 40, 257), (1280, 1664, 48, 257)
VIT_L, VIT_L_336 = (768, 1024, 24, 257), (768, 1024, 24, 577)


def adapter(name, feature_dim=1024, trained_with=None, tokens=4):
    sizes = {"feature_dim": feature_dim, "cross_attention_dim": 768, "tokens": tokens}
    spec = AdapterSpec("base", tuple(sizes.items()), (320,) * 16)
    return AdapterFile(f"{name}.safetensors", f"/{name}", spec, trained_with)


def encoder(name, sizes=VIT_H, layout="transformers", alone=True, quick_gelu=False):
    found = EncoderSizes(layout, *sizes, 5120, alone, quick_gelu)
    return EncoderFile(f"{name}.safetensors", f"/{name}", found)


def damaged(name):
    return Unusable(name, f"/{name}", f"'{name}' is empty (0 bytes). Download it again.")


def best(adapters, encoders, preset="standard", unusable=()):
    """The same whatever the order of the files."""
    orders = itertools.product(itertools.permutations(adapters), itertools.permutations(encoders))
    choices = {choose(a, e, ADAPTER_PRESETS[preset], unusable) for a, e in orders}
    pairs = {(choice.adapter, choice.encoder) for choice in choices}
    assert len(pairs) == 1
    return choices.pop()


@pytest.mark.parametrize(
    "better, worse, why",
    [
        (encoder(published.VIT_H.name[:-12]), encoder("a"), "published one"),
        (encoder("b"), encoder("a", layout="open_clip"), "ComfyUI reads it"),
        (encoder("b"), encoder("a", alone=False), "no text tower"),
        (encoder("b", layout="open_clip"), encoder("a", VIT_G, "open_clip"), "trained with"),
        (encoder("b"), encoder(published.VIT_H.name[:-12], quick_gelu=True), "trained with"),
        (encoder("a"), encoder("b"), "comes first"),
    ],
)
def test_encoders(better, worse, why):
    choice = best([adapter("x")], [better, worse])
    assert choice.encoder is better
    assert why in choice.encoder_why and choice.adapter_why == ""


def test_the_encoder_in_the_metadata_and_where_no_name_is_like_it():
    trained = adapter("x", trained_with="dfn5b")
    by_name = encoder("z-ViT-H-DFN5B.x", VIT_G)
    choice = best([trained], [encoder("a"), by_name])
    assert choice.encoder is by_name and not choice.doubts
    choice = best([trained], [encoder("b"), encoder("a", VIT_G)])
    assert choice.encoder.name == "b.safetensors"
    assert "published encoder's sizes" in choice.encoder_why
    (doubt,) = choice.doubts
    assert "was trained with is dfn5b" in doubt


def test_widths_alike_are_no_encoder_of_its_own():
    """ViT-g's embedding is as wide as ViT-H's: the adapter of bigG has its own here."""
    choice = best(
        [adapter("h"), adapter("big", 1280)], [encoder("a", VIT_G), encoder("b", VIT_BIGG)]
    )
    assert (choice.adapter.name, choice.encoder.name) == ("big.safetensors", "b.safetensors")
    assert "own image encoder" in choice.adapter_why and not choice.doubts
    choice = best([adapter("h")], [encoder("a", VIT_G)])
    assert "another one" in choice.doubts[0]


@pytest.mark.parametrize(
    "names, wanted",
    [
        (("ip-adapter_sd15_light", "ip-adapter_sd15"), 1),  # what the names say is possible
        (("ip-adapter-light-face", "ip-adapter-plus_sdxl"), 0),  # and here it is not
        (("ip-adapter_sd15_light.new", "b"), 0),
        (("ip-adapter-full-face_sd15", "ip-adapter_sd15_light"), 0),
    ],
)
def test_contents_come_before_words_in_a_name(names, wanted):
    """The first reads ViT-H, as the standard adapter does, and the second ViT-bigG."""
    made = [adapter(names[0]), adapter(names[1], 1280)]
    choice = best(made, [encoder("a"), encoder("b", VIT_BIGG)])
    assert choice.adapter is made[wanted]


def test_an_adapter_of_no_published_encoder_raises_no_doubt():
    choice = best([adapter("x", 24)], [encoder("a", (24, 20, 3, 5))])
    assert not choice.doubts


def test_the_same_adapter_in_two_formats():
    one = adapter("x")
    other = AdapterFile("x.bin", "/x.bin", one.spec)
    choice = best([one, other], [encoder("a")])
    assert choice.adapter is one
    assert ".safetensors" in choice.adapter_why and not choice.doubts


def test_equal_names_in_two_folders_are_in_doubt():
    choice = best([adapter("run1/ip-adapter"), adapter("run2/ip-adapter")], [encoder("a")])
    assert choice.adapter.name == "run1/ip-adapter.safetensors"
    (doubt,) = choice.doubts
    assert "'run2/ip-adapter.safetensors' fits as well" in doubt and "only names" in doubt


@pytest.mark.parametrize(
    "adapters, encoders, rival",
    [
        (  # no published encoder's width tells which
            [adapter("x", 768)],
            [encoder("a", VIT_L_336), encoder("b", VIT_L)],
            "b.safetensors",
        ),
        ([adapter("a", tokens=8), adapter("b")], [encoder("e")], "b.safetensors"),
        (  # what the name of the first says is believed, though it may be as wrong as any
            [adapter("ip-adapter_sd15_light"), adapter("x", 1280)],
            [encoder("h"), encoder("g", VIT_BIGG)],
            "ip-adapter_sd15_light.safetensors",
        ),
        ([adapter("x")], [encoder("a"), encoder("b", layout="open_clip")], "b.safetensors"),
    ],
)
def test_what_a_name_or_format_decided_is_in_doubt(adapters, encoders, rival):
    (doubt,) = best(adapters, encoders).doubts
    assert f"'{rival}' fits as well" in doubt


def test_what_contents_decided_is_in_no_doubt():
    choice = best([adapter("x")], [encoder("b"), encoder("a", VIT_G), encoder("c", VIT_G)])
    assert choice.encoder.name == "b.safetensors" and not choice.doubts


LIGHT, BIGG = adapter("ip-adapter_sd15_light"), adapter("ip-adapter_sd15_vit-G", 1280)


def test_the_preset_by_name_without_its_encoder_is_told():
    choice = best([LIGHT, BIGG], [encoder("g", VIT_BIGG)], "light")
    assert choice.adapter is BIGG
    assert "no name" not in choice.adapter_why
    kind, missing = choice.doubts
    assert "may be the other kind" in kind and kind.endswith("ip-adapter_sd15_light.safetensors)")
    assert f"'{LIGHT.name}'" in missing and "image embeds 1024 wide (CLIP ViT-H/14)" in missing


def test_the_preset_by_name_which_another_outdoes_is_told():
    """ViT-g's embedding is as wide as that of ViT-H, which the light adapter was trained with."""
    choice = best([LIGHT, BIGG], [encoder("a", VIT_G), encoder("g", VIT_BIGG)], "light")
    assert choice.adapter is BIGG
    assert "own image encoder is here" in choice.adapter_why
    assert f"'{LIGHT.name}'" in choice.doubts[1] and "own image encoder" in choice.doubts[1]


@pytest.mark.parametrize(
    "preset, name, told",
    [
        ("light", "ip-adapter_sd15_light.bin", True),
        ("light", "my-light.safetensors", True),
        ("light", "other.bin", False),
        ("standard", "ip-adapter_sd15.bin", True),
        ("standard", "ip-adapter_sdxl_vit-h.bin", False),  # of another family
        ("standard", "other.bin", False),
    ],
)
def test_the_preset_by_name_that_cannot_be_used_is_told(preset, name, told):
    choice = best([adapter("x")], [encoder("h")], preset, [damaged(name)])
    assert any(f"'{name}' is empty" in doubt for doubt in choice.doubts) is told
    assert ("no name here says" in choice.adapter_why) is (preset == "light" and not told)
    in_its_place = adapter(
        Path(ADAPTER_PRESETS[preset].published_adapter(choice.adapter.spec).name).stem
    )
    assert not best([in_its_place], [encoder("h")], preset, [damaged(name)]).doubts


def test_none_where_no_encoder_fits():
    assert choose([adapter("x")], [encoder("a", VIT_BIGG)], ADAPTER_PRESETS["standard"]) is None
    assert choose([], [encoder("a")], ADAPTER_PRESETS["standard"]) is None
    bare = encoder("a", (0, *VIT_H[1:]))
    assert choose([adapter("x")], [bare], ADAPTER_PRESETS["standard"]) is None


@pytest.mark.parametrize("preset", ADAPTER_PRESETS)
def test_published_names_are_as_hinted(preset):
    """A preset's published file suits it, and its twin's does not."""
    found = [family[preset] for family in published.ADAPTERS.values() if preset in family]
    twin = {"light": "standard", "fine-grained": "face"}
    twin |= {b: a for a, b in twin.items()}
    for weights in found:
        assert ADAPTER_PRESETS[preset].suits(AdapterFile(weights.name, "", adapter("x").spec))
        if preset in twin:
            other = ADAPTER_PRESETS[twin[preset]]
            assert not other.suits(AdapterFile(weights.name, "", adapter("x").spec))
        assert weights.url.endswith(f"/{weights.name}") and weights.directory == "ipadapter"


@pytest.mark.parametrize("name", ["ip-adapter_sd15.bin", "new/ip-adapter_sd15.safetensors"])
def test_the_published_name_in_any_format_and_folder(name):
    given = adapter("a")
    named = AdapterFile(name, f"/{name}", given.spec)
    choice = best([given, named], [encoder("h")])
    assert choice.adapter is named and "published one" in choice.adapter_why


@pytest.mark.parametrize("name", ["plusface_sd15", "PLUSFACE", "fullface", "ipadapterPlusFace"])
def test_words_that_are_written_as_one(name):
    assert "face" in name_words(f"{name}.safetensors")


def test_words():
    assert name_words("Faces/IPAdapterPlusFace_sd15-v1.1.bin") == {
        *("faces", "ip", "adapter", "plus", "face", "sd", "v")
    }
    assert "light" not in name_words("sdxl_lightning.safetensors")
    assert not {"face", "id"} & name_words("faceid-surface.bin")


H_NAME = "CLIP-ViT-H-14-laion2B-s32B-b79K.safetensors"
BIGG_NAME = "CLIP-ViT-bigG-14-laion2B-39B-b160k.safetensors"  # without the tag's "s"


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
        (None, "e.pt", VIT_L, True),  # no published adapter reads one so wide
    ],
)
def test_own(noted, name, sizes, expected):
    reads = adapter("x", sizes[0], trained_with=noted)
    assert own(reads, replace(encoder("x", sizes), name=name)) is expected


@pytest.mark.parametrize("noted, name, expected", [(None, H_NAME, False), ("e", "e.pt", True)])
def test_another_activation_is_another_encoder(noted, name, expected):
    found = replace(encoder("x", quick_gelu=True), name=name)
    assert own(adapter("x", trained_with=noted), found) is expected
