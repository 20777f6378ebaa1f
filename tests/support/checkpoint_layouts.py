"""Names and shapes of the published checkpoints, `{name: shape}`.

Base models' come from diffusers' and transformers' own modules on the meta device, renamed as
the files name them. Adapters' are written down: what is published, the pack is tested against.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tests.support.random_models import under

Layout = dict[str, tuple[int, ...]]
VOCABULARY, POSITIONS = 49408, 77  # CLIP's tokens, and how many it reads
T5_VOCABULARY = 32128
POOLED, SIZE_ID = 1280, 256  # widths of SDXL's pooled text and of one number of its sizes


@dataclass(frozen=True)
class UNet:
    """A UNet of the Stable Diffusion family at some size.

    `depths`: transformer blocks after each residual block of a level, 0 for none. `heads`: their
    number at each level. `vector`: width of SDXL's pooled text and sizes together. `text`: width of
    the states that Kolors takes, which a layer of its own brings to `context`.
    """

    channels: int
    context: int
    multipliers: tuple[int, ...]
    depths: tuple[int, ...]
    heads: tuple[int, ...]
    linear: bool = False
    vector: int | None = None
    blocks: int = 2
    text: int | None = None

    @property
    def sdxl(self) -> bool:
        return self.vector is not None

    @property
    def middle(self) -> int:
        """Transformer blocks in the middle."""
        return max(1, self.depths[-1])

    @property
    def widths(self) -> tuple[int, ...]:
        """Widths of the cross-attention layers: down, up (one residual block more), middle."""
        levels = [
            (self.channels * m, depth)
            for m, depth in zip(self.multipliers, self.depths, strict=True)
        ]
        down = [width for width, depth in levels for _ in range(self.blocks * depth)]
        up = [width for width, depth in levels[::-1] for _ in range((self.blocks + 1) * depth)]
        return (*down, *up, *[levels[-1][0]] * self.middle)

    def comfy_config(self) -> dict[str, Any]:
        """Return what ComfyUI's model_detection makes of such a file."""
        per_head = self.channels * self.multipliers[-1] // self.heads[-1]
        heads = {"num_head_channels": per_head} if self.linear else {"num_heads": self.heads[0]}
        return {
            "image_size": 32,
            "in_channels": 4,
            "out_channels": 4,
            "model_channels": self.channels,
            "num_res_blocks": [self.blocks] * len(self.depths),
            "transformer_depth": [d for d in self.depths for _ in range(self.blocks)],
            "transformer_depth_output": [d for d in self.depths for _ in range(self.blocks + 1)],
            "transformer_depth_middle": self.middle,
            "channel_mult": list(self.multipliers),
            "use_linear_in_transformer": self.linear,
            "context_dim": self.context,
            "use_spatial_transformer": True,
            "legacy": False,
            "adm_in_channels": self.vector,
            **({"num_classes": "sequential"} if self.vector else {}),
            **heads,
        }

    def diffusers_config(self) -> dict[str, Any]:
        """Return the arguments of `UNet2DConditionModel`."""
        vector = {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": SIZE_ID,
            "projection_class_embeddings_input_dim": self.vector,
        }
        text = {"encoder_hid_dim": self.text, "encoder_hid_dim_type": "text_proj"}
        up = tuple("CrossAttnUpBlock2D" if depth else "UpBlock2D" for depth in self.depths[::-1])
        return {
            "block_out_channels": tuple(self.channels * m for m in self.multipliers),
            "down_block_types": tuple(name.replace("Up", "Down") for name in up[::-1]),
            "up_block_types": up,
            "layers_per_block": self.blocks,
            "transformer_layers_per_block": tuple(max(1, depth) for depth in self.depths),
            "attention_head_dim": self.heads,  # by an old slip, diffusers means their number
            "cross_attention_dim": self.context,
            "use_linear_projection": self.linear,
            **(vector if self.vector else {}),
            **(text if self.text else {}),
        }


SD15 = UNet(320, 768, (1, 2, 4, 4), (1, 1, 1, 0), (8, 8, 8, 8))
SD2 = UNet(320, 1024, (1, 2, 4, 4), (1, 1, 1, 0), (5, 10, 20, 20), linear=True)
SDXL = UNet(320, 2048, (1, 2, 4), (0, 2, 10), (5, 10, 20), linear=True, vector=POOLED + 6 * SIZE_ID)


