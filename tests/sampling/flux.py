"""Random Flux models of small width, the same in diffusers, and adapters for them."""

from __future__ import annotations

import copy
import functools
import math
from dataclasses import dataclass
from typing import Any

import comfy.model_patcher
import comfy.ops
import comfy.samplers
import comfy.supported_models
import comfy.utils
import torch
from comfy.ldm.common_dit import pad_to_patch_size
from comfy.patcher_extension import WrappersMP
from comfyui_ip_adapter.ip_adapter_core.comfyui.host import CoreModelPatcher
from comfyui_ip_adapter.ip_adapter_core.comfyui.loaders import ManagedAdapter
from comfyui_ip_adapter.ip_adapter_core.files import adapter_file
from comfyui_ip_adapter.ip_adapter_core.image_prompt import ImageFeatures, ImagePrompt
from diffusers import FluxTransformer2DModel
from diffusers.models.transformers import transformer_flux
from einops import rearrange
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, linear, scaled_dot_product_attention

from tests.sampling import small
from tests.support import checkpoint_layouts as layouts
from tests.support.random_models import State, fill, sections, weights

HEADS, HEAD, TEXT, POOLED, CHANNELS = 2, 16, 24, 20, 4
WIDTH, EMBED = HEADS * HEAD, 28
AXES = (4, 6, 6)


@dataclass(frozen=True)
class Size:
    double: int = 3
    single: int = 4
    heads: int = HEADS
    head: int = HEAD
    text: int = TEXT
    axes: tuple[int, ...] = AXES
    pooled: int = POOLED
    channels: int = CHANNELS

    @property
    def width(self) -> int:
        return self.heads * self.head


SMALL = Size()
REAL_DEPTH = Size(19, 38)
DETECTED = Size(2, 2, 2, 128, 4096, (16, 56, 56), 768, 16)  # what ComfyUI knows a file of Flux by
REAL_WIDTH = Size(1, 1, 24, 128, 4096, (16, 56, 56))


@functools.cache
def twin(size: Size) -> Any:
    """diffusers' model, filled."""
    made = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4 * size.channels,
        num_layers=size.double,
        num_single_layers=size.single,
        attention_head_dim=size.head,
        num_attention_heads=size.heads,
        joint_attention_dim=size.text,
        pooled_projection_dim=size.pooled,
        guidance_embeds=True,
        axes_dims_rope=size.axes,
    )
    return fill(made, 5)


@functools.cache
def _built(size: Size, dtype: torch.dtype, cast: torch.dtype | None) -> Any:
    config = comfy.supported_models.Flux({})
    config.manual_cast_dtype = cast
    config.unet_config = {
        "image_model": "flux",
        "in_channels": size.channels,
        "out_channels": size.channels,
        "patch_size": 2,
        "vec_in_dim": size.pooled,
        "context_in_dim": size.text,
        "hidden_size": size.width,
        "mlp_ratio": 4.0,
        "num_heads": size.heads,
        "depth": size.double,
        "depth_single_blocks": size.single,
        "axes_dim": [*size.axes],
        "theta": 10000,
        "qkv_bias": True,
        "guidance_embed": True,
        "txt_ids_dims": [],
        "dtype": dtype,
    }
    built = config.get_model({}, device=small.CPU)
    sizes = {"depth": size.double, "depth_single_blocks": size.single, "hidden_size": size.width}
    inner, theirs = built.diffusion_model, twin(size).state_dict()
    ours = inner.state_dict()
    for key, place in comfy.utils.flux_to_diffusers(sizes).items():
        if key not in theirs:
            continue
        name, part, change = ((place, None, None) if isinstance(place, str) else (*place, None))[:3]
        name = name if name in ours else name.replace(".scale", ".weight")
        value = theirs[key] if change is None else change(theirs[key])
        (ours[name] if part is None else ours[name].narrow(*part)).copy_(value.to(dtype))
    inner.load_state_dict(ours)
    return built


