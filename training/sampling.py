"""Sample images from a frozen base and an adapter, during training and for evaluation.

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

from .data.buckets import check_multiple
from .errors import TrainingError
from .models.base import Base, Encoders
from .models.frozen import ReferenceEncoder, Tokenise, text_states
from .unet import attention_inputs

# Latents are no images: nothing bounds them. The other two are what Stable Diffusion was
# published with, for schedulers' files that do not say.
_DDIM = {"set_alpha_to_one": False, "steps_offset": 1}
_NEVER_CLIPPED = {"clip_sample": False, "thresholding": False}


@dataclass(frozen=True)
class SamplingOptions:
    """How images are sampled."""

    steps: int = 50
    """DDIM steps; the paper's number."""
    guidance: float = 7.5
    """Scale of classifier-free guidance; the paper's. At 1 or less there is none."""
    size: tuple[int, int] | None = None
    """Height and width in pixels; None: the size that the base was trained at."""
    negative: str = ""
    """Text on the side that guidance moves away from."""
    batch: int = 8
    """Images at once; the UNet sees twice as many, for guidance."""

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch < 1:
            raise ValueError(
                f"steps is {self.steps} and batch {self.batch}: both must be at least 1."
            )
        for side in self.size or ():
            check_multiple("height or width", side)


class NotFinite(TrainingError):
    """An image became NaN or infinite on its way."""


@dataclass(frozen=True)
class TextStates:
    """Encoder hidden states of N prompts: `states (N, 77, D)` and, for SDXL, `pooled (N, P)`."""

    states: Tensor
    pooled: Tensor | None

    def __getitem__(self, rows: Any) -> TextStates:
        return TextStates(self.states[rows], None if self.pooled is None else self.pooled[rows])


@dataclass(frozen=True)
class Prompts:
    """What N images are sampled from.

    `features (N, feature_dim)` or `(N, patches, feature_dim)`, as the adapter's `spec.features`
    says; `zero (1, …)` those of a dropped image; `weights (N,)` is λ of each image. An image's
    noise comes from its seed alone, so batches, devices and processes do not change it.
    """

    text: TextStates
    features: Tensor
    zero: Tensor
    weights: Sequence[float]
    seeds: Sequence[int]

    def __len__(self) -> int:
        return len(self.seeds)

    def __getitem__(self, rows: slice) -> Prompts:
        return Prompts(
            self.text[rows], self.features[rows], self.zero, self.weights[rows], self.seeds[rows]
        )


def encode_text(base: Encoders, prompts: Sequence[str]) -> TextStates:
    """Encode prompts as training encodes captions; those longer than the encoder reads are cut."""
    tokenise = Tokenise(base.text)
    tokens = zip(*map(tokenise, prompts), strict=True)
    return TextStates(*text_states(base.text, [torch.stack(ids) for ids in tokens]))


def encode_images(
    encoder: ReferenceEncoder, images: Sequence[Image.Image], kind: str
) -> tuple[Tensor, Tensor]:
    """Return features `(N, …)` of images, and `(1, …)` of a dropped one."""
    pixels = torch.stack([encoder.preprocess(image) for image in images])
    return encoder.features(pixels, [kind])[kind], encoder.zero(kind)