def dense(name: str, out: int, *rest: int, bias: bool = True) -> Layout:
    """Return a linear layer or convolution."""
    weight: Layout = {f"{name}.weight": (out, *rest)}
    return {**weight, f"{name}.bias": (out,)} if bias else weight


def norm(name: str, width: int) -> Layout:
    """Return a layer or group normalisation."""
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def of(make: Callable[[], Any]) -> Layout:
    """Return the layout of the module that `make` makes; it takes no memory."""
    with torch.device("meta"):
        return {key: tuple(x.shape) for key, x in make().state_dict().items()}


_RESIDUAL = {
    ".norm1.": ".in_layers.0.",
    ".conv1.": ".in_layers.2.",
    ".norm2.": ".out_layers.0.",
    ".conv2.": ".out_layers.3.",
    ".time_emb_proj.": ".emb_layers.1.",
    ".conv_shortcut.": ".skip_connection.",
}
_AROUND = {
    "time_embedding.linear_1.": "time_embed.0.",
    "time_embedding.linear_2.": "time_embed.2.",
    "add_embedding.linear_1.": "label_emb.0.0.",
    "add_embedding.linear_2.": "label_emb.0.2.",
    "conv_in.": "input_blocks.0.0.",
    "conv_norm_out.": "out.0.",
    "conv_out.": "out.2.",
    "mid_block.resnets.0.": "middle_block.0.",
    "mid_block.attentions.0.": "middle_block.1.",
    "mid_block.resnets.1.": "middle_block.2.",
    "controlnet_cond_embedding.conv_in.": "input_hint_block.0.",
    "controlnet_cond_embedding.conv_out.": "input_hint_block.14.",
    "controlnet_mid_block.": "middle_block_out.0.",
}
_IN_BLOCK = re.compile(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|\w+samplers)\.(\d+)\.(.+)")


def published_name(key: str, size: UNet) -> str:
    """Return a published UNet's or ControlNet's name of what diffusers calls `key`."""
    if ".resnets." in key:
        for theirs, ours in _RESIDUAL.items():
            key = key.replace(theirs, ours)
    for theirs, ours in _AROUND.items():
        if key.startswith(theirs):
            return key.replace(theirs, ours, 1)
    if match := re.match(r"controlnet_cond_embedding\.blocks\.(\d+)(.+)", key):
        return f"input_hint_block.{2 * int(match[1]) + 2}{match[2]}"
    if match := re.match(r"controlnet_down_blocks\.(\d+)(.+)", key):
        return f"zero_convs.{match[1]}.0{match[2]}"
    if (match := _IN_BLOCK.fullmatch(key)) is None:
        return key
    side, level, part, number, rest = match.groups()
    before, of_level = int(level) * (size.blocks + 1), int(part == "attentions")
    if part == "downsamplers":
        return f"input_blocks.{before + size.blocks + 1}.0.{rest.replace('conv', 'op')}"
    if part == "upsamplers":
        last = 2 if size.depths[-1 - int(level)] else 1
        return f"output_blocks.{before + size.blocks}.{last}.{rest}"
    if side == "down":
        return f"input_blocks.{before + int(number) + 1}.{of_level}.{rest}"
    return f"output_blocks.{before + int(number)}.{of_level}.{rest}"


def unet(size: UNet) -> Layout:
    """Return a published UNet, without the `model.diffusion_model.` prefix."""
    from diffusers import UNet2DConditionModel

    found = of(lambda: UNet2DConditionModel(**size.diffusers_config()))
    return {published_name(key, size): shape for key, shape in found.items()}


def controlnet(size: UNet) -> Layout:
    """Return a published ControlNet for that UNet."""
    from diffusers import ControlNetModel

    given = {k: v for k, v in size.diffusers_config().items() if k != "up_block_types"}
    found = of(lambda: ControlNetModel(**given))
    return {published_name(key, size): shape for key, shape in found.items()}


