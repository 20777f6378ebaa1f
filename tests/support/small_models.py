"""Models of random weights in the published layouts, small enough to train within tests.

Of diffusers, transformers and open_clip, as folders and as single files.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from open_clip.model import CLIP, set_model_preprocess_cfg
from open_clip.transform import PreprocessCfg
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
from tests.support import checkpoint_layouts as layouts
from tests.support.random_models import State, fill, under, weights
from training.models import image_encoder as encoders
from training.models.image_encoder import ImageEncoder
from training.unet import cross_attention_layers

HIDDEN, POOLED = 32, 24  # widths of one text encoder's states and of SDXL's pooled text
EMBED, STATES = 40, 48  # widths of CLIP's common space and of its image encoder's states
TEXT_L, TEXT_G = 32, 64  # of single files' text encoders; diffusers tells them apart by these
SIDE = 32  # pixels that the image encoders read
_LETTERS = "".join(map(chr, range(33, 127)))
_START, _END = 2 * len(_LETTERS), 2 * len(_LETTERS) + 1


def tokenizer() -> CLIPTokenizer:
    """Make a tokenizer of one token a letter."""
    vocabulary = {letter: n for n, letter in enumerate(_LETTERS)}
    vocabulary |= {f"{letter}</w>": n + len(_LETTERS) for n, letter in enumerate(_LETTERS)}
    vocabulary |= {"<|startoftext|>": _START, "<|endoftext|>": _END}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77)


def text_config(width: int = HIDDEN, factor: int = 2, projection: int = EMBED) -> CLIPTextConfig:
    """Configure a text encoder for that tokenizer; `factor`: of its inner layers' width."""
    return CLIPTextConfig(
        vocab_size=_END + 1,
        hidden_size=width,
        intermediate_size=factor * width,
        num_hidden_layers=3,
        num_attention_heads=2,
        bos_token_id=_START,
        eos_token_id=_END,
        pad_token_id=_END,
        projection_dim=projection,
    )


def text_encoder() -> CLIPTextModel:
    return fill(CLIPTextModel(text_config()), 3)


def second_text_encoder(pooled: int = POOLED) -> CLIPTextModelWithProjection:
    """Make SDXL's second text encoder, its pooled text so wide."""
    return fill(CLIPTextModelWithProjection(text_config(projection=pooled)), 4)


def vision_config() -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=STATES,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=SIDE,
        patch_size=8,
        projection_dim=EMBED,
    )


def processor(side: int = SIDE, kind: Any = CLIPImageProcessor) -> Any:
    """Make CLIP's preprocessing to so many pixels a side."""
    return kind(size={"shortest_edge": side}, crop_size={"height": side, "width": side})


def vae(widths: Sequence[int] = (16,) * 4, blocks: int = 1) -> AutoencoderKL:
    """Make a VAE; four levels are 8 × 8 pixels a latent, as the published ones have it."""
    made = AutoencoderKL(
        block_out_channels=tuple(widths),
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        layers_per_block=blocks,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=8 * 2 ** (len(widths) - 1),
    )
    return fill(made, 2)


def unet(family: str) -> UNet2DConditionModel:
    """Make a UNet of two levels, one of them with cross-attention, and a middle."""
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


def scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def pipeline(family: str, **parts: Any) -> Any:
    """Make a pipeline of that family; `parts` replace the small ones."""
    made: dict[str, Callable[[], Any]] = {
        "vae": vae,
        "unet": lambda: unet(family),
        "scheduler": scheduler,
    }
    made |= {"tokenizer": tokenizer, "text_encoder": text_encoder}
    if family == "sdxl":
        made |= {"tokenizer_2": tokenizer, "text_encoder_2": second_text_encoder}
    parts = {name: make() for name, make in made.items() if name not in parts} | parts
    if family == "sd15":
        unsafe = {"safety_checker": None, "requires_safety_checker": False}
        return StableDiffusionPipeline(**parts, **unsafe, feature_extractor=None)
    return StableDiffusionXLPipeline(**parts, add_watermarker=False)


def base(folder: Path, family: str, levels: int = 4) -> Any:
    """Save a base, its VAE of so many levels, as a diffusers folder; return its `pipeline`."""
    made = pipeline(family, vae=vae((16,) * levels))
    made.save_pretrained(folder)
    return made


