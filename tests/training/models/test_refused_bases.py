"""What is no base of SD1.5 or SDXL, or not the whole of one, is refused with a reason."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from training.errors import TrainingError
from training.models.base import load_base


def with_config(folder, part, **changes):
    path = folder / part / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("name", ["missing.safetensors", "missing/model.ckpt"])
def test_no_such_file(name, tmp_path):
    with pytest.raises(TrainingError, match="does not exist"):
        load_base(str(tmp_path / name))


def test_neither_here_nor_on_the_hub(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # no retries
    with pytest.raises(TrainingError, match="neither a file nor a folder here"):
        load_base("nobody/no-such-model")


def test_a_folder_of_something_else(tmp_path):
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(TrainingError, match=r"unet/, vae/.*found notes\.txt"):
        load_base(str(tmp_path))


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "scheduler"])
def test_a_part_is_missing(part, folders, copied):
    folder = copied(folders["sd15"])
    shutil.rmtree(folder / part)
    with pytest.raises(TrainingError, match=part):
        load_base(str(folder))


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_a_part_lacks_a_tensor(part, folders, copied):
    folder = copied(folders["sd15"])
    (path,) = (folder / part).glob("*.safetensors")
    state = load_file(path)
    lost = next(key for key in state if key.endswith("norm1.weight"))
    save_file({k: v for k, v in state.items() if k != lost}, path, {"format": "pt"})
    with pytest.raises(TrainingError, match=f"{part} is incomplete"):
        load_base(str(folder))


def test_a_folder_of_another_family(folders, copied):
    folder = copied(folders["sd15"])
    with_config(folder, "unet", cross_attention_dim=1024)
    with pytest.raises(TrainingError, match="Stable Diffusion 2"):
        load_base(str(folder))
    with_config(folder, "unet", addition_embed_type="image")
    with pytest.raises(TrainingError, match="another kind"):
        load_base(str(folder))
    with_config(folder, "unet", in_channels=9)
    with pytest.raises(TrainingError, match="9 channels"):
        load_base(str(folder))


@pytest.mark.parametrize(
    ("key", "named"),
    [
        ("cond_stage_model.model.ln_final.weight", "Stable Diffusion 2"),
        ("conditioner.embedders.0.model.ln_final.weight", "refiner"),
        ("model.diffusion_model.joint_blocks.0.weight", "Stable Diffusion 3"),
        ("model.diffusion_model.double_blocks.0.weight", "Flux"),
        ("down_blocks.0.weight", "diffusers' layout"),
        ("control_model.input_blocks.0.0.weight", "ControlNet"),
        ("image_proj.proj.weight", "IP-Adapter"),
        ("lora_unet_x.weight", "LoRA"),
        ("something.weight", "has no UNet"),
    ],
)
def test_a_file_of_another_kind(key, named, tmp_path):
    path = tmp_path / "other.safetensors"
    save_file({key: torch.zeros(1)}, path)
    with pytest.raises(TrainingError, match=named):
        load_base(str(path))


def test_an_inpainting_file(files, tmp_path):
    key = "model.diffusion_model.input_blocks.0.0.weight"
    state = load_file(files["sd15"])
    state[key] = torch.zeros(32, 9, 3, 3)
    save_file(state, tmp_path / "inpaint.safetensors")
    with pytest.raises(TrainingError, match="9 channels"):
        load_base(str(tmp_path / "inpaint.safetensors"))


@pytest.mark.parametrize(
    ("family", "prefix", "named"),
    [
        ("sd15", "first_stage_model.", "no complete VAE"),
        ("sd15", "cond_stage_model.", "no complete text encoder"),
        ("sdxl", "conditioner.embedders.1.", "no complete second text encoder"),
    ],
)
def test_a_file_without_a_part(family, prefix, named, files, tmp_path):
    state = load_file(files[family])
    path = tmp_path / "part.safetensors"
    save_file({k: v for k, v in state.items() if not k.startswith(prefix)}, path)
    with pytest.raises(TrainingError, match=named):
        load_base(str(path))


@pytest.mark.parametrize(
    "lost",
    [
        "model.diffusion_model.out.0.weight",
        "first_stage_model.decoder.norm_out.bias",
        "cond_stage_model.transformer.text_model.final_layer_norm.bias",
    ],
)
def test_a_file_that_lacks_a_tensor(lost, files, tmp_path):
    state = load_file(files["sd15"])
    path = tmp_path / "part.safetensors"
    save_file({k: v for k, v in state.items() if k != lost}, path)
    with pytest.raises(TrainingError, match="lacks tensors of the"):
        load_base(str(path))


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_a_file_cut_short(suffix, files, tmp_path):
    path = tmp_path / f"cut{suffix}"
    state = load_file(files["sd15"])
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(TrainingError, match="cannot be read as a model"):
        load_base(str(path))