_VAE = {
    "down_blocks.": "down.",
    ".resnets.": ".block.",
    "mid_block.block.0.": "mid.block_1.",
    "mid_block.block.1.": "mid.block_2.",
    "mid_block.attentions.0.": "mid.attn_1.",
    "downsamplers.0.": "downsample.",
    "upsamplers.0.": "upsample.",
    "conv_shortcut": "nin_shortcut",
    "conv_norm_out": "norm_out",
    "group_norm": "norm",
    ".to_q.": ".q.",
    ".to_k.": ".k.",
    ".to_v.": ".v.",
    ".to_out.0.": ".proj_out.",
}


def vae(widths: Sequence[int] = (128, 256, 512, 512), blocks: int = 2, latent: int = 4) -> Layout:
    """Return Stable Diffusion's autoencoder, without the `first_stage_model.` prefix.

    Flux's has 16 `latent` channels, and no convolutions around them.
    """
    from diffusers import AutoencoderKL

    levels = len(widths)
    config = {
        "block_out_channels": tuple(widths),
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "layers_per_block": blocks,
        "latent_channels": latent,
        "use_quant_conv": latent == 4,
        "use_post_quant_conv": latent == 4,
    }
    layout: Layout = {}
    for key, shape in of(lambda: AutoencoderKL(**config)).items():
        key = re.sub(r"up_blocks\.(\d+)", lambda match: f"up.{levels - 1 - int(match[1])}", key)
        for theirs, ours in _VAE.items():
            key = key.replace(theirs, ours)
        linear = ".attn_1." in key and len(shape) == 2
        layout[key] = (*shape, 1, 1) if linear else shape
    return layout


def clip_text_l(width: int = 768, layers: int = 12) -> Layout:
    """Return CLIP ViT-L's text encoder (SD1.5's, SDXL's first), beginning with `text_model.`."""
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=1,
    )
    found = of(lambda: CLIPTextModel(config))  # transformers 5 has no text_model
    return {f"text_model.{key.removeprefix('text_model.')}": x for key, x in found.items()}


def t5(width: int, layers: int = 24, heads: int = 4) -> Layout:
    """Return T5's encoder, as Flux's second text encoder comes."""
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=T5_VOCABULARY,
        d_model=width,
        d_ff=2 * width,
        d_kv=width // heads,
        num_heads=heads,
        num_layers=layers,
        feed_forward_proj="gated-gelu",
    )
    found = of(lambda: T5EncoderModel(config))
    return {key: shape for key, shape in found.items() if key != "encoder.embed_tokens.weight"}


@dataclass(frozen=True)
class Flux:
    """A Flux.1 of some size; a head is always 128 wide. `text`: width of T5's states."""

    text: int
    width: int = 128
    double: int = 19
    single: int = 38
    pooled: int = 768
    channels: int = 16


def flux(size: Flux) -> Layout:
    """Return a published Flux.1 dev."""
    width = size.width
    layout = dense("img_in", width, 4 * size.channels) | dense("txt_in", width, size.text)
    for name, into in (("time", 256), ("vector", size.pooled), ("guidance", 256)):
        layout |= dense(f"{name}_in.in_layer", width, into)
        layout |= dense(f"{name}_in.out_layer", width, width)
    for block in (
        f"double_blocks.{i}.{side}" for i in range(size.double) for side in ("img", "txt")
    ):
        layout |= dense(f"{block}_mod.lin", 6 * width, width)
        layout |= dense(f"{block}_attn.qkv", 3 * width, width)
        layout |= {f"{block}_attn.norm.{part}_norm.scale": (128,) for part in ("query", "key")}
        layout |= dense(f"{block}_attn.proj", width, width)
        layout |= dense(f"{block}_mlp.0", 4 * width, width)
        layout |= dense(f"{block}_mlp.2", width, 4 * width)
    for block in (f"single_blocks.{i}" for i in range(size.single)):
        layout |= dense(f"{block}.modulation.lin", 3 * width, width)
        layout |= dense(f"{block}.linear1", 7 * width, width)
        layout |= dense(f"{block}.linear2", width, 5 * width)
        layout |= {f"{block}.norm.{part}_norm.scale": (128,) for part in ("query", "key")}
    layout |= dense("final_layer.linear", 4 * size.channels, width)
    return layout | dense("final_layer.adaLN_modulation.1", 2 * width, width)


