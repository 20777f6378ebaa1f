"""Everything frozen that stands before the UNet: images and texts in, its conditions out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ip_adapter_core.variants import FeatureKind

from ..data.buckets import LATENT_STEP
from ..errors import TrainingError
from ..loss import DroppedConditions
from .base import Encoders, Text
from .face_embedder import FaceEmbedder
from .image_encoder import ImageEncoder

ReferenceEncoder: TypeAlias = ImageEncoder | FaceEmbedder

_READ = ("pixels", "reference", "tokens")  # what encoding uses up


def reference_encoder(config: Any, dtype: torch.dtype) -> ReferenceEncoder:
    """Return what reads references: an image encoder, in `dtype`, or what a config has of faces."""
    if config.image_encoder_path:
        return ImageEncoder.from_name(config.image_encoder_path, dtype)
    return FaceEmbedder(config.face_encoder, config.face_embedding_column)


class Tokenise:
    """A caption to `(77,)` int64 for each text encoder, cut or filled up to that length.

    Can be sent to another process.
    """

    def __init__(self, text: Sequence[Text]) -> None:
        self._tokenizers = [tokenizer for tokenizer, _ in text]
        self._lengths = [encoder.config.max_position_embeddings for _, encoder in text]

    def __call__(self, caption: str) -> tuple[Tensor, ...]:
        return tuple(
            tokenizer(
                caption,
                padding="max_length",
                truncation=True,
                max_length=length,
                return_tensors="pt",
            ).input_ids[0]
            for tokenizer, length in zip(self._tokenizers, self._lengths, strict=True)
        )


@torch.no_grad()
def text_states(text: Sequence[Text], tokens: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    """Return what the UNet reads of N texts: states `(N, 77, D)` and pooled `(N, P)`.

    SD1.5: the last hidden states, and no pooled. SDXL: both encoders' `hidden_states[-2]` side by
    side, and the second's `text_embeds` (diffusers, StableDiffusionXLPipeline.encode_prompt).
    """
    if len(tokens[0]) > 1:  # equal captions of a batch are read once
        together = torch.stack([*tokens]).movedim(0, 1)
        different, place = together.unique(dim=0, return_inverse=True)
        if len(different) < len(together):
            states, pooled = text_states(text, [*different.movedim(1, 0)])
            return states[place], None if pooled is None else pooled[place]
    if len(text) == 1:
        (_, encoder), (ids,) = text[0], tokens
        return encoder(ids.to(encoder.device)).last_hidden_state, None
    outputs = [
        encoder(ids.to(encoder.device), output_hidden_states=True)
        for (_, encoder), ids in zip(text, tokens, strict=True)
    ]
    states = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
    return states, outputs[-1].text_embeds


def _posterior(vae: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and log-variance of the latents.

    A tiny autoencoder gives one latent, no distribution: the least variance that diffusers'
    posterior has, of which nothing is seen.
    """
    encoded = vae.encode(pixels)
    if hasattr(encoded, "latent_dist"):
        return encoded.latent_dist.mean, encoded.latent_dist.logvar
    return encoded.latents, torch.full_like(encoded.latents, -30.0)


class FrozenEncoders:
    """A base's VAE and text encoders, and the image or face encoder, on one device.

    Each keeps the dtype that it was loaded in.

    `kind`: which of the image encoder's features the adapter reads. Raises TrainingError for a VAE
    of another scale than Stable Diffusion's.
    """

    def __init__(
        self,
        base: Encoders,
        image_encoder: ReferenceEncoder,
        kind: FeatureKind,
        device: torch.device | str = "cpu",
    ) -> None:
        factor = 2 ** (len(base.vae.config.block_out_channels) - 1)
        if factor != LATENT_STEP:
            raise TrainingError(
                f"The VAE of '{base.name}' makes one latent of {factor} × {factor} pixels; "
                f"expected {LATENT_STEP} × {LATENT_STEP}, as in SD1.5 and SDXL."
            )
        self.vae, self.text, self.image_encoder = base.vae, base.text, image_encoder
        self.kind, self.family = kind, base.family
        self.tokenise = Tokenise(base.text)
        names = dict.fromkeys(base.weights, base.name)
        self.names = {**names, image_encoder.part: image_encoder.name}
        self.fingerprints = {**base.weights, image_encoder.part: image_encoder.weights}
        self.to(device)

    def to(self, device: torch.device | str) -> None:
        for part in (self.vae, self.image_encoder, *(text.encoder for text in self.text)):
            part.to(device)

    def encode(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Put what the encoders give in place of a batch's pixels and tokens.

        `mean` and `log_variance` (N, 4, h, w) of the VAE's posterior, unscaled, `states`
        (N, 77, D), `pooled` (N, P) for SDXL, and `features`. All else is carried through.
        """
        found: dict[str, Any] = self.outputs(batch, [self.kind])
        found["features"] = found.pop(self.kind)
        return found | {key: value for key, value in batch.items() if key not in _READ}

    @torch.no_grad()
    def outputs(self, batch: Mapping[str, Any], kinds: Sequence[str]) -> dict[str, Tensor]:
        """Return what `encode` adds, with the features of each of `kinds` under its own name."""
        pixels = batch["pixels"].to(self.vae.device, self.vae.dtype)
        mean, log_variance = _posterior(self.vae, pixels)
        states, pooled = text_states(self.text, batch["tokens"])
        found = {"mean": mean, "log_variance": log_variance, "states": states}
        if pooled is not None:
            found["pooled"] = pooled
        return found | self.image_encoder.features(batch["reference"], kinds)

    def dropped(self, kind: str | None = None) -> DroppedConditions:
        """Return what stands in for dropped conditions: of the empty text, and of no image."""
        tokens = [ids[None] for ids in self.tokenise("")]
        return DroppedConditions(
            self.image_encoder.zero(kind or self.kind), *text_states(self.text, tokens)
        )
