"""The same image prompts on the same UNet: ComfyUI with this pack's nodes, and diffusers.

UNets are of both families at any width, around one set of weights. Adapters are for any of them,
as a file holds them.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import comfy.model_base
import comfy.samplers
import comfy.supported_models
import comfy.utils
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from comfyui_ip_adapter.ip_adapter_core.comfyui.loaders import ManagedAdapter, load_adapter
from comfyui_ip_adapter.ip_adapter_core.image_prompt import ImageFeatures, ImagePrompt
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor

from tests.sampling import small
from tests.support.checkpoint_layouts import POOLED, SD15, SDXL, UNet, adapter
from tests.support.random_models import State, fill, sections, weights

CPU = torch.device("cpu")
SMALL = {  # every layer, fewer channels
    "sd15": dataclasses.replace(SD15, channels=32, context=48),
    "sdxl": dataclasses.replace(SDXL, channels=32, context=48, heads=(2, 4, 8)),
    "kolors": dataclasses.replace(SDXL, channels=32, context=48, heads=(2, 4, 8), text=72),
}


class KolorsUNet(UNetModel):
    """SDXL's behind a layer for the text, as packs for Kolors build it."""

    def __init__(self, *args: Any, text: int, context_dim: int, **kwargs: Any) -> None:
        super().__init__(*args, context_dim=context_dim, **kwargs)
        self.encoder_hid_proj = torch.nn.Linear(text, context_dim)

    def forward(self, *args: Any, context: Tensor, **kwargs: Any) -> Tensor:
        return super().forward(*args, context=self.encoder_hid_proj(context), **kwargs)


class Kolors(comfy.model_base.SDXL):
    def __init__(self, config: Any, model_type: Any, device: Any) -> None:
        comfy.model_base.BaseModel.__init__(self, config, model_type, device, KolorsUNet)
        self.embedder, self.noise_augmentor = comfy.model_base.Timestep(256), None


@functools.lru_cache(maxsize=2)
def comfy_model(family: UNet) -> ModelPatcher:
    """ComfyUI's model, its UNet randomly filled."""
    models = comfy.supported_models
    config = (models.SDXL if family.sdxl else models.SD15)({})
    config.unet_config = {**family.comfy_config(), "dtype": torch.float32}
    config.manual_cast_dtype = None
    if family.text:
        config.unet_config["text"] = family.text
        model = Kolors(config, comfy.model_base.ModelType.EPS, CPU)
    else:
        model = config.get_model({}, device=CPU)
    fill(model.diffusion_model, seed=1)
    return ModelPatcher(model, CPU, CPU)


def diffusers_unet(family: UNet) -> UNet2DConditionModel:
    """diffusers' model around the very tensors of `comfy_model`."""
    weights = comfy_model(family).model.diffusion_model.state_dict()
    names = comfy.utils.unet_to_diffusers(family.comfy_config())
    names |= {name: name for name in weights if name.startswith("encoder_hid_proj.")}
    with torch.device("meta"):
        unet = UNet2DConditionModel(**family.diffusers_config())
    wanted = unet.state_dict()
    state = {theirs: weights.pop(ours) for theirs, ours in names.items() if theirs in wanted}
    if weights:
        raise AssertionError(f"diffusers' UNet has no place for {list(weights)[:4]}")
    unet.load_state_dict(state, assign=True)
    return unet.eval().requires_grad_(False)


