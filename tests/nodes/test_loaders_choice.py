"""IPA_AutoLoad: which files it takes by contents and names, and what it says where one lacks."""

from __future__ import annotations

import json
import logging
import os
import time
from pathlib import Path

import pytest
import torch

from tests.support import sparse_files as sparse


def warnings(caplog):
    return [record.message for record in caplog.records if record.levelno == logging.WARNING]


# As if somebody had renamed each file to what another one is called.
PERMUTED = {
    "ip-adapter-plus_sd15.safetensors": "sd15",
    "ip-adapter_sd15.safetensors": "sd15_full",
    "ip-adapter-full-face_sd15.safetensors": "sd15_plus",
    "ip-adapter-plus_sdxl_vit-h.safetensors": "sdxl_vit-h",
    "ip-adapter_sdxl_vit-h.safetensors": "sdxl_plus",
}
ENCODERS = {
    "CLIP-ViT-bigG-14-laion2B-39B-b160k.safetensors": "ViT-H",
    "CLIP-ViT-H-14-laion2B-s32B-b79K.safetensors": "ViT-bigG",
    "model.safetensors": "ViT-L",
}
BARE = {k: x for k, x in sparse.vision().items() if k != "visual_projection.weight"}
LARGE = {**sparse.tower(), "positional_embedding": (730, 1280)}  # 378 pixels
H94 = "https://huggingface.co/h94/IP-Adapter/resolve/main"
PRESETS = {  # of a family: the kind of file, and what is published at that address
    ("SD1.5", "light"): ("sd15", "models/ip-adapter_sd15_light"),
    ("SD1.5", "standard"): ("sd15", "models/ip-adapter_sd15"),
    ("SD1.5", "fine-grained"): ("sd15_plus", "models/ip-adapter-plus_sd15"),
    ("SD1.5", "face"): ("sd15_plus", "models/ip-adapter-plus-face_sd15"),
    ("SD1.5", "full face"): ("sd15_full", "models/ip-adapter-full-face_sd15"),
    ("SDXL", "standard"): ("sdxl_vit-h", "sdxl_models/ip-adapter_sdxl_vit-h"),
    ("SDXL", "fine-grained"): ("sdxl_plus", "sdxl_models/ip-adapter-plus_sdxl_vit-h"),
    ("SDXL", "face"): ("sdxl_plus", "sdxl_models/ip-adapter-plus-face_sdxl_vit-h"),
}


@pytest.mark.parametrize("family, preset", PRESETS)
def test_every_published_kind_under_anothers_name(find, put, family, preset):
    put(PERMUTED, {name: sparse.vision(kind) for name, kind in ENCODERS.items()})
    adapter, encoder = find(family, preset)
    assert PERMUTED[adapter] == PRESETS[family, preset][0]
    assert ENCODERS[encoder] == "ViT-H"
    for words in (adapter, encoder, family):
        assert words in find.said


@pytest.mark.parametrize("family, kinds", [("SD1.5", "sd15"), ("SDXL", "sdxl")])
def test_base_adapters_of_two_encoders(find, put, family, kinds):
    """ViT-H's where both can be used, else the one whose encoder is there."""
    other, vit_h = ("sd15_vit-G", "sd15") if kinds == "sd15" else ("sdxl", "sdxl_vit-h")
    put(
        {"a.safetensors": other, "b.safetensors": vit_h},
        {"g.safetensors": sparse.clip("ViT-bigG-14")},
    )
    assert find(family, "standard") == ("a.safetensors", "g.safetensors")
    put({}, {"h.safetensors": sparse.clip()})
    assert find(family, "standard") == ("b.safetensors", "h.safetensors")
    assert "smaller" in find.said


@pytest.mark.parametrize(
    "family, kind, preset, name, twin",
    [
        ("SD1.5", "sd15", "standard", "lightning", "a/ipLight-v1.1"),
        ("SD1.5", "sd15", "light", "ip-adapter_sd15_light", "ip-adapter_sd15"),
        ("SD1.5", "sd15_plus", "fine-grained", "surface", "plusface_sd15"),
        ("SDXL", "sdxl_plus", "face", "a/IPAdapterPlusFace", "ip-adapter-plus_sdxl_vit-h"),
    ],
)
def test_twins_go_by_name_with_a_warning(find, put, caplog, family, kind, preset, name, twin):
    files = f"{name}.safetensors", f"{twin}.safetensors"
    put(dict.fromkeys(files, kind), {"h.safetensors": sparse.vision()})
    assert find(family, preset)[0] == files[0]
    (warning,) = warnings(caplog)
    assert all(words in warning for words in ("only names", *files))
    assert "its name" in find.said and "In doubt: " in find.said