@functools.cache
def _built_chroma() -> Any:
    config = comfy.supported_models.Chroma({})
    config.unet_config = {
        "image_model": "chroma",
        "in_channels": 4 * CHANNELS,
        "out_channels": 4 * CHANNELS,
        "patch_size": 2,
        "context_in_dim": TEXT,
        "hidden_size": WIDTH,
        "mlp_ratio": 4.0,
        "num_heads": HEADS,
        "depth": 19,
        "depth_single_blocks": 38,
        "axes_dim": [*AXES],
        "theta": 10000,
        "qkv_bias": True,
        "txt_ids_dims": [],
        "vec_in_dim": None,
        "in_dim": 64,
        "out_dim": WIDTH,
        "hidden_dim": 40,
        "n_layers": 2,
        "dtype": torch.float32,
    }
    built = config.get_model({}, device=small.CPU)
    fill(built.diffusion_model, 6)
    return built


def chroma() -> Any:
    """Chroma, which computes its modulation for 19 and 38 blocks and no other numbers."""
    where = {"load_device": small.CPU, "offload_device": small.CPU}
    return comfy.model_patcher.ModelPatcher(_built_chroma(), **where)


def model(
    size: Size = SMALL, dtype: torch.dtype = torch.float32, cast: torch.dtype | None = None
) -> Any:
    """A ModelPatcher around the host's model of the same weights."""
    built = _built(size, dtype, cast)
    return comfy.model_patcher.ModelPatcher(built, load_device=small.CPU, offload_device=small.CPU)


def xlabs(size: Size = SMALL, tokens: int = 4, embed: int = EMBED, seed: int = 1) -> State:
    """XLabs' file, as diffusers names its tensors."""
    layout = layouts.xlabs(tokens, size.text, size.width, size.double, embed)
    return weights(layouts.as_diffusers(layout), seed, {"_ip.weight": 2.0})


def instantx(size: Size = SMALL, tokens: int = 6, embed: int = EMBED, seed: int = 2) -> State:
    """InstantX's file."""
    layout = layouts.instantx(tokens, size.text, size.width, size.double + size.single, embed)
    return weights(layout, seed, {"_ip.weight": 2.0})


FILES = {"xlabs": xlabs, "instantx": instantx}


def adapter(state: State, name: str = "flux.safetensors") -> ManagedAdapter:
    """An adapter of these tensors, as the loader would hand it over."""
    module = adapter_file.from_tensors(state, name, operations=comfy.ops.manual_cast)
    module.requires_grad_(False)
    patcher = CoreModelPatcher(module, load_device=small.CPU, offload_device=small.CPU)
    return ManagedAdapter(name, module, patcher)


def images(count: int = 1, embed: int = EMBED, seed: int = 20) -> ImagePrompt:
    """What an encoder would say of `count` pictures, of the zero image and of a black picture."""
    generator = torch.Generator().manual_seed(seed)

    def features(n: int, factor: float = 1.0) -> ImageFeatures:
        embeds = factor * torch.randn(n, embed, generator=generator)
        return ImageFeatures(embeds, torch.randn(n, 5, 8, generator=generator))

    black = torch.randn(1, embed, generator=generator)
    return ImagePrompt(features(count), features(1, 0.0), "a random encoder", black=black)


def text(seed: int, size: Size = SMALL, length: int = 5, **options: Any) -> Any:
    """A conditioning of one random text."""
    generator = torch.Generator().manual_seed(1000 + seed)
    states = torch.randn(1, length, size.text, generator=generator)
    pooled = torch.randn(1, size.pooled, generator=generator)
    return [[states, {"pooled_output": pooled, "guidance": 3.5, **options}]]


def sample(model: Any, *conditionings: Any, cfg: float = 1.0, size: Any = (8, 12), **options: Any):
    """Sample latents of 4 channels with plain guidance, by two random texts unless given."""
    guider = small.guider(model, *(conditionings or (text(1), text(2))), cfg=cfg)
    return small.run(guider, size=size, **options)


