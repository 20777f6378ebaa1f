"""What IPA_AutoLoad says where a file is missing, or a model has no adapters."""

from __future__ import annotations

import json

import pytest
import torch

from tests.support import sparse_files as sparse

H94 = "https://huggingface.co/h94/IP-Adapter/resolve/main"
# Of each preset: what is at that address.
NAMES = {
    ("SD1.5", "light"): "models/ip-adapter_sd15_light",
    ("SD1.5", "standard"): "models/ip-adapter_sd15",
    ("SD1.5", "fine-grained"): "models/ip-adapter-plus_sd15",
    ("SD1.5", "face"): "models/ip-adapter-plus-face_sd15",
    ("SD1.5", "full face"): "models/ip-adapter-full-face_sd15",
    ("SDXL", "standard"): "sdxl_models/ip-adapter_sdxl_vit-h",
    ("SDXL", "fine-grained"): "sdxl_models/ip-adapter-plus_sdxl_vit-h",
    ("SDXL", "face"): "sdxl_models/ip-adapter-plus-face_sdxl_vit-h",
}


@pytest.mark.parametrize("family, preset", NAMES)
def test_a_missing_adapter_is_described_with_its_address(
    find, put, folder, encoders, family, preset
):
    name = NAMES[family, preset]
    put({"other.safetensors": "sdxl_plus" if family == "SD1.5" else "sd15"})
    (folder / "pointer.bin").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(FileNotFoundError) as error:
        find(family, preset)
    message = str(error.value)
    for words in (
        f"preset '{preset}'",
        family,
        str(folder),
        "other.safetensors': a ",
        "git-lfs pointer",
        f"Download {H94}/{name}.safetensors",
        f"save it as {folder / name.split('/')[1]}.safetensors",
        f"Download {H94}/models/image_encoder/model.safetensors",
        f"save it as {encoders / 'CLIP-ViT-H-14-laion2B-s32B-b79K.safetensors'}",
    ):
        assert words in message, f"{message} does not say {words}"
    put({}, {"h.safetensors": sparse.vision()})
    with pytest.raises(FileNotFoundError) as error:
        find(family, preset)
    assert "image_encoder" not in str(error.value)


@pytest.mark.parametrize("preset", ["light", "full face"])
def test_what_is_not_published_for_sdxl(find, preset):
    with pytest.raises(FileNotFoundError) as error:
        find("SDXL", preset)
    message = str(error.value)
    assert f"For SDXL no '{preset}' adapter is published" in message
    assert "standard, fine-grained, face" in message
    assert "Download" not in message


def test_a_missing_encoder_is_described_with_its_address(find, put, encoders):
    put({"a.safetensors": "sdxl"}, {"l.safetensors": sparse.vision("ViT-L")})
    with pytest.raises(FileNotFoundError) as error:
        find("SDXL", "standard")
    message = str(error.value)
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
    with pytest.raises(FileNotFoundError) as error:
        find("SDXL", "standard")
    assert f"{H94}/models/image_encoder/model.safetensors" in str(error.value)


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
    with pytest.raises(FileNotFoundError) as error:
        find("SD1.5", "standard")
    assert (f"Download {H94}/models/image_encoder" in str(error.value)) is address
    assert ("was trained with ('open_clip:ViT-H-14/dfn5b')" in str(error.value)) is not address


def test_many_files_are_not_all_listed(find, put, folder):
    put({f"{i}.safetensors": "sdxl" for i in range(40)})
    (folder / "0.bin").touch()
    with pytest.raises(FileNotFoundError, match="and 36 more"):
        find("SD1.5", "standard")


def test_a_damaged_file_of_the_wanted_name_is_listed_first(find, put, folder, encoders):
    """Among more files than are listed."""
    put(
        {f"{i}.safetensors": "sdxl" for i in range(40)},
        {f"{i}.safetensors": sparse.vision("ViT-L") for i in range(40)},
    )
    for place, name in ((folder, "ip-adapter_sd15.bin"), (folder, "0.bin")):
        (place / name).touch()
    with pytest.raises(FileNotFoundError) as error:
        find("SD1.5", "standard")
    listed = str(error.value).partition("Found there instead:\n")[2].splitlines()
    assert listed[0].startswith("- 'ip-adapter_sd15.bin' is empty")
    assert listed[1].startswith("- '0.bin' is empty")
    put({"a.safetensors": "sd15"})
    (encoders / "CLIP-ViT-H-14-laion2B-s32B-b79K.safetensors").touch()
    with pytest.raises(FileNotFoundError) as error:
        find("SD1.5", "standard")
    listed = str(error.value).partition("Found there instead:\n")[2].splitlines()
    assert listed[0].startswith("- 'CLIP-ViT-H-14-laion2B-s32B-b79K.safetensors' is empty")


BARE = {k: x for k, x in sparse.vision().items() if k != "visual_projection.weight"}
LARGE = {**sparse.tower(), "positional_embedding": (730, 1280)}  # 378 pixels


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
    with pytest.raises(FileNotFoundError) as error:
        find("SD1.5", preset)
    assert ("It also needs an image encoder" in str(error.value)) is asked


def test_no_folder_of_encoders_at_all(find, put, monkeypatch):
    import folder_paths

    monkeypatch.delitem(folder_paths.folder_names_and_paths, "clip_vision")
    put({"a.safetensors": "sd15"})
    with pytest.raises(FileNotFoundError, match="no folder is known"):
        find("SD1.5", "standard")


def test_models_without_adapters(find, put, real):
    put({"a.safetensors": "sd15", "b.safetensors": "sdxl"}, {"h.safetensors": sparse.vision()})
    with pytest.raises(FileNotFoundError, match=r"(?s)SD2 .*only for SD1\.5 and SDXL"):
        find("SD2", "standard")
    from comfy.model_patcher import ModelPatcher

    flux = torch.nn.Module()
    flux.diffusion_model = torch.nn.Linear(1, 1)
    real["Flux"] = ModelPatcher(flux, load_device="cpu", offload_device="cpu")
    with pytest.raises(ValueError, match=r"no UNet cross-attention.*SD1\.5 and SDXL"):
        find("Flux", "standard")
    with pytest.raises(ValueError, match="expected one of light, standard"):
        find("SD1.5", "plus")
