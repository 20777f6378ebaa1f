"""Frozen models as the cache takes them, small: VAEs of the published scale, whole checkpoints in
one file, open_clip's towers, and folders of pictures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL
from open_clip.model import CLIP, set_model_preprocess_cfg
from open_clip.transform import PreprocessCfg
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from tests.support import (
    checkpoint_layouts as layouts,
)
from tests.support import (
    layouts_clip,
    small_training,
)
from tests.support import (
    random_models as weights,
)
from training.models import image_towers
from training.models.image_encoder import ImageEncoder

TEXT_L, TEXT_G = 32, 64  # widths of the text encoders; diffusers tells them apart by these
SIDE = 32  # pixels that the image towers read


def vae() -> Any:
    """Four levels: 8 × 8 pixels a latent, as the published ones."""
    made = AutoencoderKL(
        block_out_channels=(16,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=64,
    )
    return small_training.fill(made, 2)


def base(folder: Path, family: str) -> None:
    """A diffusers folder."""
    small_training.base(folder, family)
    vae().save_pretrained(folder / "vae")


def single_file(family: str) -> weights.State:
    """A whole base's tensors in the original layout, float16."""
    sd15 = family == "sd15"
    if sd15:
        spec = layouts.UNet(((1,), (0,)), 1, context=TEXT_L, width=32)
    else:
        wide = TEXT_L + TEXT_G
        vector = TEXT_G + 6 * 256
        spec = layouts.UNet(((0,), (2,)), 2, context=wide, linear=True, vector=vector, width=64)
    text = weights.fill(_text_l(), seed=0)
    state = {
        **weights.under("model.diffusion_model.", weights.fill(layouts.unet(spec), seed=0)),
        **weights.under("first_stage_model.", weights.fill(_vae(), seed=0)),
    }
    if sd15:
        return state | weights.under("cond_stage_model.transformer.", text)
    return {
        **state,
        **weights.under("conditioner.embedders.0.transformer.", text),
        **weights.under("conditioner.embedders.1.model.", weights.fill(_text_g(), seed=0)),
    }


def _vae() -> layouts.Layout:
    widths = (32,) * 4
    return {
        **layouts._vae_side("encoder", (3, 8), widths, 1),
        **layouts._vae_side("decoder", (4, 3), widths, 2),
        **layouts.dense("quant_conv", 8, 8, 1, 1),
        **layouts.dense("post_quant_conv", 4, 4, 1, 1),
    }


def _text_l() -> layouts.Layout:
    return {
        "text_model.embeddings.token_embedding.weight": (layouts_clip.VOCABULARY, TEXT_L),
        "text_model.embeddings.position_embedding.weight": (layouts_clip.POSITIONS, TEXT_L),
        **layouts_clip._layers("text_model.", TEXT_L, 2),
        **layouts.norm("text_model.final_layer_norm", TEXT_L),
    }


def _text_g() -> layouts.Layout:
    model = open_clip_model(text_width=TEXT_G, embed=TEXT_G)
    return {key: tuple(x.shape) for key, x in model.state_dict().items() if key[:7] != "visual."}


