"""SigLIP's image embedding: as transformers pools it, from the file that the encoder came from."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from transformers import SiglipVisionConfig, SiglipVisionModel

from tests.support import sparse_files as sparse
from tests.support.checkpoint_layouts import instantx, xlabs
from tests.support.random_models import fill

SIZES = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "image_size": 28}
SIZES |= {"num_attention_heads": 16, "patch_size": 14}


def theirs(seed):
    config = SiglipVisionConfig(**SIZES, layer_norm_eps=1e-5)  # ComfyUI's layers have that
    return fill(SiglipVisionModel(config), seed).half().float()  # as ComfyUI keeps them


def tensors(model):
    state = {k: x.contiguous() for k, x in model.state_dict().items()}
    named = "vision_model" in next(iter(state))
    return state if named else {f"vision_model.{k}": x for k, x in state.items()}


@pytest.fixture
def siglip(pack):
    """The host's encoder of these weights, as its loader makes it: without the head."""
    from comfyui_ip_adapter.ip_adapter_core.comfyui.host import clip_vision_model

    def siglip(model):
        config = {**SIZES, "model_type": "siglip_vision_model", "num_channels": 3}
        config |= {"hidden_act": "gelu_pytorch_tanh"}
        config |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
        made = clip_vision_model(config)
        missing, left_over = made.load_sd(tensors(model))
        assert not missing and all("head." in key for key in left_over)
        return made

    return siglip


@pytest.fixture
def encode(nodes, siglip):
    def encode(model, image, **given):
        execute = nodes["IPA_EncodeImage"].execute
        return execute(clip_vision=siglip(model), image=image, crop="none", **given).args[0]

    return encode


def test_as_transformers_pools_it(encode, encoders):
    """Of several files the one with the head of this encoder; squeezed, as SigLIP's images are."""
    ours, image = theirs(1), torch.rand(2, 28, 28, 3)
    (encoders / "a damaged one.safetensors").write_bytes(b"no header")
    save_file(tensors(theirs(2)), encoders / "another.safetensors")
    save_file(tensors(ours), encoders / "sub.safetensors")
    prompt = encode(ours, image)
    pixels = (image * 255).round().movedim(-1, 1) / 255 * 2 - 1
    black = -torch.ones(1, 3, 28, 28)
    expected, expected_black = (ours(pixel_values=x).pooler_output for x in (pixels, black))
    assert torch.allclose(prompt.positive.image_embeds, expected, atol=1e-4)
    assert torch.allclose(prompt.black, expected_black, atol=1e-4)
    assert "48-wide hidden states and 48-wide embeddings" in prompt.encoder


def test_a_file_without_the_head(flux, encode, encoders):
    """It encodes, and an adapter that reads the embedding says what is missing."""
    model = theirs(1)
    whole = tensors(model)
    save_file({k: x for k, x in whole.items() if ".head." not in k}, encoders / "a.safetensors")
    prompt = encode(model, torch.rand(1, 28, 28, 3))
    assert prompt.positive.image_embeds.shape == (1, 0)
    adapter = flux.adapter(flux.instantx())
    with pytest.raises(ValueError, match=r"(?s)vision_model\.head.*models/clip_vision"):
        flux.small.apply(flux.model(), adapter, prompt)


def test_from_picture_to_sampling(flux, encode, encoders):
    model = theirs(1)
    save_file(tensors(model), encoders / "siglip.safetensors")
    prompt = encode(model, torch.rand(1, 28, 28, 3))
    adapter = flux.adapter(flux.instantx(embed=48))
    found = flux.sample(flux.small.apply(flux.model(), adapter, prompt))
    assert found.isfinite().all() and not torch.equal(found, flux.sample(flux.model()))


@pytest.fixture
def flux_of_real_size(small):
    """The host's Flux.1 without weights."""
    import comfy.supported_models
    from comfy.model_patcher import ModelPatcher

    config = comfy.supported_models.Flux({})
    config.unet_config = {
        "image_model": "flux",
        "in_channels": 16,
        "patch_size": 2,
        "out_channels": 16,
        "vec_in_dim": 768,
        "context_in_dim": 4096,
        "hidden_size": 3072,
        "mlp_ratio": 4.0,
        "num_heads": 24,
        "depth": 19,
        "depth_single_blocks": 38,
        "axes_dim": [16, 56, 56],
        "theta": 10000,
        "qkv_bias": True,
        "guidance_embed": True,
        "txt_ids_dims": [],
        "dtype": torch.bfloat16,
    }
    with torch.device("meta"):
        made = config.get_model({}, device="meta")
    return ModelPatcher(made, load_device=small.CPU, offload_device=small.CPU)


def test_auto_finds_what_is_for_flux(flux_of_real_size, folder, encoders):
    from comfyui_ip_adapter.ip_adapter_core.comfyui.loaders import describe_choice, find_files
    from comfyui_ip_adapter.nodes import paths

    def find(preset):
        return find_files(flux_of_real_size, preset, paths.adapters(), paths.encoders())

    sparse.write(folder / "sd15.safetensors", sparse.ADAPTERS["sd15"])
    sparse.write(encoders / "h.safetensors", sparse.vision("ViT-H"))
    with pytest.raises(FileNotFoundError) as error:
        find("standard")
    for words in ("a base adapter", "Flux.1 (57 transformer blocks", "XLabs-AI", "openai/clip-vit"):
        assert words in str(error.value)
    for name, layout in {"two": xlabs(16), "one": xlabs(4), "x": instantx()}.items():
        sparse.write(folder / f"{name}.safetensors", layout)
    with pytest.raises(FileNotFoundError, match=r"(?s)no image encoder.*sigclip_vision"):
        find("fine-grained")
    sparse.write(encoders / "l.safetensors", sparse.vision("ViT-L"))
    sizes = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27}
    siglip = sparse.siglip(image_size=384, patch_size=14, num_attention_heads=16, **sizes)
    sparse.write(encoders / "s.safetensors", siglip)
    for preset, adapter, encoder in (("standard", "two", "l"), ("fine-grained", "x", "s")):
        choice = find(preset)
        assert choice.adapter.name == f"{adapter}.safetensors"
        assert choice.encoder.name == f"{encoder}.safetensors"
        assert "Flux.1" in describe_choice(choice) and not choice.doubts
    with pytest.raises(FileNotFoundError, match=r"For Flux\.1 no 'faceid' adapter is published"):
        find("faceid")
