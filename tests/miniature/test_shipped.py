"""What is shipped: whole, small, and the same in ComfyUI, open_clip and training."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from ip_adapter_core.variants import FEATURE_KINDS
from miniature import base, build, files, image_encoder, setup, workflows
from miniature.drawing import WORKFLOWS
from miniature.metrics import distance
from miniature.scenes import outlined, render, scenes
from training.models.base import load_base
from training.models.image_encoder import ImageEncoder

LIMIT = 32_000_000


def apart(found, expected):
    return float((found - expected).abs().max() / expected.abs().max())


def test_files_are_those_of_the_manifest_and_small():
    shipped = files.manifest()["files"]
    found = {path.name for path in files.FOLDER.iterdir()}
    assert {*shipped, files.MANIFEST, "README.md"} == found
    for name, what in shipped.items():
        path = files.FOLDER / name
        assert files.checksum(path) == what["sha256"], name
        assert path.stat().st_size == what["bytes"]
    assert sum(path.stat().st_size for path in files.FOLDER.iterdir()) <= LIMIT


def test_the_card_names_every_file():
    card = (files.FOLDER / "README.md").read_text("utf-8")
    for name in files.manifest()["files"]:
        assert f"`{name}`" in card


def test_eight_bits_are_a_hundredth_of_a_channel_off():
    state = {"a.weight": torch.randn(7, 5, 3, 3), "a.bias": torch.randn(7)}
    found = files.dequantised(files.quantised(state))
    assert found.keys() == state.keys()
    largest = state["a.weight"].flatten(1).abs().amax(1)[:, None, None, None]
    assert float(((found["a.weight"].float() - state["a.weight"]).abs() / largest).max()) < 0.006
    assert apart(found["a.bias"].float(), state["a.bias"]) < 1e-3


def test_set_up_again_nothing_is_made_and_after_a_change_all_is(world, monkeypatch, tmp_path):
    checkpoint = world / "models" / "checkpoints" / workflows.CHECKPOINT
    before = checkpoint.stat().st_mtime_ns
    setup.ensure()
    assert checkpoint.stat().st_mtime_ns == before
    monkeypatch.setenv(setup.FOLDER_VARIABLE, str(tmp_path))
    assert setup.ensure() == tmp_path
    assert files.checksum(tmp_path / "models" / "checkpoints" / checkpoint.name) == files.checksum(
        checkpoint
    )
    stamp = tmp_path / "made.json"
    stamp.write_text(json.dumps({"shipped": {}}))
    reference = tmp_path / "input" / "reference.png"
    reference.write_bytes(b"old")
    setup.ensure()
    assert reference.stat().st_size > 1000


def test_training_and_diffusers_read_the_checkpoint(world):
    """The UNet that training loads from the file is the one that was trained."""
    loaded = load_base(str(world / "models" / "checkpoints" / workflows.CHECKPOINT))
    unet = base.new(0)
    state = files.dequantised(load_file(files.FOLDER / files.UNET))
    unet.load_state_dict({key: x.float() for key, x in state.items()})
    given = torch.randn(2, 4, 8, 8), torch.tensor([10, 900]), torch.randn(2, 77, 768)
    with torch.inference_mode():
        assert apart(loaded.unet(*given).sample, unet(*given).sample) < 1e-4
        pictures = render(scenes(1, 2))
        vae = files.autoencoder(files.FOLDER / files.AUTOENCODER)
        latents = loaded.vae.encode(pictures * 2 - 1).latents
        assert apart(latents, vae.encode(pictures)) < 1e-2


def test_the_image_encoder_is_the_same_in_comfyui_open_clip_and_training(pack, world):
    from comfyui_ip_adapter.ip_adapter_core.comfyui.loaders import load_image_encoder

    path = world / "models" / "clip_vision" / workflows.ENCODER
    pictures = (render(scenes(2, 3)) * 255).round() / 255
    out = load_image_encoder(path).encode_image(pictures.movedim(1, -1))
    pixels = image_encoder.normalised(pictures)
    with torch.inference_mode():
        assert apart(out["image_embeds"], image_encoder.tower(path)(pixels)) < 1e-3
        found = ImageEncoder.from_name(f"open_clip:{path}").features(pixels, FEATURE_KINDS)
    assert apart(out["image_embeds"], found["image_embeds"]) < 1e-3
    assert apart(out["penultimate_hidden_states"], found["penultimate_hidden_states"]) < 1e-3


@pytest.mark.parametrize("name", ["text_and_image", "per_prompt", "several_images_masks"])
def test_workflows_keep_their_graph_on_the_miniature(workflow, name):
    before = workflow(name)
    after = workflows.on_miniature(before, "a star")
    assert before == workflow(name)
    assert after.keys() == before.keys()
    texts = [n["inputs"]["text"] for n in after.values() if n["class_type"] == "CLIPTextEncode"]
    assert set(texts) <= {"", "a star"}
    for key, node in after.items():
        links = {k: v for k, v in node["inputs"].items() if isinstance(v, list)}
        assert links == {k: v for k, v in before[key]["inputs"].items() if isinstance(v, list)}
    named = json.dumps(after)
    assert "v1-5" not in named and "CLIP-ViT" not in named and "_sd15" not in named


NAMES = sorted(path.stem for path in WORKFLOWS.glob("*.json") if path.stem != "sdxl")


@pytest.mark.parametrize("name", NAMES)
def test_the_editors_workflow_says_on_the_miniature_what_the_api_does(workflow, name):
    """Node by node: the same classes, and every value of the API's among the editor's widgets."""
    editor = json.loads((WORKFLOWS.parent / f"{name}.json").read_text("utf-8"))
    shown = {str(node["id"]): node for node in workflows.in_editor(editor, "a star")["nodes"]}
    for key, node in workflows.on_miniature(workflow(name), "a star").items():
        assert shown[key]["type"] == node["class_type"]
        values = [value for value in node["inputs"].values() if not isinstance(value, list)]
        for value in values:
            assert value in shown[key]["widgets_values"], (node["class_type"], value)


def test_an_adapters_idle_layer_is_left_out_and_put_back(world):
    """The shipped file lacks it; the one that ComfyUI reads has it, as zeros, and nothing else."""
    shipped = load_file(files.FOLDER / files.ADAPTER)
    laid = load_file(world / "models" / "ipadapter" / workflows.ADAPTERS["base"])
    added = laid.keys() - shipped.keys()
    assert added == {"ip_adapter.1.to_k_ip.weight", "ip_adapter.1.to_v_ip.weight"}
    assert not any(laid[key].any() for key in added)
    assert all(torch.equal(laid[key], shipped[key]) for key in shipped)


def test_a_folder_without_a_build_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr(files, "FOLDER", tmp_path)
    with pytest.raises(FileNotFoundError, match="IP_ADAPTER_BUILD"):
        files.manifest()


def test_the_manifest_is_of_the_recipe():
    """Seed, steps, settings and set are those that the one command has today."""
    shipped = files.manifest()
    asked = build.Build(shipped["seed"], files.FOLDER).recipe()
    assert {key: shipped[key] for key in asked} == asked
    each = shipped["seconds"].keys() | shipped["side_by_side"].keys()
    assert each >= {"autoencoder", "base 1", files.ADAPTER, "control"}
    assert shipped["seconds_in_all"] == sum(shipped["seconds"].values())
    made = files.made()
    assert made["seed"] == shipped["seed"]
    assert abs(made["minutes"] * 60 - shipped["seconds_in_all"]) <= 30
    assert made["on"] == shipped["made_on"]


def test_builds_of_one_recipe_are_known(monkeypatch):
    shipped = files.manifest()
    recipe = files.made()["recipe"]

    def of(**changes):
        monkeypatch.setattr(files, "manifest", lambda: {**shipped, **changes})
        return files.made()["recipe"]

    others = {"seconds": {}, "side_by_side": {}, "files": {}}
    assert of(seed=99, made_on="another", seconds_in_all=1, **others) == recipe
    assert of(steps={**shipped["steps"], "control": 1}) != recipe
    assert of(scenes="others") != recipe
    assert of(adapters={**shipped["adapters"], "batch_size": 1}) != recipe


def test_the_autoencoder_keeps_both_styles():
    vae = files.autoencoder(files.FOLDER / files.AUTOENCODER)
    rows = scenes(1 << 41, 64)
    for draw, levels in ((render, 6), (outlined, 9)):
        pictures = draw(rows)
        with torch.inference_mode():
            found = vae.decode(vae.encode(pictures))
        assert distance(found, pictures) < levels, draw


def test_an_interrupted_set_up_is_not_taken_for_done(monkeypatch, tmp_path):
    monkeypatch.setenv(setup.FOLDER_VARIABLE, str(tmp_path))

    def interrupted():
        raise KeyboardInterrupt

    stamp = tmp_path / "made.json"
    stamp.write_text(json.dumps({"shipped": {}}))
    monkeypatch.setattr(setup, "_models", interrupted)
    with pytest.raises(KeyboardInterrupt):
        setup.ensure()
    assert not stamp.exists()


def test_another_build_has_a_base_directory_of_its_own(monkeypatch, tmp_path):
    monkeypatch.delenv(setup.FOLDER_VARIABLE, raising=False)
    ours = setup.base_directory()
    monkeypatch.setattr(files, "FOLDER", tmp_path)
    assert setup.base_directory() not in (ours, tmp_path)