def open_clip_config(
    width: int = 64, layers: int = 3, embed: int = 48, text_width: int = 64
) -> dict[str, Any]:
    """Of a model with open_clip's usual towers, heads 64 wide in the text's."""
    return {
        "embed_dim": embed,
        "vision_cfg": {
            "image_size": SIDE,
            "patch_size": 8,
            "width": width,
            "head_width": 32,
            "layers": layers,
        },
        "text_cfg": {
            "context_length": layouts_clip.POSITIONS,
            "vocab_size": layouts_clip.VOCABULARY,
            "width": text_width,
            "heads": max(1, text_width // 64),
            "layers": 2,
        },
    }


def open_clip_model(quick_gelu: bool = False, **sizes: int) -> CLIP:
    """An open_clip model as its factory gives it, preprocessing settings included."""
    made = CLIP(**open_clip_config(**sizes), quick_gelu=quick_gelu)
    return preprocessed(small_training.fill(made, 4))


def preprocessed(model: CLIP, **changes: Any) -> CLIP:
    """The same model, with its preprocessing settings as open_clip's factory leaves them."""
    settings = vars(PreprocessCfg(size=model.visual.image_size)) | changes
    set_model_preprocess_cfg(model, settings)
    return model


def as_transformers(visual: Any) -> CLIPVisionModelWithProjection:
    """The same image tower as transformers has it."""
    block = visual.transformer.resblocks[0]
    quick = type(block.mlp.gelu).__name__ == "QuickGELU"
    config = CLIPVisionConfig(
        hidden_size=visual.conv1.out_channels,
        intermediate_size=block.mlp.c_fc.out_features,
        num_hidden_layers=len(visual.transformer.resblocks),
        num_attention_heads=block.attn.num_heads,
        image_size=visual.image_size[0],
        patch_size=visual.patch_size[0],
        projection_dim=visual.proj.shape[1],
        hidden_act="quick_gelu" if quick else "gelu",
    )
    model = CLIPVisionModelWithProjection(config)
    inner = model.vision_model
    state: dict[str, Tensor] = {
        "embeddings.class_embedding": visual.class_embedding,
        "embeddings.position_embedding.weight": visual.positional_embedding,
        "embeddings.patch_embedding.weight": visual.conv1.weight,
        **_named("pre_layrnorm", visual.ln_pre),
        **_named("post_layernorm", visual.ln_post),
    }
    for i, block in enumerate(visual.transformer.resblocks):
        layer = f"encoder.layers.{i}"
        weight, bias = block.attn.in_proj_weight.chunk(3), block.attn.in_proj_bias.chunk(3)
        for j, name in enumerate("qkv"):
            state[f"{layer}.self_attn.{name}_proj.weight"] = weight[j]
            state[f"{layer}.self_attn.{name}_proj.bias"] = bias[j]
        state |= _named(f"{layer}.self_attn.out_proj", block.attn.out_proj)
        state |= _named(f"{layer}.layer_norm1", block.ln_1)
        state |= _named(f"{layer}.layer_norm2", block.ln_2)
        state |= _named(f"{layer}.mlp.fc1", block.mlp.c_fc)
        state |= _named(f"{layer}.mlp.fc2", block.mlp.c_proj)
    inner.load_state_dict(state)
    model.visual_projection.weight.data = visual.proj.T.contiguous()
    return model.eval().requires_grad_(False)


def _named(name: str, module: nn.Module) -> dict[str, Tensor]:
    return {f"{name}.{key}": value for key, value in module.state_dict().items()}


def of_open_clip(model: CLIP, name: str = "small") -> ImageEncoder:
    """Its image tower, as training has it."""
    return ImageEncoder(*image_towers.of_open_clip(model), name)


def of_transformers(
    model: CLIPVisionModelWithProjection, processor: Any = None, name: str = "small"
) -> ImageEncoder:
    """The model as training has it, with CLIP's usual preprocessing if no other is given."""
    config: Any = model.config
    crop = {"height": config.image_size, "width": config.image_size}
    processor = processor or image_towers.Processor(
        size={"shortest_edge": config.image_size}, crop_size=crop
    )
    return ImageEncoder(*image_towers.of_transformers(model, processor), name)


def pictures(
    folder: Path, count: int, sizes: Sequence[tuple[int, int]] = ((40, 32),), broken: int = 0
) -> None:
    """`count` pictures and metadata.jsonl; of `sizes` (width, height) in turn, the first `broken`
    no pictures at all."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number in range(count):
        name = f"{number:04}.png"
        if number < broken:
            (folder / name).write_bytes(b"not a picture")
        else:
            small_training.picture(number, sizes[number % len(sizes)]).save(folder / name)
        lines.append(json.dumps({"file_name": name, "text": f"picture number {number}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")


def command(settings: Any) -> list[str]:
    """Settings as a command line."""
    told = {name: value for name, value in vars(settings).items() if value is not None}
    return [part for name, value in told.items() for part in (f"--{name}", str(value))]