@pytest.mark.parametrize(
    "preset, name, kind, why",
    [
        ("light", "any", "sd15", "no name here says 'light'"),
        ("standard", "light", "sd15", "every name here says 'light'"),
        ("face", "plus", "sd15_plus", "no name here says 'face'"),
    ],
)
def test_no_name_rules_a_file_out(find, put, caplog, preset, name, kind, why):
    put({f"{name}.safetensors": kind}, {"h.safetensors": sparse.vision()})
    assert find("SD1.5", preset)[0] == f"{name}.safetensors"
    (warning,) = warnings(caplog)
    assert "may be the other kind" in warning and "https://huggingface.co" in warning
    assert why in find.said


def test_a_better_name_that_was_passed_over_is_told(find, put, folder, caplog):
    """In the node's text too, not in the log alone."""
    put(
        {"ip-adapter_sd15_light.safetensors": "sd15", "vit-G.safetensors": "sd15_vit-G"},
        {"g.safetensors": sparse.vision("ViT-bigG")},
    )
    light = folder / "ip-adapter_sd15_light.safetensors"
    os.truncate(light, light.stat().st_size - 1)
    assert find("SD1.5", "light")[0] == "vit-G.safetensors"
    for text in (warnings(caplog)[-1], find.said.splitlines()[-1]):
        assert f"'{light.name}', whose name is as expected" in text and "cut short" in text


def test_no_twin_no_warning(find, put, caplog):
    caplog.set_level(logging.INFO)
    put(
        {"full.safetensors": "sd15_full", "x.safetensors": "sdxl"},
        {"h.safetensors": sparse.vision()},
    )
    find("SD1.5", "full face")
    assert not warnings(caplog)
    assert "full.safetensors" in caplog.text and "h.safetensors" in caplog.text


def test_the_whole_encoder_that_published_adapters_know(find, put, caplog):
    """Widths alone would do for ViT-g, a CLIP of 378 pixels, or a tower without projection."""
    put(
        {"base.safetensors": "sd15", "plus.safetensors": "sd15_plus"},
        {"a.safetensors": sparse.clip("ViT-g-14"), "b.safetensors": LARGE, "c.safetensors": BARE},
    )
    assert find("SD1.5", "fine-grained")[1] == "c.safetensors"
    assert find("SD1.5", "standard")[1] in ("a.safetensors", "b.safetensors")
    assert any("another one" in warning for warning in warnings(caplog))
    put({}, {"z.safetensors": sparse.clip()})
    assert find("SD1.5", "standard")[1] == "z.safetensors"


def test_fifty_files_in_a_fifth_of_a_second(put, folder, real, nodes):
    """Of the node: the listing of the folders and a file of torch included."""
    from comfyui_ip_adapter.ip_adapter_core.comfyui import loaders
    from comfyui_ip_adapter.ip_adapter_core.files import adapter_file as checkpoint
    from comfyui_ip_adapter.ip_adapter_core.files import finder
    from comfyui_ip_adapter.nodes import paths

    kinds = list(sparse.ADAPTERS)
    towers = [sparse.vision(), sparse.vision("ViT-bigG"), sparse.clip(), sparse.tower()]
    put(
        {f"a{i}.safetensors": kinds[i % len(kinds)] for i in range(34)},
        {f"e{i}.safetensors": towers[i % len(towers)] for i in range(15)},
    )
    state = {key: torch.rand(shape).half() for key, shape in sparse.ADAPTERS["sd15"].items()}
    torch.save(state, folder / "a.bin")

    def seconds():
        start = time.process_time()  # not of the wall: other processes do not count
        nodes["IPA_AutoLoad"].fingerprint_inputs(preset="standard")
        loaders.find_files(real["SD1.5"], "standard", paths.adapters(), paths.encoders())
        return time.process_time() - start

    measured = []
    for _ in range(3):
        finder._remembered.cache_clear()
        checkpoint._layout.cache_clear()
        measured.append(seconds())
    assert min(measured) < 0.2


