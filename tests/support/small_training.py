"""Folders as training and evaluation take them, with models small enough for tests: random
weights that keep activations near 1, in the published layouts."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from ip_adapter_core.adapter import AdapterSpec, IPAdapter
from ip_adapter_core.variants import Variant
from training.unet import cross_attention_layers

HIDDEN, POOLED = 32, 24  # widths of one text encoder's states and of SDXL's pooled text
EMBED, STATES = 40, 48  # widths of CLIP's common space and of its image encoder's states
_LETTERS = "".join(map(chr, range(33, 127)))
_START, _END = 2 * len(_LETTERS), 2 * len(_LETTERS) + 1


def fill(module: Any, seed: int) -> Any:
    """Fan-in scaling, normalisations around 1."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in module.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        if weight.ndim > 1:
            noise *= math.prod(weight.shape[1:]) ** -0.5
        elif weight.ndim:
            noise.mul_(0.1).add_(name.endswith("weight"))
        weight.data = noise
    return module.eval().requires_grad_(False)


def tokenizer() -> CLIPTokenizer:
    """One token a letter."""
    vocabulary = {letter: n for n, letter in enumerate(_LETTERS)}
    vocabulary |= {f"{letter}</w>": n + len(_LETTERS) for n, letter in enumerate(_LETTERS)}
    vocabulary |= {"<|startoftext|>": _START, "<|endoftext|>": _END}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77)


def _text(seed: int, projection: int | None = None) -> Any:
    config = CLIPTextConfig(
        vocab_size=_END + 1,
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=77,
        bos_token_id=_START,
        eos_token_id=_END,
        pad_token_id=_END,
        projection_dim=projection or EMBED,
    )
    return fill((CLIPTextModelWithProjection if projection else CLIPTextModel)(config), seed)


def _vision_config() -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=STATES,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
        projection_dim=EMBED,
    )


def _processor() -> CLIPImageProcessor:
    return CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})


def unet(family: str) -> UNet2DConditionModel:
    """Two levels, one of them with cross-attention, and a middle."""
    wide = {
        "cross_attention_dim": 2 * HIDDEN,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": POOLED + 6 * 8,
        "use_linear_projection": True,
    }
    config: dict[str, Any] = {
        "sample_size": 8,
        "block_out_channels": (32, 64),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 1,
        "attention_head_dim": 2,
        "cross_attention_dim": HIDDEN,
        "norm_num_groups": 8,
        **(wide if family == "sdxl" else {}),
    }
    return fill(UNet2DConditionModel(**config), 1)


def base(folder: Path, family: str) -> Any:
    """A diffusers folder; returns the pipeline that is in it."""
    vae = AutoencoderKL(
        block_out_channels=(16, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=16,
    )
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    parts = {"vae": fill(vae, 2), "unet": unet(family), "scheduler": scheduler}
    parts |= {"tokenizer": tokenizer(), "text_encoder": _text(3)}
    pipeline: Any
    if family == "sdxl":
        parts |= {"tokenizer_2": tokenizer(), "text_encoder_2": _text(4, projection=POOLED)}
        pipeline = StableDiffusionXLPipeline(**parts, add_watermarker=False)
    else:
        pipeline = StableDiffusionPipeline(
            **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    pipeline.save_pretrained(folder)
    return pipeline


def adapter(family: str, variant: Variant, seed: int = 8, features: int | None = None) -> IPAdapter:
    """Build one for `unet(family)` and `image_encoder`, or for an encoder of `features`."""
    context = 2 * HIDDEN if family == "sdxl" else HIDDEN
    sizes = {"feature_dim": features or (EMBED if variant == "base" else STATES)}
    sizes["cross_attention_dim"] = context
    if variant == "base":
        sizes["tokens"] = 4
    if variant == "plus":
        sizes |= {"tokens": 5, "dim": 64, "depth": 4, "heads": 1, "expansion": 4}
    layers = cross_attention_layers(unet(family)).values()
    widths = tuple(layer.to_k.out_features for layer in layers)
    made = fill(IPAdapter(AdapterSpec(variant, tuple(sizes.items()), widths)), seed)
    for layer in made.ip_adapter.values():
        layer.to_v_ip.weight.mul_(4)  # so that the picture is seen in the result
    return made


def image_encoder(folder: Path) -> None:
    """A transformers folder with a CLIP vision model: embeddings EMBED wide."""
    fill(CLIPVisionModelWithProjection(_vision_config()), 5).save_pretrained(folder)
    _processor().save_pretrained(folder)


def clip(folder: Path) -> None:
    """A transformers folder with both towers, tokenizer and preprocessor."""
    config = CLIPConfig(
        text_config=_text(6).config.to_dict(),
        vision_config=_vision_config().to_dict(),
        projection_dim=EMBED,
    )
    model = fill(CLIPModel(config), 7)
    model.text_model.embeddings.token_embedding.weight.mul_(5)  # so that texts are told apart
    model.save_pretrained(folder)
    _processor().save_pretrained(folder)
    tokenizer().save_pretrained(folder)


def picture(seed: int, size: tuple[int, int] = (40, 32)) -> Image.Image:
    """Soft patches of colour."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def coco(folder: Path, count: int) -> None:
    """COCO's layout: val2017/ and annotations/captions_val2017.json, two captions a picture."""
    (folder / "val2017").mkdir(parents=True)
    (folder / "annotations").mkdir()
    images: list[Any] = []
    annotations: list[Any] = []
    for number in range(count):
        name = f"{number:012}.png"
        picture(number).save(folder / "val2017" / name)
        images.append({"id": number, "file_name": name})
        for which in ("first", "second"):
            caption = f"the {which} caption of picture {number}\n"
            annotations.append({"image_id": number, "id": len(annotations), "caption": caption})
    content = {"images": images, "annotations": annotations}
    path = folder / "annotations" / "captions_val2017.json"
    path.write_text(json.dumps(content), encoding="utf-8")
