"""What lies nearest to an adapter and is none: refused by name under the best of names."""

from __future__ import annotations

import dataclasses
import functools

import pytest
from diffusers import MotionAdapter, T2IAdapter, UNet2DConditionModel

from ip_adapter_core.face_projection import FacePerceiver
from ip_adapter_core.files import finder
from tests.support import sparse_files as sparse
from tests.support.checkpoint_layouts import (
    SD15,
    SDXL,
    controlnet,
    dense,
    ip_adapter,
    linear_projection,
    norm,
    of,
    resampler,
    unet,
    vae,
)
from tests.support.random_models import under


@functools.cache
def diffusers_unet(size):
    return of(lambda: UNet2DConditionModel(**size.diffusers_config()))


def lora(named):
    """Of rank 128 on every attention layer's projections."""
    made = {}
    for key, shape in diffusers_unet(SD15).items():
        if ".attn" in key and key.endswith(".weight"):
            down, up = named(key.removesuffix(".weight"))
            made |= {down: (128, shape[1]), up: (shape[0], 128)}
    return made


def faceid_lora():
    def named(key):
        layer, _, part = key.removesuffix(".0").rpartition(".")
        return [f"{layer}.processor.{part}_lora.{side}.weight" for side in ("down", "up")]

    return lora(named)


def kohya_lora():
    def named(key):
        return [f"lora_unet_{key.replace('.', '_')}.lora_{x}.weight" for x in ("down", "up")]

    return lora(named)


def pulid():
    def mlp(into, out):
        layers = dense("0", 1024, into) | norm("1", 1024) | dense("3", 1024, 1024)
        return layers | norm("4", 1024) | dense("6", out, 1024)

    projection = under("body.", mlp(1280, 5 * 2048))
    for i in range(5):
        projection |= under(f"mapping_{i}.", mlp(1024, 2048))
        projection |= under(f"mapping_patch_{i}.", mlp(1024, 2048))
    return ip_adapter(projection, SDXL.widths, 2048)


def kolors_faceid():
    sizes = {"feature_dim": 1024, "cross_attention_dim": 4096, "tokens": 6, "face_dim": 512}
    sizes |= {"hidden": 1024, "depth": 4, "heads": 64, "expansion": 4}
    return ip_adapter(of(lambda: FacePerceiver(**sizes)), SDXL.widths, 2048)


def per_block(blocks, layout):
    return {key.format(n): shape for n in range(blocks) for key, shape in layout.items()}


def keys_values(prefix, out, into, bias):
    return dense(f"{prefix}to_k_ip", out, into, bias=bias) | dense(
        f"{prefix}to_v_ip", out, into, bias=bias
    )


def sd35():
    projection = resampler(1152, 2432, 1280, tokens=64)
    projection |= {f"layers.{i}.2.1.weight": (5120, 1280) for i in range(4)}
    projection |= dense("time_embedding.linear_1", 1280, 320)
    layer = keys_values("ip_adapter.{}.", 2432, 2432, bias=False)
    layer |= dense("ip_adapter.{}.norm_ip.linear", 4864, 1280)
    return under("image_proj.", projection) | per_block(38, layer)


def instant_character():
    layer = keys_values("ip_adapter.{}.", 3072, 4096, bias=True)
    layer |= {f"ip_adapter.{{}}.norm_ip_{x}.weight": (128,) for x in "qk"}
    projection = under("image_proj.resampler.", resampler(2688, 4096, 1280, tokens=1024))
    return projection | per_block(57, layer)


def instruct():
    projection = resampler(1280, 768, 768)
    inner = {key: shape for key, shape in projection.items() if key.startswith("layers.")}
    for path in ("prompt", "new_input"):
        projection |= {f"{path}_{key}": shape for key, shape in inner.items()}
        projection |= dense(f"proj_{path}", 768, 768)
    return ip_adapter(projection, SD15.widths, 768)


def csgo():
    content, style = (
        under(f"{kind}_image_proj.", linear_projection(1280, 2048, tokens))
        for kind, tokens in (("content", 4), ("style", 32))
    )
    return content | style | ip_adapter({}, SDXL.widths, 2048)


