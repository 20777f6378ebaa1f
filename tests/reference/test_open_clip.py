"""IPA_LoadImageEncoder's encoders against open_clip itself and transformers, on equal weights."""

from __future__ import annotations

import json
from typing import Any

import open_clip
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from safetensors.torch import save_file

from ip_adapter_core.variants import FEATURE_KINDS
from tests.support import random_models, small_models
from training.errors import TrainingError
from training.models.image_encoder import ImageEncoder

SIDE = small_models.SIDE
COLOURS = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.25]}
PLAIN: dict[str, dict[str, Any]] = {
    "usual": {},
    "quick_gelu": {"quick_gelu": True},
    "other sizes": {"width": 96, "layers": 4, "embed": 24},
}
ODD: dict[str, dict[str, Any]] = {  # open_clip's own only
    "layer scale": {"ls_init_value": 0.5},
    "mean of all": {"pool_type": "avg", "final_ln_after_pool": True},
    "no norm before": {"no_ln_pre": True},
    "attention pooling": {
        "attentional_pool": True,
        "attn_pooler_queries": 9,
        "output_tokens": False,
    },
}


def config(quick_gelu: bool = False, vision: dict[str, Any] | None = None, **sizes) -> dict:
    made = small_models.open_clip_config(**sizes)
    made["vision_cfg"] |= vision or {}
    return made | ({"quick_gelu": True} if quick_gelu else {})


def model(config: dict[str, Any]) -> Any:
    made = random_models.fill(open_clip.model.CLIP(**config), 4)
    made.load_state_dict({k: x.half().float() for k, x in made.state_dict().items()})
    return made.eval().requires_grad_(False)


def saved(path, made, config, where="inside", preprocess=COLOURS):
    """A file as ComfyUI's folder may hold it; `where` its configuration is."""
    text = json.dumps({"model_cfg": config, "preprocess_cfg": preprocess})
    state = {key: x.contiguous() for key, x in made.state_dict().items()}
    if where == "inside":
        save_file(state, path, metadata={"open_clip_config": text})
    elif where == "beside":
        save_file({k: x for k, x in state.items() if k.startswith("visual.")}, path)
        path.with_suffix(".json").write_text(text)
    elif where == "in the folder":
        save_file(state, path)
        path.with_name("open_clip_config.json").write_text(text)
    else:  # of open_clip's own training, the model's configuration without colours
        prefixed = {f"module.{key}": x for key, x in state.items()}
        torch.save({"epoch": 3, "state_dict": prefixed, "name": "a run"}, path)
        path.with_suffix(".json").write_text(json.dumps(config))
    return path


@pytest.fixture
def load(pack):
    from comfyui_ip_adapter.ip_adapter_core.comfyui.loaders import load_image_encoder

    return load_image_encoder


def pictures(count=2, height=SIDE, width=SIDE):
    """Of 8 bits, so that no preprocessing has to round."""
    coarse = torch.rand(count, 3, 5, 7, generator=torch.Generator().manual_seed(1))
    large = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")
    return (large.movedim(1, -1) * 255).round() / 255


def normalised(images, colours=COLOURS):
    mean, std = torch.tensor(colours["mean"]), torch.tensor(colours["std"])
    return ((images - mean) / std).movedim(-1, 1)


def apart(found, expected):
    assert found.shape == expected.shape
    return float((found - expected).abs().max() / expected.abs().max())


def open_clips(made, pixels):
    """Embeddings and penultimate states, from a hook on the last block."""
    seen = []
    hook = made.visual.transformer.resblocks[-1].register_forward_pre_hook(
        lambda _, given: seen.append(given[0])
    )
    embeds = made.encode_image(pixels)
    hook.remove()
    return embeds[0] if isinstance(embeds, tuple) else embeds, seen[0]


@pytest.mark.parametrize("where", ["inside", "beside", "in the folder", "pickled"])
@pytest.mark.parametrize("kind", PLAIN)
def test_open_clip_transformers_and_the_host_agree(load, tmp_path, kind, where):
    sizes = config(**PLAIN[kind])
    made = model(sizes)
    name = "tower.pt" if where == "pickled" else "tower.safetensors"
    colours = PreprocessCfg() if where == "pickled" else PreprocessCfg(**COLOURS)
    encoder = load(saved(tmp_path / name, made, sizes, where))
    images = pictures()
    out = encoder.encode_image(images)
    pixels = normalised(images, {"mean": colours.mean, "std": colours.std})
    embeds, states = open_clips(made, pixels)
    theirs = small_models.as_transformers(made.visual)(
        pixel_values=pixels, output_hidden_states=True
    )
    for embeds_, states_ in ((embeds, states), (theirs.image_embeds, theirs.hidden_states[-2])):
        assert apart(out["image_embeds"], embeds_) < 1e-3
        assert apart(out["penultimate_hidden_states"], states_) < 1e-3