@dataclass(frozen=True)
class Call:
    """One call of the model: its inputs, what it gave, and which row is a positive text's."""

    x: Tensor
    timesteps: Tensor
    context: Tensor
    y: Tensor
    guidance: Tensor
    positive: list[bool]
    out: Tensor
    references: list[Tensor]


def recorded(model: Any, *conditionings: Any, **options: Any) -> list[Call]:
    """Every call of one step of sampling."""
    calls = []

    def keep(executor: Any, x: Any, t: Any, context: Any, y: Any, g: Any, *rest: Any, **kw: Any):
        out = executor(x, t, context, y, g, *rest, **kw)
        told = (kw.get("transformer_options") or rest[-1])["cond_or_uncond"]
        each = len(x) // len(told)
        positive = [number == 0 for number in told for _ in range(each)]
        given = (x, t, context, y, g)
        calls.append(Call(*(a.clone() for a in given), positive, out.clone(), rest[0] or []))
        return out

    model = model.clone()
    model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "recorder", keep)
    sample(model, *conditionings, **{"at": (0.3,), **options})
    return calls


def tokens_of(state: State, embeds: Tensor) -> Tensor:
    """The projection of either kind, written from its formula: `(B, T, text)`."""
    part = {k.removeprefix("image_proj."): x for k, x in state.items() if "image_proj" in k}
    norm = part["norm.weight"], part["norm.bias"]
    if "proj.weight" in part:
        made = linear(embeds, part["proj.weight"], part["proj.bias"])
    else:
        made = gelu(linear(embeds, part["proj.0.weight"], part["proj.0.bias"]))
        made = linear(made, part["proj.2.weight"], part["proj.2.bias"])
    width = len(norm[0])
    return layer_norm(rearrange(made, "b (t d) -> b t d", d=width), (width,), *norm)


def _call(model: Any, call: Call, **more: Any) -> Tensor:
    """Run diffusers' model on the rows of a call, with Kontext's reference rows if there are."""

    def packed(x: Tensor) -> Tensor:
        x = pad_to_patch_size(x, (2, 2))  # as the host does with odd sides
        return rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=2, q=2)

    def ids(x: Tensor, number: int) -> Tensor:
        h, w = patches(x)
        made = torch.zeros(h, w, 3)
        made[..., 0] = number
        made[..., 1] += torch.arange(h)[:, None]
        made[..., 2] += torch.arange(w)[None]
        return made.flatten(0, 1)

    several = [call.x, *call.references]
    out = model(
        hidden_states=torch.cat([packed(x) for x in several], dim=1),
        encoder_hidden_states=call.context,
        pooled_projections=call.y,
        timestep=call.timesteps,
        img_ids=torch.cat([ids(x, i) for i, x in enumerate(several)]),
        txt_ids=torch.zeros(call.context.shape[1], 3),
        guidance=call.guidance,
        return_dict=False,
        **more,
    )[0]
    h, w = patches(call.x)
    whole = rearrange(out[:, : h * w], "b (h w) (c p q) -> b c (h p) (w q)", h=h, w=w, p=2, q=2)
    return whole[..., : call.x.shape[-2], : call.x.shape[-1]]


