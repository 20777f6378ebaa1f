"""Sizes of Stable Diffusion checkpoints in the original layout, read off their tensors' shapes.

Configurations are diffusers' and transformers'. What shapes do not tell (heads, activations,
scaling of the latents) are facts of the published models, named where they stand.
"""

from __future__ import annotations

from collections.abc import Mapping
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


def count(shapes: Shapes, prefix: str) -> int:
    """One more than the largest number that stands after `prefix`; 0 if there is none."""
    rest = (key.removeprefix(prefix) for key in shapes if key.startswith(prefix))
    numbers = (key.partition(".")[0] for key in rest)
    return max((int(number) + 1 for number in numbers if number.isdigit()), default=0)


def unet(shapes: Shapes, family: Family) -> Config:
    """Of `UNet2DConditionModel`. Raises KeyError for what is none, or ValueError."""
    levels: list[list[tuple[int, int]]] = [[]]  # of each residual block: width, transformer depth
    for i in range(1, count(shapes, f"{UNET}input_blocks.")):
        block = f"{UNET}input_blocks.{i}"
        if f"{block}.0.op.weight" in shapes:
            levels.append([])
            continue
        depth = count(shapes, f"{block}.1.transformer_blocks.")
        levels[-1].append((shapes[f"{block}.0.out_layers.3.weight"][0], depth))
    if any(len(set(level)) != 1 or len(level) != len(levels[0]) for level in levels):
        raise ValueError(f"its blocks differ within a level: {levels}")
    widths, depths = zip(*(level[0] for level in levels), strict=True)
    middle = count(shapes, f"{UNET}middle_block.1.transformer_blocks.")
    without = not any(key.startswith(f"{UNET}middle_block.") for key in shapes)
    if not without and depths[-1] not in (0, middle):
        raise ValueError(f"{middle} transformer blocks in the middle, {depths[-1]} before it")
    # On the way up, the lowest level first: as on the way down, unless there are some there alone.
    first = (f"{UNET}output_blocks.{n * (len(levels[0]) + 1)}.1." for n in range(len(levels)))
    risen = [
        down or count(shapes, f"{block}transformer_blocks.")
        for block, down in zip(first, reversed(depths), strict=True)
    ]
    # diffusers has one number a level for both ways, and the last one's for the middle.
    most = [max(pair) or 1 for pair in zip(depths, reversed(risen), strict=True)]
    crossed = next(key for key in shapes if key.startswith(UNET) and "attn2.to_k.weight" in key)
    projected = next(key for key in shapes if key.startswith(UNET) and "proj_in.weight" in key)
    config: Config = {
        "_class_name": "UNet2DConditionModel",
        "sample_size": 64 if family == "sd15" else 128,
        "in_channels": shapes[f"{UNET}input_blocks.0.0.weight"][1],
        "out_channels": shapes[f"{UNET}out.2.weight"][0],
        "block_out_channels": widths,
        "layers_per_block": len(levels[0]),
        "transformer_layers_per_block": [*most[:-1], middle or most[-1]],
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
    levels = count(shapes, f"{prefix}encoder.down.")
    widths = [shapes[f"{prefix}encoder.down.{i}.block.0.conv1.weight"][0] for i in range(levels)]
    return {
        "_class_name": "AutoencoderKL",
        "sample_size": 512 if family == "sd15" else 1024,
        "block_out_channels": widths,
        "layers_per_block": count(shapes, f"{prefix}encoder.down.0.block."),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "latent_channels": shapes[f"{prefix}decoder.conv_in.weight"][1],
        "scaling_factor": SCALING[family],
        "force_upcast": family == "sdxl",  # overflows in float16; SD1.5's does not
    }


def text_l(shapes: Shapes, family: Family) -> Config:
    """Of CLIP ViT-L's `CLIPTextModel`. Raises KeyError for what is none."""
    prefix = TEXT_L[family]
    tokens, positions = (
        shapes[f"{prefix}embeddings.{name}_embedding.weight"] for name in ("token", "position")
    )
    layers = f"{prefix}encoder.layers."
    inner = shapes[f"{layers}0.mlp.fc1.weight"][0]
    config = _text(tokens, positions[0], count(shapes, layers), inner)
    return config | {"hidden_act": "quick_gelu", "projection_dim": tokens[1]}


def text_g(shapes: Shapes) -> Config:
    """Of OpenCLIP ViT-bigG's `CLIPTextModelWithProjection`. Raises KeyError for what is none."""
    tokens = shapes[f"{TEXT_G}token_embedding.weight"]
    layers = f"{TEXT_G}transformer.resblocks."
    inner = shapes[f"{layers}0.mlp.c_fc.weight"][0]
    positions = shapes[f"{TEXT_G}positional_embedding"][0]
    config = _text(tokens, positions, count(shapes, layers), inner)
    return config | {"hidden_act": "gelu", "projection_dim": shapes[f"{TEXT_G}text_projection"][1]}


def _text(tokens: tuple[int, ...], positions: int, layers: int, inner: int) -> Config:
    vocabulary, width = tokens
    return {
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
    """Of Stable Diffusion's noise schedule; empty tensors say of v-prediction, as ComfyUI reads."""
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