def single_file(family: str) -> State:
    """Make a whole base's tensors in the original layout, float16."""
    size, text = layouts.UNet(32, TEXT_L, (1, 1), (1, 0), (2, 2), blocks=1), "cond_stage_model."
    if family == "sdxl":
        vector = TEXT_G + 6 * layouts.SIZE_ID
        size = layouts.UNet(64, TEXT_L + TEXT_G, (1, 1), (0, 2), (2, 2), True, vector, blocks=1)
        text = "conditioner.embedders.0."
    layout = {
        **under("model.diffusion_model.", layouts.unet(size)),
        **under("first_stage_model.", layouts.vae((32,) * 4, blocks=1)),
        **under(f"{text}transformer.", layouts.clip_text_l(TEXT_L, 2)),
    }
    if family == "sdxl":
        second = layouts.of(lambda: CLIP(**open_clip_config(text_width=TEXT_G, embed=TEXT_G)))
        second = {key: shape for key, shape in second.items() if not key.startswith("visual.")}
        layout |= under("conditioner.embedders.1.model.", second)
    return weights(layout, dtype=torch.float16)


def adapter(family: str, variant: Variant, seed: int = 8, features: int | None = None) -> IPAdapter:
    """Make an adapter for `unet(family)` and `image_encoder`, or for an encoder of `features`."""
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
        layer.to_v_ip.weight.mul_(4)  # so that the image is seen in the result
    return made


def image_encoder(folder: Path) -> None:
    """Save a transformers folder with a CLIP vision model: embeddings EMBED wide."""
    fill(CLIPVisionModelWithProjection(vision_config()), 5).save_pretrained(folder)
    processor().save_pretrained(folder)


def clip(folder: Path) -> None:
    """Save a transformers folder with both towers, tokenizer and preprocessor."""
    config = CLIPConfig(
        text_config=text_config().to_dict(),
        vision_config=vision_config().to_dict(),
        projection_dim=EMBED,
    )
    model = fill(CLIPModel(config), 7)
    model.text_model.embeddings.token_embedding.weight.mul_(5)  # so that texts are told apart
    model.save_pretrained(folder)
    processor().save_pretrained(folder)
    tokenizer().save_pretrained(folder)


def open_clip_config(
    width: int = 64, layers: int = 3, embed: int = 48, text_width: int = 64
) -> dict[str, Any]:
    """Configure a model with open_clip's usual towers, heads 64 wide in the text's."""
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
            "context_length": layouts.POSITIONS,
            "vocab_size": layouts.VOCABULARY,
            "width": text_width,
            "heads": max(1, text_width // 64),
            "layers": 2,
        },
    }


def open_clip_model(quick_gelu: bool = False, **sizes: int) -> CLIP:
    """Make an open_clip model as its factory gives it, preprocessing settings included."""
    return preprocessed(fill(CLIP(**open_clip_config(**sizes), quick_gelu=quick_gelu), 4))


def preprocessed(model: CLIP, **changes: Any) -> CLIP:
    """Give a model its preprocessing settings as open_clip's factory leaves them."""
    settings = vars(PreprocessCfg(size=model.visual.image_size)) | changes
    set_model_preprocess_cfg(model, settings)
    return model


_TRANSFORMERS = {
    "class_embedding": "embeddings.class_embedding",
    "positional_embedding": "embeddings.position_embedding.weight",
    "conv1.": "embeddings.patch_embedding.",
    "ln_pre.": "pre_layrnorm.",
    "ln_post.": "post_layernorm.",
    "transformer.resblocks.": "encoder.layers.",
    ".attn.": ".self_attn.",
    ".ln_": ".layer_norm",
    ".c_fc.": ".fc1.",
    ".c_proj.": ".fc2.",
}


def as_transformers(visual: Any) -> CLIPVisionModelWithProjection:
    """Make transformers' model of the same image tower."""
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
    state = {}
    for name, tensor in visual.state_dict().items():
        for theirs, ours in _TRANSFORMERS.items():
            name = name.replace(theirs, ours)
        if "in_proj_" in name:
            for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                state[name.replace("in_proj_", f"{letter}_proj.")] = part
        else:
            state[name] = tensor
    model.visual_projection.weight.data = state.pop("proj").T.contiguous()
    model.vision_model.load_state_dict(state)
    return model.eval().requires_grad_(False)


def of_open_clip(model: CLIP, name: str = "small") -> ImageEncoder:
    """Load its image tower as training has it."""
    return ImageEncoder(*encoders.of_open_clip(model), name)


def of_transformers(
    model: CLIPVisionModelWithProjection, preprocessing: Any = None, name: str = "small"
) -> ImageEncoder:
    """Load a model as training has it, with CLIP's usual preprocessing if no other is given."""
    config: Any = model.config
    given = preprocessing or processor(config.image_size, encoders.Processor)
    return ImageEncoder(*encoders.of_transformers(model, given), name)


def command(settings: Any) -> list[str]:
    """Return settings as a command line."""
    given = {name: value for name, value in vars(settings).items() if value is not None}
    return [part for name, value in given.items() for part in (f"--{name}", str(value))]
