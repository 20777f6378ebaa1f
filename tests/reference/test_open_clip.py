"""IPA_LoadImageEncoder's encoders against open_clip itself and transformers, on equal weights."""

from __future__ import annotations

import json
import sys

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
COLOURS = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.25)}
PLAIN = {
    "usual": {},
    "quick_gelu": {"quick_gelu": True},
    "other sizes": {"width": 96, "layers": 4, "embed": 24},
}
LAYER_SCALE = {"ls_init_value": 0.5}
ODD = {  # open_clip's own only
    "layer scale": LAYER_SCALE,
    "mean of all": {"pool_type": "avg", "final_ln_after_pool": True},
    "no norm before": {"no_ln_pre": True},
    "attention pooling": {
        "attentional_pool": True,
        "attn_pooler_queries": 9,
        "output_tokens": False,
    },
}


def config(quick_gelu=False, vision=None, **sizes):
    made = small_models.open_clip_config(**sizes)
    made["vision_cfg"] |= vision or {}
    return made | ({"quick_gelu": True} if quick_gelu else {})


def model(config):
    made = random_models.fill(open_clip.model.CLIP(**config), 4)
    made.load_state_dict({k: x.half().float() for k, x in made.state_dict().items()})
    return made.eval().requires_grad_(False)


def tensors(module):
    return {key: x.contiguous() for key, x in module.state_dict().items()}


def saved(path, made, config, where="inside"):
    """A file as ComfyUI's folder may hold it; `where` its configuration is."""
    text, state = json.dumps({"model_cfg": config, "preprocess_cfg": COLOURS}), tensors(made)
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


@pytest.fixture
def encode(pack):
    from comfyui_ip_adapter.ip_adapter_core.comfyui.encode import encode

    return lambda encoder, images: encode(encoder, images, None, "center")


def pictures(count=2, height=SIDE, width=SIDE):
    """Of 8 bits, so that no preprocessing has to round."""
    coarse = torch.rand(count, 3, 5, 7, generator=torch.Generator().manual_seed(1))
    large = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")
    return (large.movedim(1, -1) * 255).round() / 255


def normalised(images, mean=COLOURS["mean"], std=COLOURS["std"]):
    return ((images - torch.tensor(mean)) / torch.tensor(std)).movedim(-1, 1)


def usual(images):
    defaults = PreprocessCfg()
    return normalised(images, defaults.mean, defaults.std)


def apart(found, expected):
    assert found.shape == expected.shape
    return float((found - expected).abs().max() / expected.abs().max())


def agree(out, embeds, states):
    assert apart(out["image_embeds"], embeds) < 1e-3
    assert apart(out["penultimate_hidden_states"], states) < 1e-3


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
    out = load(saved(tmp_path / name, made, sizes, where)).encode_image(pictures())
    pixels = (usual if where == "pickled" else normalised)(pictures())
    agree(out, *open_clips(made, pixels))
    transformers = small_models.as_transformers(made.visual)
    theirs = transformers(pixel_values=pixels, output_hidden_states=True)
    agree(out, theirs.image_embeds, theirs.hidden_states[-2])


@pytest.mark.parametrize("kind", ODD)
def test_towers_that_the_host_does_not_have_run_in_open_clip(load, tmp_path, kind):
    sizes = config(vision=ODD[kind])
    made = model(sizes)
    out = load(saved(tmp_path / "odd.safetensors", made, sizes)).encode_image(pictures())
    agree(out, *open_clips(made, normalised(pictures())))


@pytest.mark.parametrize(
    "vision",
    [
        {"layers": [1, 1, 1, 1], "width": 32, "patch_size": None},
        {"timm_model_name": "convnext_atto", "timm_pool": "avg", "timm_proj": "linear"},
    ],
    ids=["ResNet", "ConvNeXt"],
)
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
    save_file(tensors(made), tmp_path / "vit-h.safetensors")
    encoder = load(tmp_path / "vit-h.safetensors")
    assert encoder.image_size == 56
    images = pictures(1, 56, 56)
    agree(encoder.encode_image(images), *open_clips(made, usual(images)))


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
    found = theirs.features(normalised(images), FEATURE_KINDS)
    out = load(path).encode_image(images)
    agree(out, found["image_embeds"], found["penultimate_hidden_states"])
    picture = Image.fromarray((images[0] * 255).round().byte().numpy())
    assert apart(theirs.preprocess(picture), normalised(images)[0]) < 1e-6


