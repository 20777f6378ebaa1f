"""Random models in the real layouts, small enough to sample on a CPU within seconds."""

from __future__ import annotations

import functools
from dataclasses import replace

import comfy.model_base
import comfy.model_patcher
import comfy.ops
import comfy.samplers
import comfy.supported_models
import torch
from comfy.patcher_extension import WrappersMP
from comfyui_ip_adapter.ip_adapter_core.adapter import AdapterSpec, IPAdapter
from comfyui_ip_adapter.ip_adapter_core.comfyui.host import CoreModelPatcher, clip_vision_model
from comfyui_ip_adapter.ip_adapter_core.comfyui.loaders import ManagedAdapter
from comfyui_ip_adapter.ip_adapter_core.image_prompt import ImageFeatures, ImagePrompt
from comfyui_ip_adapter.nodes.apply import ApplyIPAdapter, ApplyIPAdapterConditioning

from tests.support import checkpoint_layouts as layouts
from tests.support.random_models import fill

CPU = torch.device("cpu")
CONTEXT, EMBED, HIDDEN, TOKENS = 64, 24, 20, 4
LEVEL = {"channels": 32, "context": CONTEXT}
SD15 = replace(layouts.SD15, **LEVEL, heads=(4, 4, 4, 4))
SDXL70 = replace(layouts.SDXL, **LEVEL, heads=(2, 4, 8))  # as deep as SDXL, for all of its layers
SDXL = replace(SDXL70, depths=(0, 1, 2))
TINY = replace(SD15, multipliers=(1,), depths=(1,), blocks=1)  # for what no level matters to
SIZES = {"sd15": SD15, "sdxl": SDXL, "sdxl70": SDXL70, "tiny": TINY}
CONFIGS = {name: size.comfy_config() for name, size in SIZES.items()}
CONFIGS["two layers"] = {  # for what takes long for every layer
    **CONFIGS["tiny"],
    "transformer_depth_middle": -2,  # none
    "transformer_depth_output": [1, 0],
}
# In checkpoint order, written out: (place in the host's attention patches, width).
SD15_LAYERS = [
    *[(("input", n, 0), w) for n, w in ((1, 32), (2, 32), (4, 64), (5, 64), (7, 128), (8, 128))],
    *[(("output", n, 0), w) for n, w in ((3, 128), (4, 128), (5, 128), (6, 64), (7, 64), (8, 64))],
    *[(("output", n, 0), 32) for n in (9, 10, 11)],
    (("middle", 0, 0), 128),
]
TINY_LAYERS = [
    *[(place, 32) for place in (("input", 1, 0), ("output", 0, 0), ("output", 1, 0))],
    (("middle", 0, 0), 32),
]


def _sdxl_layers(upper: int, lower: int):
    """So many of them in a block of the upper level, and of the lower one."""
    return [
        *[(("input", n, i), 64) for n in (4, 5) for i in range(upper)],
        *[(("input", n, i), 128) for n in (7, 8) for i in range(lower)],
        *[(("output", n, i), 128) for n in (0, 1, 2) for i in range(lower)],
        *[(("output", n, i), 64) for n in (3, 4, 5) for i in range(upper)],
        *[(("middle", 0, i), 128) for i in range(lower)],
    ]


LAYERS = {
    "sd15": SD15_LAYERS,
    "sdxl": _sdxl_layers(1, 2),
    "sdxl70": _sdxl_layers(2, 10),
    "tiny": TINY_LAYERS,
    "two layers": TINY_LAYERS[:3:2],
}


def model(family: str = "sd15", dtype: torch.dtype = torch.float32, cast=None, seed: int = 0):
    """A ModelPatcher of its own around a UNet that all calls with these arguments share."""
    return _model(family, dtype, cast, seed).clone()


@functools.cache
def _model(family, dtype, cast, seed):
    models = comfy.supported_models
    config = (models.SDXL if family.startswith("sdxl") else models.SD15)({})
    config.unet_config = {**CONFIGS[family], "dtype": dtype}
    config.manual_cast_dtype = cast
    built = config.get_model({}, device=CPU)
    fill(built.diffusion_model, seed)
    return comfy.model_patcher.ModelPatcher(built, load_device=CPU, offload_device=CPU)


