"""Sizes of Stable Diffusion checkpoints in the original layout, read off their tensors' shapes.

Configurations are diffusers' and transformers'. What shapes do not tell (heads, activations,
scaling of the latents) are facts of the published models, named where they stand.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from ip_adapter_core.variants import Family

Shapes = Mapping[str, tuple[int, ...]]
Config = dict[str, Any]


UNET = "model.diffusion_model."
VAE = "first_stage_model."
TEXT_L = {
    "sd15": "cond_stage_model.transformer.text_model.",
    "sdxl": "conditioner.embedders.0.transformer.text_model.",
}
TEXT_G = "conditioner.embedders.1.model."
CLIP_HEAD = 64  # width of a head of CLIP's text encoders, and of SDXL's UNet
SCALING = {"sd15": 0.18215, "sdxl": 0.13025}


def count(shapes: Shapes, pattern: str) -> int:
    """One more than the largest number that the pattern's group finds; 0 if there is none."""
    found = (re.match(pattern, key) for key in shapes)
    return max((int(match[1]) + 1 for match in found if match), default=0)


def unet(shapes: Shapes, family: Family) -> Config:
    """Of `UNet2DConditionModel`.

    Raises KeyError for what is no UNet of this kind, ValueError for one that diffusers cannot
    build.
    """
    levels: list[list[tuple[int, int]]] = [[]]  # of each residual block: width, transformer depth
    for i in range(1, count(shapes, re.escape(UNET) + r"input_blocks\.(\d+)\.")):
        block = f"{UNET}input_blocks.{i}"
        if f"{block}.0.op.weight" in shapes:
            levels.append([])
            continue
        depth = count(shapes, re.escape(f"{block}.1.") + r"transformer_blocks\.(\d+)\.")
        levels[-1].append((shapes[f"{block}.0.out_layers.3.weight"][0], depth))
    if any(len(set(level)) != 1 or len(level) != len(levels[0]) for level in levels):
        raise ValueError(f"its blocks differ within a level: {levels}")
    widths, depths = zip(*(level[0] for level in levels), strict=True)
    middle = count(shapes, re.escape(f"{UNET}middle_block.1.") + r"transformer_blocks\.(\d+)\.")
    without = not any(key.startswith(f"{UNET}middle_block.") for key in shapes)
    if not without and depths[-1] not in (0, middle):
        raise ValueError(f"{middle} transformer blocks in the middle, {depths[-1]} before it")
    risen = _risen(shapes, len(levels[0]) + 1, depths)
    crossed = next(key for key in shapes if key.startswith(UNET) and "attn2.to_k.weight" in key)
    projected = next(key for key in shapes if key.startswith(UNET) and "proj_in.weight" in key)
    config: Config = {
        "_class_name": "UNet2DConditionModel",
        "sample_size": 64 if family == "sd15" else 128,
        "in_channels": shapes[f"{UNET}input_blocks.0.0.weight"][1],
        "out_channels": shapes[f"{UNET}out.2.weight"][0],
        "block_out_channels": widths,
        "layers_per_block": len(levels[0]),
        "transformer_layers_per_block": _layers_per_block(depths, risen, middle),
        "down_block_types": ["CrossAttnDownBlock2D" if d else "DownBlock2D" for d in depths],
        "mid_block_type": None if without else "UNetMidBlock2DCrossAttn",
        "up_block_types": ["CrossAttnUpBlock2D" if d else "UpBlock2D" for d in risen],
        "cross_attention_dim": shapes[crossed][1],
        "use_linear_projection": len(shapes[projected]) == 2,
        # Despite its name the number of heads: 8 in SD1.5; 64 wide each in SDXL.
        "attention_head_dim": 8 if family == "sd15" else [w // CLIP_HEAD or 1 for w in widths],
    }
    if family == "sdxl":
        config |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": shapes[f"{UNET}label_emb.0.0.weight"][1],
        }
    return config


def _risen(shapes: Shapes, blocks: int, depths: Sequence[int]) -> list[int]:
    """Return the transformer depth of each level on the way up, the lowest first.

    That of the way down, unless there is a transformer on the way up alone.
    """
    found = []
    for number, down in enumerate(reversed(depths)):
        first = re.escape(f"{UNET}output_blocks.{number * blocks}.1.")
        found.append(down or count(shapes, first + r"transformer_blocks\.(\d+)\."))
    return found