@pytest.mark.parametrize("vision", [{}, LAYER_SCALE], ids=["the host's", "open_clip's"])
def test_it_encodes_image_prompts_and_leaves_the_device_when_asked(load, encode, tmp_path, vision):
    from comfy.model_management import current_loaded_models, unload_all_models

    sizes = config(vision=vision)
    made = model(sizes)
    encoder = load(saved(tmp_path / "tower.safetensors", made, sizes))
    prompt = encode(encoder, pictures(2, 80, 50))
    _, zero = open_clips(made, torch.zeros(1, 3, SIDE, SIDE))
    assert apart(prompt.negative.penultimate_hidden_states, zero) < 1e-3
    assert prompt.positive.image_embeds.shape == (2, 48)
    assert encoder.patcher in [loaded.model for loaded in current_loaded_models]
    unload_all_models()
    again = encode(encoder, pictures(2, 80, 50))
    assert torch.equal(again.positive.image_embeds, prompt.positive.image_embeds)


@pytest.mark.parametrize("vision", [{}, LAYER_SCALE], ids=["the host's", "open_clip's"])
def test_the_activation_tells_encoders_of_equal_weights_apart(load, encode, tmp_path, vision):
    made = model(config(vision=vision))
    prints = set()
    for quick_gelu in (False, True):
        path = saved(tmp_path / f"{quick_gelu}.safetensors", made, config(quick_gelu, vision))
        prints.add(encode(load(path), pictures(1)).fingerprint)
    assert len(prints) == 2


def refused(load, path, said):
    from comfyui_ip_adapter.ip_adapter_core.files.tower_config import ImageEncoderError

    with pytest.raises(ImageEncoderError, match=f"^Image encoder 'bad.safetensors': .*{said}"):
        load(path)
    with pytest.raises(TrainingError, match=f"bad.safetensors.*{said}"):
        ImageEncoder.from_name(f"open_clip:{path}")


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"width": 128}, "do not belong together.*size mismatch"),
        ({"vision": {"windows": 4, "ls_init_value": 1.0}}, "builds no image tower.*windows"),
        ({"vision": {"image_size": [32, 64]}}, r"\[32, 64\] pixels; expected a square"),
    ],
)
def test_a_configuration_that_does_not_fit_is_named(load, tmp_path, changes, said):
    path = saved(tmp_path / "bad.safetensors", model(config()), config(**changes))
    refused(load, path, said)


def test_files_that_give_no_encoder_are_named_with_the_remedy(load, tmp_path):
    path, made = tmp_path / "bad.safetensors", model(config())
    save_file({"image_proj.norm.weight": torch.ones(3)}, path)
    refused(load, path, "none of its 1 tensors.*image_proj.norm.weight.*Choose a CLIP model")
    save_file(tensors(made), path)
    refused(load, path, "brings no configuration.*width 64, 3 layers.*ending .json")
    save_file(tensors(made.visual), path, metadata={"open_clip_config": "[1]"})
    refused(load, path, "its metadata open_clip_config is no configuration")
    saved(path, made, config())
    path.write_bytes(path.read_bytes()[:5000])
    refused(load, path, "cannot be read.*Download it again")
    save_file({k: x for k, x in tensors(made).items() if ".resblocks.2." not in k}, path)
    path.with_suffix(".json").write_text(json.dumps(config()))
    refused(load, path, r"lacks \d+ tensors.*Download it again")


def test_without_open_clip_plain_towers_load_and_others_say_what_to_install(
    load, tmp_path, monkeypatch
):
    plain, odd = config(), config(vision=LAYER_SCALE)
    paths = [saved(tmp_path / f"{i}.safetensors", model(c), c) for i, c in enumerate((plain, odd))]
    monkeypatch.setitem(sys.modules, "open_clip.model", None)
    load(paths[0])
    with pytest.raises(ValueError, match="pip install open_clip_torch"):
        load(paths[1])