def test_encoders_that_the_host_cannot_load_are_left_out(find, put):
    short = sparse.vision("ViT-H", num_hidden_layers=31)
    put({"a.safetensors": "sd15"}, {"31.safetensors": short})
    with pytest.raises(
        FileNotFoundError, match=r"31\.safetensors.*size that ComfyUI does not know"
    ):
        find("SD1.5", "standard")


@pytest.mark.parametrize("name", sparse.SIZES)
def test_the_known_sizes_are_the_real_ones(host, name):
    """What the finder says of a file is what the host's own model of that size holds."""
    import comfy.clip_model
    import comfy.clip_vision
    from comfyui_ip_adapter.ip_adapter_core.comfyui import loaders

    width, layers, _, mlp, embed, pixels = sparse.SIZES[name]
    positions = (pixels // 14) ** 2 + 1
    assert loaders._known_sizes()[width, layers, mlp, positions] == embed
    file = {"ViT-L": "vitl", "ViT-L-336": "vitl_336", "ViT-H": "h", "ViT-bigG": "g"}[name]
    path = Path(comfy.clip_vision.__file__).with_name(f"clip_vision_config_{file}.json")
    model = comfy.clip_model.CLIPVisionModelProjection(
        json.loads(path.read_text()), torch.float16, "meta", comfy.ops.manual_cast
    )
    assert {k: tuple(x.shape) for k, x in model.state_dict().items()} == sparse.vision(name)


def refused(find, family, preset):
    with pytest.raises(FileNotFoundError) as error:
        find(family, preset)
    return str(error.value)


@pytest.mark.parametrize("family, preset", PRESETS)
def test_a_missing_adapter_is_described_with_its_address(
    find, put, folder, encoders, family, preset
):
    published = PRESETS[family, preset][1]
    put({"other.safetensors": "sdxl_plus" if family == "SD1.5" else "sd15"})
    (folder / "pointer.bin").write_text("version https://git-lfs.github.com/spec/v1\n")
    message = refused(find, family, preset)
    for words in (
        f"preset '{preset}'",
        family,
        str(folder),
        "other.safetensors': a ",
        "git-lfs pointer",
        f"Download {H94}/{published}.safetensors",
        f"save it as {folder / published.split('/')[1]}.safetensors",
        f"Download {H94}/models/image_encoder/model.safetensors",
        f"save it as {encoders / 'CLIP-ViT-H-14-laion2B-s32B-b79K.safetensors'}",
    ):
        assert words in message, f"{message} does not say {words}"
    put({}, {"h.safetensors": sparse.vision()})
    assert "image_encoder" not in refused(find, family, preset)


@pytest.mark.parametrize("preset", ["light", "full face"])
def test_what_is_not_published_for_sdxl(find, preset):
    message = refused(find, "SDXL", preset)
    assert f"For SDXL no '{preset}' adapter is published" in message
    assert "standard, fine-grained, face" in message
    assert "Download" not in message


def test_kolors_which_has_the_layers_of_sdxl(find, put, folder, encoders, caplog):
    kolors = "https://huggingface.co/Kwai-Kolors/Kolors-IP-Adapter-Plus/resolve/main"
    put(
        {"a.safetensors": "sdxl_plus"},
        {"a.safetensors": sparse.vision("ViT-L"), "h.safetensors": sparse.vision()},
    )
    message = refused(find, "Kolors", "fine-grained")
    for words in (
        "adapter (with a tensor 'image_proj.latents') for Kolors (70 cross-attention layers",
        "'a.safetensors': a fine-grained (plus) IP-Adapter for SDXL",
        f"Download {kolors}/ip_adapter_plus_general.bin and save it as {folder}",
        f"Download {kolors}/image_encoder/pytorch_model.bin and save it as {encoders}",
    ):
        assert words in message, f"{message} does not say {words}"
    put({"b.safetensors": "kolors_plus"}, {"z.safetensors": sparse.vision("ViT-L-336")})
    assert find("SDXL", "fine-grained") == ("a.safetensors", "h.safetensors")
    caplog.clear()
    assert find("Kolors", "fine-grained") == ("b.safetensors", "z.safetensors")
    assert "IP-Adapter for Kolors" in find.said and not warnings(caplog)
    (folder / "a.safetensors").unlink()
    assert "IP-Adapter for Kolors" in refused(find, "SDXL", "fine-grained")
    said = "For Kolors no 'standard' adapter is published. There are: fine-grained"
    assert said in refused(find, "Kolors", "standard")


def test_a_missing_encoder_is_described_with_its_address(find, put, encoders):
    put({"a.safetensors": "sdxl"}, {"l.safetensors": sparse.vision("ViT-L")})
    message = refused(find, "SDXL", "standard")
    for words in (
        "'a.safetensors'",
        "image embeds 1280 wide (CLIP ViT-bigG/14)",
        str(encoders),
        "'l.safetensors': an image encoder in the layout of transformers; image embeds 768 wide",
        f"Download {H94}/sdxl_models/image_encoder/model.safetensors",
        f"save it as {encoders / 'CLIP-ViT-bigG-14-laion2B-39B-b160k.safetensors'}",
    ):
        assert words in message, f"{message} does not say {words}"
    put({"b.safetensors": "sdxl_vit-h"})
    assert f"{H94}/models/image_encoder/model.safetensors" in refused(find, "SDXL", "standard")


@pytest.mark.parametrize(
    "noted, address",
    [
        ("open_clip:ViT-H-14/laion2b_s32b_b79k", True),
        ("image_encoder", True),  # tells nothing: by width
        ("open_clip:ViT-H-14/dfn5b", False),
    ],
)
def test_the_encoder_of_a_trained_adapter_is_described_too(find, folder, noted, address):
    metadata = {"ip_adapter": json.dumps({"image_encoder": noted})}
    sparse.write(folder / "mine.safetensors", sparse.ADAPTERS["sd15"], metadata)
    message = refused(find, "SD1.5", "standard")
    assert (f"Download {H94}/models/image_encoder" in message) is address
    assert ("was trained with ('open_clip:ViT-H-14/dfn5b')" in message) is not address


def test_of_many_files_the_first_are_listed_and_a_damaged_one_of_the_wanted_name_first(
    find, put, folder, encoders
):
    def listed():
        said = refused(find, "SD1.5", "standard")
        return said.partition("Found there instead:\n")[2].splitlines()

    put(
        {f"{i}.safetensors": "sdxl" for i in range(40)},
        {f"{i}.safetensors": sparse.vision("ViT-L") for i in range(40)},
    )
    for name in ("ip-adapter_sd15.bin", "0.bin"):
        (folder / name).touch()
    first, second, *rest = listed()
    assert first.startswith("- 'ip-adapter_sd15.bin' is empty")
    assert second.startswith("- '0.bin' is empty")
    assert any("and 37 more" in line for line in rest)
    put({"a.safetensors": "sd15"})
    (encoders / "CLIP-ViT-H-14-laion2B-s32B-b79K.safetensors").touch()
    assert listed()[0].startswith("- 'CLIP-ViT-H-14-laion2B-s32B-b79K.safetensors' is empty")


@pytest.mark.parametrize(
    "preset, layout, asked",
    [
        ("standard", sparse.vision(), False),
        ("standard", BARE, True),
        ("fine-grained", BARE, False),
        ("standard", LARGE, True),
        ("fine-grained", LARGE, True),
    ],
)
def test_an_encoder_that_would_not_do_is_asked_for_too(find, put, preset, layout, asked):
    put({}, {"e.safetensors": layout})
    assert ("It also needs an image encoder" in refused(find, "SD1.5", preset)) is asked


def test_no_folder_of_encoders_at_all(find, put, monkeypatch):
    import folder_paths

    monkeypatch.delitem(folder_paths.folder_names_and_paths, "clip_vision")
    put({"a.safetensors": "sd15"})
    with pytest.raises(FileNotFoundError, match="no folder is known"):
        find("SD1.5", "standard")


def test_no_adapter_for_the_model_or_no_such_preset(find, put):
    put({"a.safetensors": "sd15", "b.safetensors": "sdxl"}, {"h.safetensors": sparse.vision()})
    with pytest.raises(FileNotFoundError, match=r"(?s)SD2 .*only for SD1\.5 and SDXL"):
        find("SD2", "standard")
    with pytest.raises(ValueError, match="expected one of light, standard"):
        find("SD1.5", "plus")
