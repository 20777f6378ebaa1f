"""Pictures from a frozen base and an adapter, during training and for evaluation.

DDIM and classifier-free guidance as in the paper (section 4.1.2): image tokens on the side that
guidance moves to, the tokens of the zero image on the other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDIMScheduler
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from torch import Tensor

from ip_adapter_core.adapter import IPAdapter

from .models.base import Base
from .prompts import Prompts, encode_text

# Latents are no pictures: nothing bounds them. The other two are what Stable Diffusion was
# published with, for schedulers' files that do not say.
_DDIM = {"set_alpha_to_one": False, "steps_offset": 1}
_NEVER_CLIPPED = {"clip_sample": False, "thresholding": False}


@dataclass(frozen=True)
class SamplingSettings:
    """How pictures are drawn."""

    steps: int = 50
    """DDIM steps; the paper's number."""
    guidance: float = 7.5
    """Scale of classifier-free guidance; the paper's. At 1 or less there is none."""
    size: tuple[int, int] | None = None
    """Height and width in pixels; None: the size that the base was trained at."""
    negative: str = ""
    """Text on the side that guidance moves away from."""
    batch: int = 8
    """Pictures at once; the UNet sees twice as many, for guidance."""

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch < 1:
            raise ValueError(
                f"steps is {self.steps} and batch {self.batch}: both must be at least 1."
            )
        if self.size is not None and any(side < 8 or side % 8 for side in self.size):
            raise ValueError(f"size is {self.size}: height and width must be multiples of 8.")


class NotFinite(ArithmeticError):
    """A picture became NaN or infinite on its way."""


def starting_noise(seeds: Sequence[int], shape: Sequence[int]) -> Tensor:
    """`(N, *shape)` float32 on the CPU, each picture's from its own seed."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return torch.stack([torch.randn(tuple(shape), generator=g) for g in generators])


def keys_values(
    adapter: IPAdapter, features: Tensor, weights: Sequence[float]
) -> list[tuple[Tensor, Tensor]]:
    """K' and λV' of every layer, `(N, tokens, width)`, in checkpoint order."""
    first = next(adapter.parameters())
    tokens = adapter.tokens(features.to(first.device, first.dtype))
    scale = torch.tensor([*weights]).to(tokens)[:, None, None]
    return [(key, value * scale) for key, value in adapter.keys_values(tokens)]


class Sampler:
    """Draws with one base. Its UNet must be prepared by `training.unet.attach`.

    Modes and dtypes of base and adapter stay as the caller has set them. `scheduler` replaces
    parts of the base's own noise schedule, for a run that trains on another one (prediction_type,
    rescale_betas_zero_snr, timestep_spacing).
    """

    def __init__(
        self,
        base: Base,
        settings: SamplingSettings,
        scheduler: Mapping[str, Any] | None = None,
    ) -> None:
        self.unet: Any = base.unet
        self.vae: Any = base.vae
        self.settings = settings
        config = {**_DDIM, **base.scheduler, **(scheduler or {}), **_NEVER_CLIPPED}
        if config.get("rescale_betas_zero_snr"):  # else it would not start from pure noise
            config["timestep_spacing"] = "trailing"
        self._scheduler = {key: value for key, value in config.items() if key[0] != "_"}
        self._factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        native = self.unet.config.sample_size * self._factor
        self.size = settings.size or (native, native)
        self._negative = encode_text(base, [settings.negative])

    def draw(self, adapter: IPAdapter, prompts: Prompts) -> list[Image.Image]:
        """The pictures, in the order of the prompts. Raises NotFinite."""
        pictures: list[Image.Image] = []
        for start in range(0, len(prompts), self.settings.batch):
            latents = self.latents(adapter, prompts[start : start + self.settings.batch])
            pictures += self.decode(latents)
        return pictures

    @torch.no_grad()
    def latents(self, adapter: IPAdapter, prompts: Prompts) -> Tensor:
        """`(N, 4, height / 8, width / 8)` in float32, all at once."""
        scheduler = DDIMScheduler.from_config(self._scheduler)
        scheduler.set_timesteps(self.settings.steps)
        shape = (self.unet.config.in_channels, *(side // self._factor for side in self.size))
        latents = starting_noise(prompts.seeds, shape).to(self.unet.device)
        given = self._given(adapter, prompts)
        for t in scheduler.timesteps:
            latents = scheduler.step(self._predict(latents, t, given), t, latents).prev_sample
        if not latents.isfinite().all():
            raise NotFinite(
                f"A picture became NaN or infinite (seeds {list(prompts.seeds)}, weights "
                f"{list(prompts.weights)}, UNet in {self.unet.dtype}). Draw in bfloat16 or "
                "float32; if it still happens, the adapter's training diverged."
            )
        return latents

    @property
    def _sides(self) -> int:
        return 2 if self.settings.guidance > 1 else 1

    def _given(self, adapter: IPAdapter, prompts: Prompts) -> dict[str, Any]:
        """All that the UNet is given besides latents and time, the unguided side first."""

        def rows(negative: Tensor, positive: Tensor) -> Tensor:
            negative = negative.to(positive).expand_as(positive)
            both = positive if self._sides == 1 else torch.cat([negative, positive])
            return both.to(self.unet.device)

        features = rows(prompts.zero, prompts.features)
        layers = keys_values(adapter, features, [*prompts.weights] * self._sides)
        dtype, device = self.unet.dtype, self.unet.device
        images = [(key.to(device, dtype), value.to(device, dtype)) for key, value in layers]
        given: dict[str, Any] = {
            "encoder_hidden_states": rows(self._negative.states, prompts.text.states).to(dtype),
            "cross_attention_kwargs": {"ip_hidden_states": images},
        }
        if prompts.text.pooled is not None and self._negative.pooled is not None:
            pooled = rows(self._negative.pooled, prompts.text.pooled).to(dtype)
            size = torch.tensor([*self.size, 0, 0, *self.size], device=device, dtype=dtype)
            given["added_cond_kwargs"] = {
                "text_embeds": pooled,
                "time_ids": size.expand(len(pooled), -1),
            }
        return given

    def _predict(self, latents: Tensor, t: Tensor, given: Mapping[str, Any]) -> Tensor:
        """The guided prediction, in float32."""
        rows = torch.cat([latents] * self._sides)
        times = t.to(rows.device).expand(len(rows))
        out = self.unet(rows.to(self.unet.dtype), times, **given, return_dict=False)[0].float()
        if self._sides == 1:
            return out
        plain, guided = out.chunk(2)
        return plain + self.settings.guidance * (guided - plain)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> list[Image.Image]:
        """Latents to pictures, one after the other: the decoder needs most memory of all."""
        shift = getattr(self.vae.config, "shift_factor", None) or 0.0
        latents = latents / self.vae.config.scaling_factor + shift
        rows = [x[None].to(self.vae.device, self.vae.dtype) for x in latents]
        pixels = torch.cat([self.vae.decode(x).sample.float().cpu() for x in rows])
        return VaeImageProcessor().postprocess(pixels, output_type="pil")