def xlabs(
    tokens: int, text: int = 4096, width: int = 3072, blocks: int = 19, embed: int = 768
) -> Layout:
    """Return XLabs' adapter for a Flux of so many double blocks; v1 has 4 tokens, v2 has 16."""
    layout: Layout = under("ip_adapter_proj_model.", linear_projection(embed, text, tokens))
    for i in range(blocks):
        for kind in "kv":
            name = f"double_blocks.{i}.processor.ip_adapter_double_stream_{kind}_proj"
            layout |= dense(name, width, text)
    return layout


def as_diffusers(layout: Layout) -> Layout:
    """Return the layout of XLabs' adapter as diffusers' users save it, in the same order."""
    name = re.compile(r"double_blocks\.(\d+)\.processor\.ip_adapter_double_stream_(.)_proj\.")
    renamed = {name.sub(r"ip_adapter.\1.to_\2_ip.", key): x for key, x in layout.items()}
    return {key.replace("ip_adapter_proj_model.", "image_proj."): x for key, x in renamed.items()}


def instantx(
    tokens: int = 128, text: int = 4096, width: int = 3072, blocks: int = 57, embed: int = 1152
) -> Layout:
    """Return InstantX's adapter for a Flux of so many blocks, double and single."""
    projection = dense("proj.0", 2 * embed, embed) | dense("proj.2", tokens * text, 2 * embed)
    layout: Layout = under("image_proj.", projection | norm("norm", text))
    for i in range(blocks):
        for kind in "kv":
            layout |= dense(f"ip_adapter.{i}.to_{kind}_ip", width, text, bias=False)
    return layout


def linear_projection(features: int, context: int, tokens: int = 4) -> Layout:
    """Return `image_proj` of a base adapter: features (image_embeds) to tokens of `context`."""
    return dense("proj", tokens * context, features) | norm("norm", context)


def full_projection(features: int, context: int) -> Layout:
    """Return `image_proj` of a full adapter: every hidden state becomes a token."""
    return (
        dense("proj.0", features, features)
        | dense("proj.2", context, features)
        | norm("proj.3", context)
    )


def resampler(
    features: int, context: int, width: int, tokens: int = 16, heads: int | None = None
) -> Layout:
    """Return `image_proj` of a plus (fine-grained) adapter: 4 layers, heads of 64."""
    inner = (heads or width // 64) * 64
    layout: Layout = {
        "latents": (1, tokens, width),
        **dense("proj_in", width, features),
        **dense("proj_out", context, width),
        **norm("norm_out", context),
    }
    for i in range(4):
        layout |= {
            **norm(f"layers.{i}.0.norm1", width),
            **norm(f"layers.{i}.0.norm2", width),
            **dense(f"layers.{i}.0.to_q", inner, width, bias=False),
            **dense(f"layers.{i}.0.to_kv", 2 * inner, width, bias=False),
            **dense(f"layers.{i}.0.to_out", width, inner, bias=False),
            **norm(f"layers.{i}.1.0", width),
            **dense(f"layers.{i}.1.1", 4 * width, width, bias=False),
            **dense(f"layers.{i}.1.3", width, 4 * width, bias=False),
        }
    return layout


def adapter(size: UNet, kind: str, features: int, width: int | None = None) -> Layout:
    """Return a whole file for that UNet, as published for its family: base, plus or full.

    `features`: what the encoder gives the kind. `width`: of a resampler of another size.
    """
    projection = {
        "base": linear_projection(features, size.context),
        "plus": resampler(features, size.context, width or (1280 if size.sdxl else 768)),
        "full": full_projection(features, size.context),
    }[kind]
    return ip_adapter(projection, size.widths, size.context)


def ip_adapter(projection: Layout, widths: Sequence[int], context: int) -> Layout:
    """Return a whole file: the projection, then W'k and W'v a layer, numbered 1, 3, 5 and on."""
    layout: Layout = under("image_proj.", projection)
    for i, width in enumerate(widths):
        for name in ("to_k_ip", "to_v_ip"):
            layout |= dense(f"ip_adapter.{2 * i + 1}.{name}", width, context, bias=False)
    return layout