@pytest.mark.parametrize("kind", ODD)
def test_towers_that_the_host_does_not_have_run_in_open_clip(load, tmp_path, kind):
    sizes = config(vision=ODD[kind])
    made = model(sizes)
    encoder = load(saved(tmp_path / "odd.safetensors", made, sizes))
    out = encoder.encode_image(pictures())
    embeds, states = open_clips(made, normalised(pictures()))
    assert apart(out["image_embeds"], embeds) < 1e-3
    assert apart(out["penultimate_hidden_states"], states) < 1e-3


@pytest.mark.parametrize("vision", [
    {"layers": [1, 1, 1, 1], "width": 32, "patch_size": None},
    {"timm_model_name": "convnext_atto", "timm_pool": "avg", "timm_proj": "linear"},
], ids=["ResNet", "ConvNeXt"])  # fmt: skip
def test_towers_without_hidden_states_have_embeddings(load, tmp_path, vision):
    torch.manual_seed(0)
    sizes = config(vision={**vision, "image_size": 64})
    made = open_clip.model.CLIP(**sizes).eval()
    out = load(saved(tmp_path / "net.safetensors", made, sizes)).encode_image(pictures(2, 64, 64))
    expected = made.encode_image(normalised(pictures(2, 64, 64)))
    assert apart(out["image_embeds"], expected) < 1e-3
    assert out["penultimate_hidden_states"].numel() == 0


def test_a_file_of_vit_h_in_open_clips_own_layout_needs_no_configuration(load, tmp_path):
    """Of two layers; width, patches and heads are ViT-H/14's."""
    sizes = open_clip.get_model_config("ViT-H-14")
    sizes["vision_cfg"] |= {"layers": 2, "image_size": 56}
    sizes["text_cfg"] |= {"layers": 1, "width": 64, "heads": 1}
    made = model(sizes)
    path = tmp_path / "vit-h.safetensors"
    save_file({key: x.contiguous() for key, x in made.state_dict().items()}, path)
    encoder = load(path)
    assert encoder.image_size == 56
    images = pictures(1, 56, 56)
    defaults = PreprocessCfg()
    pixels = normalised(images, {"mean": defaults.mean, "std": defaults.std})
    embeds, states = open_clips(made, pixels)
    out = encoder.encode_image(images)
    assert apart(out["image_embeds"], embeds) < 1e-3
    assert apart(out["penultimate_hidden_states"], states) < 1e-3


@pytest.mark.parametrize("shape", [(SIDE, SIDE), (100, 100), (90, 150), (301, 200)])
def test_preprocessing_is_open_clips_to_an_8_bit_level_in_the_mean(load, tmp_path, shape):
    from comfy.clip_model import clip_preprocess

    sizes = config()
    encoder = load(saved(tmp_path / "tower.safetensors", model(sizes), sizes))
    images = pictures(1, *shape)
    seen = clip_preprocess(images, encoder.image_size, encoder.image_mean, encoder.image_std)
    transform = image_transform_v2(PreprocessCfg(size=SIDE, **COLOURS), is_train=False)
    expected = transform(Image.fromarray((images[0] * 255).round().byte().numpy()))
    levels = (seen[0] - expected).abs() * torch.tensor(COLOURS["std"])[:, None, None] * 255
    assert float(levels.mean()) < 1


def test_training_reads_the_same_file(load, tmp_path):
    sizes = config()
    path = saved(tmp_path / "tower.safetensors", model(sizes), sizes)
    theirs = ImageEncoder.from_name(f"open_clip:{path}")
    images = pictures()
    out = load(path).encode_image(images)
    found = theirs.features(normalised(images), FEATURE_KINDS)
    assert apart(out["image_embeds"], found["image_embeds"]) < 1e-3
    assert apart(out["penultimate_hidden_states"], found["penultimate_hidden_states"]) < 1e-3
    picture = Image.fromarray((images[0] * 255).round().byte().numpy())
    assert apart(theirs.preprocess(picture), normalised(images)[0]) < 1e-6