def adapter(family: str = "sd15", seed: int = 10, **sizes: int) -> ManagedAdapter:
    """A random base adapter for that model, as the loader would hand it over."""
    sizes = {"feature_dim": EMBED, "cross_attention_dim": CONTEXT, "tokens": TOKENS, **sizes}
    widths = tuple(width for _, width in LAYERS[family])
    spec = AdapterSpec("base", tuple(sizes.items()), widths)
    module = IPAdapter(spec, operations=comfy.ops.manual_cast).requires_grad_(False)
    fill(module, seed)
    patcher = CoreModelPatcher(module, load_device=CPU, offload_device=CPU)
    return ManagedAdapter("random.safetensors", module, patcher)


def images(count: int = 1, seed: int = 20) -> ImagePrompt:
    """What an encoder would say of `count` pictures, and of the zero image."""
    generator = torch.Generator().manual_seed(seed)

    def features(n: int) -> ImageFeatures:
        hidden = torch.randn(n, 5, HIDDEN, generator=generator)
        return ImageFeatures(torch.randn(n, EMBED, generator=generator), hidden)

    zero = features(1)
    zero = ImageFeatures(torch.zeros_like(zero.image_embeds), zero.penultimate_hidden_states)
    return ImagePrompt(features(count), zero, "a random encoder")


def clip_vision(embed: int = EMBED, hidden: int = HIDDEN, side: int = 28, patch: int = 14):
    """A random image encoder of these widths, as the host holds it."""
    config = {
        "model_type": "clip_vision_model",
        "hidden_size": hidden,
        "projection_dim": embed,
        "intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": side,
        "patch_size": patch,
        "num_channels": 3,
        "hidden_act": "gelu",
    }
    made = clip_vision_model(config)
    fill(made.model.requires_grad_(False), seed=40)
    return made


def text(seed: int, length: int = 77, **options):
    """A conditioning of one random text."""
    generator = torch.Generator().manual_seed(1000 + seed)
    states = torch.randn(1, length, CONTEXT, generator=generator)
    pooled = torch.randn(1, 1280, generator=generator)
    return [[states, {"pooled_output": pooled, **options}]]


def knobs(**settings):
    """Inputs of the Apply nodes, at their defaults unless given."""
    return {"weight": 1.0, "start_at": 0.0, "end_at": 1.0, "combine": "concat", **settings}


def apply(model, adapter, image_prompt, **settings):
    """IPA_Apply."""
    given = {"adapter": adapter, "image_prompt": image_prompt, **knobs(**settings)}
    return ApplyIPAdapter.execute(model=model, **given).args[0]


def apply_conditioning(model, positive, negative, adapter, image_prompt, **settings):
    """IPA_ApplyConditioning: model, positive, negative."""
    given = {"adapter": adapter, "image_prompt": image_prompt, **knobs(**settings)}
    return ApplyIPAdapterConditioning.execute(
        model=model, positive=positive, negative=negative, **given
    ).args


def guider(model, positive, negative, cfg: float = 3.0):
    made = comfy.samplers.CFGGuider(model)
    made.set_conds(positive, negative)
    made.set_cfg(cfg)
    return made


def run(guider, *, at=(0.3, 0.6), batch=2, size=8, sampler="euler", seed=1, **options):
    """Sample latents `(batch, 4, size, size)`; `size` may be (height, width). One step at each
    fraction of the schedule in `at`, and no noise after the last."""
    height, width = (size, size) if isinstance(size, int) else size
    generator = torch.Generator().manual_seed(seed)
    noise = options.pop("noise", torch.randn(batch, 4, height, width, generator=generator))
    latent = options.pop("latent", torch.zeros_like(noise))
    sampling = guider.model_patcher.get_model_object("model_sampling")
    sigmas = torch.tensor([*map(sampling.percent_to_sigma, at), 0.0])
    if isinstance(sampler, str):
        sampler = comfy.samplers.sampler_object(sampler)
    return guider.sample(noise, latent, sampler, sigmas, disable_pbar=True, seed=0, **options)


def applied(route, model, *given, texts=None, **settings):
    """Model, positive and negative by the node of that route, "model" or "conditioning"."""
    texts = texts or (text(1), text(2))
    if route == "model":
        return apply(model, *given, **settings), *texts
    return apply_conditioning(model, *texts, *given, **settings)


def sample(model, *conditionings, **options):
    """Sample with plain guidance, by two random texts unless others are given."""
    return run(guider(model, *(conditionings or (text(1), text(2)))), **options)


def counted(model):
    """A clone, and the list to which each of its UNet calls adds its number of rows."""
    calls: list[int] = []

    def count(executor, x, *args, **kwargs):
        calls.append(x.shape[0])
        return executor(x, *args, **kwargs)

    clone = model.clone()
    clone.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "count", count)
    return clone, calls