def patches(x: Tensor) -> tuple[int, int]:
    """Height and width of latents in patches."""
    return -(-x.shape[-2] // 2), -(-x.shape[-1] // 2)


@dataclass(frozen=True)
class Part:
    """An image prompt in a call: its adapter's tensors, the embedding of each row `(B, embed)`.

    `scales`: λ of each block; `mask`: over the picture's patches `(B or 1, patches, 1)`, or a
    number; `rows (B,)`: 0 for those of no image. `keys`: whether λ multiplies K' too.
    """

    state: State
    embeds: Tensor
    scales: list[float]
    mask: Any
    rows: Tensor
    keys: bool = False

    @property
    def xlabs(self) -> bool:
        return "image_proj.proj.weight" in self.state

    def added(self, number: int, query: Tensor, before: int) -> Tensor:
        """λ · Attn(Q, K', V') in a block of this number, by the formula."""
        tokens, prefix = tokens_of(self.state, self.embeds), f"ip_adapter.{number}.to_"
        k, v = (
            linear(
                tokens, self.state[f"{prefix}{c}_ip.weight"], self.state.get(f"{prefix}{c}_ip.bias")
            )
            for c in "kv"
        )
        k, v = (rearrange(x, "b t (h d) -> b h t d", h=query.shape[1]) for x in (k, v))
        if not self.xlabs:
            k = k * torch.rsqrt(k.pow(2).mean(-1, keepdim=True) + 1e-5)
        if self.keys:
            k = k * self.scales[number]
        image = scaled_dot_product_attention(query, k, v)
        image = rearrange(image, "b h l d -> b l (h d)") * self.scales[number]
        mask = self.mask
        if isinstance(mask, Tensor):
            mean = mask.mean(1, keepdim=True)
            behind = image.shape[1] - before - mask.shape[1]
            mask = torch.cat(
                [mean.expand(-1, before, -1), mask, mean.expand(-1, behind, -1)], dim=1
            )
        return image * mask * self.rows[:, None, None]


class Processor:
    """Attention of a block of diffusers' Flux, with image prompts written from their formulas."""

    _attention_backend = _parallel_config = None

    def __init__(self, number: int, picture: int, parts: list[Part]) -> None:
        self.number, self.picture, self.parts = number, picture, parts

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Any = None,
        image_rotary_emb: Any = None,
        **more: Any,
    ) -> Any:
        plain = transformer_flux.FluxAttnProcessor()
        given = attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb
        query = attn.to_q(hidden_states).unflatten(-1, (attn.heads, -1))
        query = attn.norm_q(query).transpose(1, 2)
        single = encoder_hidden_states is None
        before = hidden_states.shape[1] - self.picture if single else 0
        inside, behind = (
            [
                part.added(self.number, query, before)
                for part in self.parts
                if part.xlabs is kind and not (kind and single)
            ]
            for kind in (False, True)
        )
        if single:
            return plain(*given) + sum(inside)
        image, words = plain(*given)
        image = image + sum(linear(x, attn.to_out[0].weight) for x in inside)
        # diffusers adds a third result to what the block gives.
        return image, words, torch.zeros_like(image) + sum(behind)


def expected(
    size: Size,
    call: Call,
    prompts: list[tuple[State, ImagePrompt, Any, Any]],
    keys: bool = False,
) -> Tensor:
    """What diffusers' model gives for a call with these prompts of one image.

    Of each: tensors, image prompt, λ (a number, or one a block), mask over patches or a number.
    `keys`: whether λ multiplies K' too.
    """
    parts = []
    for state, prompt, scale, mask in prompts:
        of_xlabs = "image_proj.proj.weight" in state
        embeds = [prompt.positive.image_embeds if p else prompt.black for p in call.positive]
        rows = torch.tensor([float(p or of_xlabs) for p in call.positive])
        scales = scale if isinstance(scale, list) else [scale] * (size.double + size.single)
        parts.append(Part(state, torch.cat(embeds), scales, mask, rows, keys))
    sides = [math.prod(patches(x)) for x in (call.x, *call.references)]
    made = twin(size)
    before = made.attn_processors
    try:
        made.set_attn_processor(
            {name: Processor(n, sum(sides), parts) for n, name in enumerate(before)}
        )
        return _call(made, call)
    finally:
        made.set_attn_processor(before)


def by_diffusers(size: Size, call: Call, state: State, prompt: ImagePrompt, scales: Any) -> Tensor:
    """XLabs' adapter as diffusers itself loads and runs it; λ of each double block."""
    made = copy.deepcopy(twin(size))
    made._load_ip_adapter_weights([sections(state)], low_cpu_mem_usage=False)
    own = [p for p in made.attn_processors.values() if hasattr(p, "scale")]
    for processor, scale in zip(own, scales, strict=True):
        processor.scale = [scale]
    embeds = [prompt.positive.image_embeds if p else prompt.black for p in call.positive]
    given = {"ip_adapter_image_embeds": [torch.cat(embeds)[:, None]]}
    return _call(made, call, joint_attention_kwargs=given)
