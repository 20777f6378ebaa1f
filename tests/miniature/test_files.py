"""What is shipped: whole, small, and the same in ComfyUI, open_clip and training."""

from __future__ import annotations

import json

import pytest
import torch
from open_clip.model import CLIP
from safetensors.torch import load_file

from ip_adapter_core.variants import FEATURE_KINDS
from miniature import assemble, base, build, files, models, workflows
from miniature.metrics import distance
from miniature.scenes import outlined, render, scenes
from training.models.base import load_base
from training.models.image_encoder import ImageEncoder

LIMIT = 32_000_000


def apart(found, expected):
    return float((found - expected).abs().max() / expected.abs().max())


def test_files_are_those_of_the_manifest_and_small():
    shipped = files.manifest()["files"]
    assert {*shipped} == {path.name for path in files.FOLDER.glob("*.safetensors")}
    for name, what in shipped.items():
        path = files.FOLDER / name
        assert files.checksum(path) == what["sha256"], name
        assert path.stat().st_size == what["bytes"]
    assert sum(what["bytes"] for what in shipped.values()) <= LIMIT
    card = (files.FOLDER / "README.md").read_text("utf-8")
    assert all(f"`{name}`" in card for name in shipped)


def test_the_manifest_is_of_the_recipe():
    """Seed, steps, settings and set are those that the one command has today."""
    shipped = files.manifest()
    asked = build.Build(shipped["seed"], files.FOLDER).recipe()
    assert {key: shipped[key] for key in asked} == asked
    assert shipped.keys() - asked.keys() == {*files.NOT_ASKED}
    each = shipped["seconds"].keys() | shipped["side_by_side"].keys()
    assert each >= {"autoencoder", "base 1", files.ADAPTER, "control"}
    assert shipped["seconds_in_all"] == sum(shipped["seconds"].values())
    made = files.made()
    assert made["recipe"] == "c3ef7c8a2823ac9c"  # builds of one recipe are compared by it
    assert made["seed"] == shipped["seed"] and made["on"] == shipped["made_on"]
    assert abs(made["minutes"] * 60 - shipped["seconds_in_all"]) <= 30


def test_builds_of_one_recipe_are_known(monkeypatch):
    shipped, recipe = files.manifest(), files.made()["recipe"]

    def of(**changes):
        monkeypatch.setattr(files, "manifest", lambda: {**shipped, **changes})
        return files.made()["recipe"]

    others = {"made_on": "another", "seconds": {}, "side_by_side": {}, "files": {}}
    assert of(seed=99, seconds_in_all=1, **others) == recipe
    assert of(steps={**shipped["steps"], "control": 1}) != recipe
    assert of(scenes="others") != recipe
    assert of(adapters={**shipped["adapters"], "train_batch_size": 1}) != recipe


def test_a_folder_without_a_build_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr(files, "FOLDER", tmp_path)
    with pytest.raises(FileNotFoundError, match="IP_ADAPTER_BUILD"):
        files.manifest()


def test_eight_bits_are_a_hundredth_of_a_channel_off():
    state = {"a.weight": torch.randn(7, 5, 3, 3), "a.bias": torch.randn(7)}
    found = files.dequantized(files.quantized(state))
    assert found.keys() == state.keys()
    largest = state["a.weight"].flatten(1).abs().amax(1)[:, None, None, None]
    assert float(((found["a.weight"].float() - state["a.weight"]).abs() / largest).max()) < 0.006
    assert apart(found["a.bias"].float(), state["a.bias"]) < 1e-3


def test_training_and_diffusers_read_the_checkpoint(base_directory):
    """The UNet that training loads from the file is the one that was trained."""
    loaded = load_base(str(base_directory / "models" / "checkpoints" / workflows.CHECKPOINT))
    unet = files.frozen(base.new(0), files.FOLDER / files.UNET)
    given = torch.randn(2, 4, 8, 8), torch.tensor([10, 900]), torch.randn(2, 77, 768)
    with torch.inference_mode():
        assert apart(loaded.unet(*given).sample, unet(*given).sample) < 1e-4
        images = render(scenes(1, 2))
        vae = files.autoencoder(files.FOLDER / files.AUTOENCODER)
        latents = loaded.vae.encode(images * 2 - 1).latents
        assert apart(latents, vae.encode(images)) < 1e-2