@pytest.mark.parametrize("vision", [{}, ODD["layer scale"]], ids=["the host's", "open_clip's"])
def test_it_encodes_image_prompts_and_leaves_the_device_when_asked(pack, load, tmp_path, vision):
    import comfy.model_management
    from comfyui_ip_adapter.ip_adapter_core.comfyui.encode import encode

    sizes = config(vision=vision)
    made = model(sizes)
    encoder = load(saved(tmp_path / "tower.safetensors", made, sizes))
    prompt = encode(encoder, pictures(2, 80, 50), None, "center")
    _, zero = open_clips(made, torch.zeros(1, 3, SIDE, SIDE))
    assert apart(prompt.negative.penultimate_hidden_states, zero) < 1e-3
    assert prompt.positive.image_embeds.shape == (2, 48)
    assert encoder.patcher in [
        loaded.model for loaded in comfy.model_management.current_loaded_models
    ]
    comfy.model_management.unload_all_models()
    again = encode(encoder, pictures(2, 80, 50), None, "center")
    assert torch.equal(again.positive.image_embeds, prompt.positive.image_embeds)


@pytest.mark.parametrize("vision", [{}, ODD["layer scale"]], ids=["the host's", "open_clip's"])
def test_the_activation_tells_encoders_of_equal_weights_apart(pack, load, tmp_path, vision):
    from comfyui_ip_adapter.ip_adapter_core.comfyui.encode import encode

    made = model(config(vision=vision))
    prints = set()
    for quick_gelu in (False, True):
        path = saved(tmp_path / f"{quick_gelu}.safetensors", made, config(quick_gelu, vision))
        prints.add(encode(load(path), pictures(1), None, "center").fingerprint)
    assert len(prints) == 2


def damaged(path, made, sizes, how):
    if how == "no configuration":
        save_file({k: x.contiguous() for k, x in made.state_dict().items()}, path)
    elif how == "no CLIP":
        save_file({"image_proj.norm.weight": torch.ones(3)}, path)
    elif how == "cut short":
        saved(path, made, sizes)
        path.write_bytes(path.read_bytes()[:5000])
    elif how == "a layer short":
        state = {
            k: x.contiguous() for k, x in made.state_dict().items() if ".resblocks.2." not in k
        }
        save_file(state, path)
        path.with_suffix(".json").write_text(json.dumps(sizes))
    elif how == "other widths":
        saved(path, made, config(width=128))
    elif how == "a strange configuration":
        saved(path, made, sizes)
        save_file(dict(made.visual.state_dict()), path, metadata={"open_clip_config": "[1]"})
    elif how == "unknown settings":
        saved(path, made, config(vision={"windows": 4, "ls_init_value": 1.0}))
    elif how == "no square":
        saved(path, made, config(vision={"image_size": [32, 64]}))
    return path


@pytest.mark.parametrize(
    "how, said",
    [
        ("no configuration", "brings no configuration.*width 64, 3 layers.*ending .json"),
        ("no CLIP", "none of its 1 tensors.*image_proj.norm.weight.*Choose a CLIP model"),
        ("cut short", "cannot be read.*Download it again"),
        ("a layer short", r"lacks \d+ tensors.*Download it again"),
        ("other widths", "do not belong together.*size mismatch"),
        ("a strange configuration", "its metadata open_clip_config is no configuration"),
        ("unknown settings", "builds no image tower.*windows"),
        ("no square", r"\[32, 64\] pixels; expected a square"),
    ],
)
def test_files_that_give_no_encoder_are_named_with_the_remedy(load, tmp_path, how, said):
    from comfyui_ip_adapter.ip_adapter_core.files.tower_config import ImageEncoderError

    sizes = config()
    path = damaged(tmp_path / "bad.safetensors", model(sizes), sizes, how)
    with pytest.raises(ImageEncoderError, match=f"^Image encoder 'bad.safetensors': .*{said}"):
        load(path)
    with pytest.raises(TrainingError, match=f"bad.safetensors.*{said}"):
        ImageEncoder.from_name(f"open_clip:{path}")


def test_without_open_clip_plain_towers_load_and_others_say_what_to_install(
    load, tmp_path, monkeypatch
):
    import sys

    plain, odd = config(), config(vision=ODD["layer scale"])
    paths = [saved(tmp_path / f"{i}.safetensors", model(c), c) for i, c in enumerate((plain, odd))]
    monkeypatch.setitem(sys.modules, "open_clip.model", None)
    load(paths[0])
    with pytest.raises(ValueError, match="pip install open_clip_torch"):
        load(paths[1])