@dataclass(frozen=True)
class Encoder:
    """What an image encoder gives: widths of its embedding and states, number of states.

    `resampler`: width of a plus adapter's, None for the published one.
    """

    embed: int
    hidden: int
    patches: int
    resampler: int | None = 128

    def prompt(self, images: int, seed: int) -> ImagePrompt:
        """Random features of some images; their negative is one zero image."""
        generator = torch.Generator().manual_seed(seed)

        def randn(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        positive = randn(images, self.embed), randn(images, self.patches, self.hidden)
        zero = torch.zeros(1, self.embed), randn(1, self.patches, self.hidden)
        return ImagePrompt(ImageFeatures(*positive), ImageFeatures(*zero), "a random encoder")


SMALL_ENCODER = Encoder(embed=40, hidden=56, patches=33)
VIT_H = Encoder(embed=1024, hidden=1280, patches=257, resampler=None)


def only(prompt: ImagePrompt, number: int) -> ImagePrompt:
    """One image of a prompt."""
    states, embeds = prompt.positive.penultimate_hidden_states, prompt.positive.image_embeds
    one = ImageFeatures(embeds[number : number + 1], states[number : number + 1])
    return ImagePrompt(one, prompt.negative, prompt.encoder)


SIZES = {"width": 832, "height": 1216, "crop_w": 16, "crop_h": 32}
SIZES |= {"target_width": 800, "target_height": 1200}
TIME_IDS = torch.tensor([1216.0, 832, 32, 16, 1200, 800])  # the same, as diffusers orders them
Size = tuple[int, int]  # of a latent: height, width


@dataclass(frozen=True)
class Setting:
    """One Apply node: which adapter, for what images, how strongly, and where."""

    kind: str
    prompt: ImagePrompt
    weight: float = 1.0
    mask: Tensor | None = None
    layers: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Call:
    """One call of the UNet; `rows`: 0 where a row is the positive's, 1 the negative's."""

    x: Tensor
    timesteps: Tensor
    context: Tensor
    rows: Tensor
    out: Tensor


def text(family: UNet, seed: int) -> list[Any]:
    """A random conditioning."""
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(1, 77, family.text or family.context, generator=generator)
    if not family.sdxl:
        return [[states, {}]]
    return [[states, {"pooled_output": torch.randn(1, POOLED, generator=generator), **SIZES}]]


@dataclass
class Pair:
    """ComfyUI and diffusers around one UNet; what was loaded once is kept."""

    family: UNet
    encoder: Encoder
    _weights: dict[str, State] = field(default_factory=dict)
    _adapters: dict[str, ManagedAdapter] = field(default_factory=dict)
    _unets: dict[tuple[str, ...], tuple[UNet2DConditionModel, list[Any]]] = field(
        default_factory=dict
    )
    _plain: dict[Size, list[Call]] = field(default_factory=dict)

    def weights(self, kind: str) -> State:
        """Random, large enough for the image to change the noise by much."""
        if kind not in self._weights:
            features = self.encoder.embed if kind == "base" else self.encoder.hidden
            layout = adapter(self.family, kind, features, self.encoder.resampler)
            gains = {"_ip.weight": 2.0}
            self._weights[kind] = weights(layout, seed=sum(map(ord, kind)), gains=gains)
        return self._weights[kind]

    def adapter(self, kind: str) -> ManagedAdapter:
        """The same, through a file and this pack's loader."""
        if kind not in self._adapters:
            with TemporaryDirectory() as folder:
                path = Path(folder) / "adapter.safetensors"
                save_file(self.weights(kind), path)
                self._adapters[kind] = load_adapter(path)
        return self._adapters[kind]

    def unet(self, kinds: tuple[str, ...]) -> tuple[UNet2DConditionModel, list[Any]]:
        """diffusers' UNet with adapters as its pipelines load them, and the layers they are in."""
        if kinds not in self._unets:
            unet = diffusers_unet(self.family)
            if kinds:
                unet._load_ip_adapter_weights([sections(self.weights(kind)) for kind in kinds])
            layers = [p for p in unet.attn_processors.values() if hasattr(p, "scale")]
            self._unets[kinds] = unet, layers
        return self._unets[kinds]

    def plain(self, size: Size) -> list[Call]:
        """`comfy` without an image prompt."""
        if size not in self._plain:
            self._plain[size] = self.comfy((), "model", size)
        return self._plain[size]

    def comfy(self, settings: Sequence[Setting], route: str, size: Size) -> list[Call]:
        """One sampling step with guidance through the nodes; every UNet call of it."""
        model = comfy_model(self.family)
        positive, negative = text(self.family, 1), text(self.family, 2)
        for s in settings:
            given = self.adapter(s.kind), s.prompt
            knobs = {"weight": s.weight, "mask": s.mask, "layer_weights": s.layers}
            if route == "model":
                model = small.apply(model, *given, **knobs)
            else:
                model, positive, negative = small.apply_conditioning(
                    model, positive, negative, *given, **knobs
                )
        return record(model, positive, negative, size)

    def text_and_sizes(self, call: Call) -> dict[str, Tensor]:
        """What SDXL is told of a call's rows besides."""
        if not self.family.sdxl:
            return {}
        pooled = [text(self.family, seed)[0][1]["pooled_output"] for seed in (1, 2)]
        time_ids = TIME_IDS.expand(len(call.rows), -1)
        return {"text_embeds": torch.cat(pooled)[call.rows], "time_ids": time_ids}

    def diffusers(
        self,
        call: Call,
        kinds: Sequence[str] = (),
        prompts: Sequence[ImagePrompt] = (),
        scales: Sequence[Sequence[float]] = (),
        masks: Sequence[Tensor] | None = None,
        one_sequence: bool = False,
    ) -> Tensor:
        """diffusers' noise for a call's rows. `scales`: one a layer for each adapter; `masks`:
        `(1, images, height, width)` for each adapter, or `(1, 1, …)` with `one_sequence`: with
        masks diffusers attends to each image by itself, where `concat` attends to all at once.
        """
        unet, layers = self.unet(tuple(kinds))
        for n, processor in enumerate(layers):
            processor.scale = [of_adapter[n] for of_adapter in scales]
        added: dict[str, Any] = self.text_and_sizes(call)
        if kinds:
            sides = zip(kinds, prompts, strict=True)
            added["image_embeds"] = [features(kind, prompt, call) for kind, prompt in sides]
        states = torch.cat([text(self.family, seed)[0][0] for seed in (1, 2)])[call.rows]
        inputs = call.x, call.timesteps, states
        extra = {} if masks is None else {"ip_adapter_masks": list(masks)}
        hook = unet.encoder_hid_proj.register_forward_hook(in_a_row) if one_sequence else None
        out = unet(*inputs, added_cond_kwargs=added, cross_attention_kwargs=extra or None)
        if hook:
            hook.remove()
        return out.sample


def in_a_row(module: Any, inputs: Any, tokens: list[Tensor]) -> list[Tensor]:
    """A hook that makes one image of several, its tokens theirs side by side."""
    return [t.flatten(1, 2)[:, None] for t in tokens]


def features(kind: str, prompt: ImagePrompt, call: Call) -> Tensor:
    """`(rows, images, …)`: the images' where a row is the positive's, else the zero image's."""
    name = "image_embeds" if kind == "base" else "penultimate_hidden_states"
    positive, zero = getattr(prompt.positive, name), getattr(prompt.negative, name)
    return torch.stack([positive, zero.expand_as(positive)])[call.rows]


def record(model: Any, positive: Any, negative: Any, size: Size) -> list[Call]:
    """Every UNet call of one Euler step with guidance for a batch of two latents."""
    calls = []

    def keep(executor: Any, x: Tensor, t: Tensor, context: Tensor, *rest: Any, **kw: Any) -> Any:
        out = executor(x, t, context, *rest, **kw)
        _, _, options = rest
        rows = torch.tensor(options["cond_or_uncond"]).repeat_interleave(2)
        calls.append(Call(x.clone(), t.clone(), context.clone(), rows, out.clone()))
        return out

    model = model.clone()
    model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "recorder", keep)
    guider = small.guider(model, positive, negative, cfg=4.0)
    noise = torch.randn(2, 4, *size, generator=torch.Generator().manual_seed(3))
    sampler, sigmas = comfy.samplers.sampler_object("euler"), torch.tensor([5.0, 0.0])
    guider.sample(noise, torch.zeros_like(noise), sampler, sigmas, disable_pbar=True, seed=0)
    return calls


def error(found: Tensor, expected: Tensor) -> float:
    """The largest deviation, relative to the largest value."""
    return float((found - expected).abs().max() / expected.abs().max())