def anima():
    layer = dense("blocks.{}.adaln_ip.1", 2048, 2048)
    for x in "kv":
        layer |= dense(f"blocks.{{}}.ip_{x}_proj", 2048, 768)
    return per_block(28, layer)


def lynx():
    layer = keys_values("blocks.{}.cross_attn.ip_adapter.", 5120, 5120, bias=True)
    return per_block(40, {**layer, "blocks.{}.cross_attn.ip_adapter.registers": (1, 16, 5120)})


def t2i(first):
    """diffusers' file, or the one before: without levels."""
    found = of(lambda: T2IAdapter(adapter_type="full_adapter"))
    if first:
        return found
    flat = {}
    for key, shape in found.items():
        parts = key.removeprefix("adapter.").split(".")
        flat[".".join([parts[0], parts[1], *parts[4:]]) if "resnets" in parts else key] = shape
    return flat


def photomaker():
    encoder = {**sparse.vision("ViT-L"), "visual_projection_2.weight": (1280, 1024)}
    return under("id_encoder.", encoder) | under("lora_weights.", kohya_lora())


KOLORS = dataclasses.replace(SDXL, text=4096)
KINDS = {
    "FaceID's LoRA": (faceid_lora, "a LoRA, ", "FaceID's is in the file of its adapter"),
    "LoRA": (kohya_lora, "a LoRA, ", "models/loras"),
    "InstantID": (lambda: ip_adapter(resampler(512, 2048, 1280), SDXL.widths, 2048),
                  "an InstantID adapter", "Choose one of these"),
    "PuLID": (pulid, "a PuLID model", "take FaceID"),
    "Kolors FaceID": (kolors_faceid, "a FaceID Plus IP-Adapter of Kolors", "Choose one of these"),
    "SD3.5": (sd35, "an SD3 IP-Adapter", "Choose one of these"),
    "InstantCharacter": (instant_character, "an InstantCharacter adapter for Flux", "Choose"),
    "Instruct": (instruct, "an IP-Adapter-Instruct", "Choose one of these"),
    "CSGO": (csgo, "a CSGO adapter", "Choose one of these"),
    "Anima": (anima, "an IP-Adapter for Anima", "Choose one of these"),
    "Lynx": (lynx, "a Lynx IP-Adapter for Wan", "Choose one of these"),
    "Lynx's resampler": (lambda: resampler(512, 5120, 1280), "a resampler alone", "Choose one"),
    "T2I-Adapter": (lambda: t2i(True), "a T2I-Adapter", "models/controlnet"),
    "T2I-Adapter's first": (lambda: t2i(False), "a T2I-Adapter", "models/controlnet"),
    "ControlNet": (lambda: controlnet(SD15), "a ControlNet", "models/controlnet"),
    "Redux": (lambda: dense("redux_up", 12288, 1152) | dense("redux_down", 4096, 12288),
              "a style model", "models/style_models"),
    "CLIP vision": (sparse.vision, "an image encoder", "models/clip_vision"),
    "open_clip": (sparse.clip, "an image encoder", "models/clip_vision"),
    "AnimateDiff": (lambda: of(MotionAdapter), "a motion module of AnimateDiff", "its pack"),
    "PhotoMaker": (photomaker, "a PhotoMaker model", "models/photomaker"),
    "checkpoint": (lambda: under("model.diffusion_model.", unet(SD15)),
                   "a whole diffusion model", "models/checkpoints"),
    "Kolors": (lambda: diffusers_unet(KOLORS), "a whole diffusion model", "diffusion_models"),
    "VAE": (vae, "a VAE", "models/vae"),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["ip-adapter-plus_sd15", "ip-adapter-faceid-plusv2_sdxl"])
def test_the_nearest_confusions(kind, name, tmp_path):
    make, found, remedy = KINDS[kind]
    path = sparse.write(tmp_path / f"{name}.safetensors", make())
    (file,) = finder.adapters([finder.File(path.name, str(path))])
    assert isinstance(file, finder.Unusable), file
    assert file.reason.startswith(f"'{path.name}' is {found}"), file.reason
    assert "Supported are the base, fine-grained (plus) and full" in file.reason
    assert remedy in file.reason.partition("InstantX's for Flux.1. ")[2], file.reason