def starting_noise(seeds: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Return `(N, *shape)` float32 on the CPU, each image's from its own seed."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return torch.stack([torch.randn(tuple(shape), generator=g) for g in generators])


class Sampler:
    """Samples from one base, whose UNet `training.unet.attach` has prepared.

    Modes and dtypes of base and adapter stay as the caller has set them. `scheduler` replaces
    parts of the base's own noise schedule, for a run that trains on another one (prediction_type,
    rescale_betas_zero_snr, timestep_spacing).
    """

    def __init__(
        self,
        base: Base,
        options: SamplingOptions,
        scheduler: Mapping[str, Any] | None = None,
    ) -> None:
        self.unet: Any = base.unet
        self.vae: Any = base.vae
        self.options = options
        config = {**_DDIM, **base.scheduler, **(scheduler or {}), **_NEVER_CLIPPED}
        if config.get("rescale_betas_zero_snr"):  # else it would not start from pure noise
            config["timestep_spacing"] = "trailing"
        self._scheduler = {key: value for key, value in config.items() if key[0] != "_"}
        self._factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        native = self.unet.config.sample_size * self._factor
        self.size = options.size or (native, native)
        self._negative = encode_text(base, [options.negative])

    def draw(self, adapter: IPAdapter, prompts: Prompts) -> list[Image.Image]:
        """Sample the images of the prompts, in their order. Raises NotFinite."""
        images: list[Image.Image] = []
        for start in range(0, len(prompts), self.options.batch):
            latents = self.latents(adapter, prompts[start : start + self.options.batch])
            images += self.decode(latents)
        return images

    @torch.no_grad()
    def latents(self, adapter: IPAdapter, prompts: Prompts) -> Tensor:
        """Sample latents `(N, 4, height / 8, width / 8)` in float32, all at once."""
        scheduler = DDIMScheduler.from_config(self._scheduler)
        scheduler.set_timesteps(self.options.steps)
        shape = (self.unet.config.in_channels, *(side // self._factor for side in self.size))
        latents = starting_noise(prompts.seeds, shape).to(self.unet.device)
        conditions = self._conditions(adapter, prompts)
        for t in scheduler.timesteps:
            latents = scheduler.step(self._predict(latents, t, conditions), t, latents).prev_sample
        if not latents.isfinite().all():
            raise NotFinite(
                f"An image became NaN or infinite (seeds {list(prompts.seeds)}, weights "
                f"{list(prompts.weights)}, UNet in {self.unet.dtype}). Sample in bfloat16 or "
                "float32; if it still happens, the adapter's training diverged."
            )
        return latents

    @property
    def _sides(self) -> int:
        return 2 if self.options.guidance > 1 else 1

    def _conditions(self, adapter: IPAdapter, prompts: Prompts) -> dict[str, Any]:
        """Return all that the UNet is given besides latents and time, the unguided side first."""

        def rows(negative: Tensor, positive: Tensor) -> Tensor:
            negative = negative.to(positive).expand_as(positive)
            both = positive if self._sides == 1 else torch.cat([negative, positive])
            return both.to(self.unet.device)

        first = next(adapter.parameters())
        features = rows(prompts.zero, prompts.features)
        tokens = adapter.tokens(features.to(first.device, first.dtype))
        scale = torch.tensor([*prompts.weights] * self._sides).to(tokens)[:, None, None]
        dtype, device = self.unet.dtype, self.unet.device
        moved = [
            (key.to(device, dtype), (value * scale).to(device, dtype))
            for key, value in adapter.keys_values(tokens)
        ]
        conditions: dict[str, Any] = {
            "encoder_hidden_states": rows(self._negative.states, prompts.text.states).to(dtype),
            "cross_attention_kwargs": attention_inputs(moved, adapter),
        }
        if prompts.text.pooled is not None and self._negative.pooled is not None:
            pooled = rows(self._negative.pooled, prompts.text.pooled).to(dtype)
            size = torch.tensor([*self.size, 0, 0, *self.size], device=device, dtype=dtype)
            conditions["added_cond_kwargs"] = {
                "text_embeds": pooled,
                "time_ids": size.expand(len(pooled), -1),
            }
        return conditions

    def _predict(self, latents: Tensor, t: Tensor, conditions: Mapping[str, Any]) -> Tensor:
        """Return the guided prediction, in float32."""
        rows = torch.cat([latents] * self._sides)
        times = t.to(rows.device).expand(len(rows))
        out = self.unet(rows.to(self.unet.dtype), times, **conditions, return_dict=False)[0].float()
        if self._sides == 1:
            return out
        plain, guided = out.chunk(2)
        return plain + self.options.guidance * (guided - plain)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> list[Image.Image]:
        """Decode latents one after the other: the decoder needs most memory of all."""
        shift = getattr(self.vae.config, "shift_factor", None) or 0.0
        latents = latents / self.vae.config.scaling_factor + shift
        rows = [x[None].to(self.vae.device, self.vae.dtype) for x in latents]
        pixels = torch.cat([self.vae.decode(x).sample.float().cpu() for x in rows])
        return VaeImageProcessor().postprocess(pixels, output_type="pil")