def _layers_per_block(depths: Sequence[int], risen: Sequence[int], middle: int) -> list[int]:
    """Return diffusers' one number a level for both ways, and the last one's for the middle."""
    most = [max(pair) or 1 for pair in zip(depths, risen[::-1], strict=True)]
    return [*most[:-1], middle or most[-1]]


def tiny_vae(shapes: Shapes, prefix: str = VAE) -> Config | None:
    """Of `AutoencoderTiny`, for TAESD as ComfyUI saves it in a checkpoint; None for what is none.

    TAESD's latents are those that the UNet sees, so they need no scaling.
    """
    first = shapes.get(f"{prefix}taesd_decoder.1.weight")
    if first is None:
        return None
    return {
        "_class_name": "AutoencoderTiny",
        "latent_channels": first[1],
        "encoder_block_out_channels": [first[0]] * 4,
        "decoder_block_out_channels": [first[0]] * 4,
        "scaling_factor": 1.0,
        "force_upcast": False,
    }


def vae(shapes: Shapes, family: Family, prefix: str = VAE) -> Config:
    """Of `AutoencoderKL`. Raises KeyError for what is none."""
    levels = count(shapes, re.escape(prefix) + r"encoder\.down\.(\d+)\.")
    widths = [shapes[f"{prefix}encoder.down.{i}.block.0.conv1.weight"][0] for i in range(levels)]
    return {
        "_class_name": "AutoencoderKL",
        "sample_size": 512 if family == "sd15" else 1024,
        "block_out_channels": widths,
        "layers_per_block": count(shapes, re.escape(f"{prefix}encoder.down.0.block.") + r"(\d+)\."),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "latent_channels": shapes[f"{prefix}decoder.conv_in.weight"][1],
        "scaling_factor": SCALING[family],
        "force_upcast": family == "sdxl",  # overflows in float16; SD1.5's does not
    }


def text_l(shapes: Shapes, family: Family) -> Config:
    """Of CLIP ViT-L's `CLIPTextModel`. Raises KeyError for what is none."""
    prefix = TEXT_L[family]
    vocabulary, width = shapes[f"{prefix}embeddings.token_embedding.weight"]
    return _text(
        vocabulary,
        width,
        layers=count(shapes, re.escape(prefix) + r"encoder\.layers\.(\d+)\."),
        inner=shapes[f"{prefix}encoder.layers.0.mlp.fc1.weight"][0],
        positions=shapes[f"{prefix}embeddings.position_embedding.weight"][0],
    ) | {"hidden_act": "quick_gelu", "projection_dim": width}


def text_g(shapes: Shapes) -> Config:
    """Of OpenCLIP ViT-bigG's `CLIPTextModelWithProjection`. Raises KeyError for what is none."""
    vocabulary, width = shapes[f"{TEXT_G}token_embedding.weight"]
    return _text(
        vocabulary,
        width,
        layers=count(shapes, re.escape(TEXT_G) + r"transformer\.resblocks\.(\d+)\."),
        inner=shapes[f"{TEXT_G}transformer.resblocks.0.mlp.c_fc.weight"][0],
        positions=shapes[f"{TEXT_G}positional_embedding"][0],
    ) | {"hidden_act": "gelu", "projection_dim": shapes[f"{TEXT_G}text_projection"][1]}


def _text(vocabulary: int, width: int, layers: int, inner: int, positions: int) -> Config:
    return {
        "model_type": "clip_text_model",
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": width // CLIP_HEAD or 1,
        "max_position_embeddings": positions,
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
        "pad_token_id": 1,
    }


def scheduler(shapes: Shapes) -> Config:
    """Of Stable Diffusion's noise schedule.

    Files of bases with v-prediction carry empty tensors that say so, as ComfyUI and the trainers of
    such bases have agreed.
    """
    return {
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": 1000,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
        "prediction_type": "v_prediction" if "v_pred" in shapes else "epsilon",
        "rescale_betas_zero_snr": "ztsnr" in shapes,
    }