def test_the_image_encoder_is_the_same_in_comfyui_open_clip_and_training(pack, base_directory):
    from comfyui_ip_adapter.ip_adapter_core.comfyui.loaders import load_image_encoder

    path = base_directory / "models" / "clip_vision" / workflows.ENCODER
    images = (render(scenes(2, 3)) * 255).round() / 255
    out = load_image_encoder(path).encode_image(images.movedim(1, -1))
    pixels = models.normalized(images)
    with torch.inference_mode():
        assert apart(out["image_embeds"], models.image_tower(path)(pixels)) < 1e-3
        found = ImageEncoder.from_name(f"open_clip:{path}").features(pixels, FEATURE_KINDS)
    assert apart(out["image_embeds"], found["image_embeds"]) < 1e-3
    assert apart(out["penultimate_hidden_states"], found["penultimate_hidden_states"]) < 1e-3


def test_an_adapters_idle_layer_is_left_out_and_put_back(base_directory):
    """The shipped file lacks it; the one that ComfyUI reads has it, as zeros, and nothing else."""
    shipped = load_file(files.FOLDER / files.ADAPTER)
    laid = load_file(base_directory / "models" / "ipadapter" / workflows.ADAPTERS["base"])
    added = laid.keys() - shipped.keys()
    assert added == {"ip_adapter.1.to_k_ip.weight", "ip_adapter.1.to_v_ip.weight"}
    assert not any(laid[key].any() for key in added)
    assert all(torch.equal(laid[key], shipped[key]) for key in shipped)


def test_the_autoencoder_keeps_both_styles():
    vae = files.autoencoder(files.FOLDER / files.AUTOENCODER)
    for draw, levels in ((render, 6), (outlined, 9)):
        images = draw(scenes(1 << 41, 64))
        with torch.inference_mode():
            found = vae.decode(vae.encode(images))
        assert distance(found, images) < levels, draw


def test_set_up_again_nothing_is_made_and_after_a_change_all_is(
    base_directory, monkeypatch, tmp_path
):
    checkpoint = base_directory / "models" / "checkpoints" / workflows.CHECKPOINT
    before = checkpoint.stat().st_mtime_ns
    assemble.ensure()
    assert checkpoint.stat().st_mtime_ns == before
    monkeypatch.setenv("IP_ADAPTER_MINIATURE", str(tmp_path))
    assert assemble.ensure() == tmp_path
    copy = tmp_path / "models" / "checkpoints" / checkpoint.name
    assert files.checksum(copy) == files.checksum(checkpoint)
    stamp = tmp_path / "made.json"
    stamp.write_text(json.dumps({"shipped": {}}))
    reference = tmp_path / "input" / "reference.png"
    reference.write_bytes(b"old")
    assemble.ensure()
    assert reference.stat().st_size > 1000


def test_an_interrupted_set_up_is_not_taken_for_done(monkeypatch, tmp_path):
    monkeypatch.setenv(assemble.FOLDER_VARIABLE, str(tmp_path))
    stamp = tmp_path / "made.json"
    stamp.write_text(json.dumps({"shipped": {}}))

    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(assemble, "_models", interrupted)
    with pytest.raises(KeyboardInterrupt):
        assemble.ensure()
    assert not stamp.exists()


def test_another_build_has_a_base_directory_of_its_own(monkeypatch, tmp_path):
    monkeypatch.delenv(assemble.FOLDER_VARIABLE, raising=False)
    ours = assemble.base_directory()
    monkeypatch.setattr(files, "FOLDER", tmp_path)
    assert assemble.base_directory() not in (ours, tmp_path)


def test_the_same_weights_make_the_same_file(tmp_path):
    """Metadata of several entries would come in another order from one time to the next."""
    written = set()
    for number in range(12):
        path = tmp_path / f"{number}.safetensors"
        torch.manual_seed(0)
        files.save_encoder(path, CLIP(**models.ENCODER))
        written.add(path.read_bytes())
    assert len(written) == 1
