"""What pictures are drawn from: texts and references, encoded as training encodes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from .models.base import Encoders
from .models.frozen import Tokenise, text_states
from .models.image_encoder import ImageEncoder


@dataclass(frozen=True)
class TextStates:
    """What the UNet reads of N prompts: `states (N, 77, D)` and, for SDXL, `pooled (N, P)`."""

    states: Tensor
    pooled: Tensor | None

    def __getitem__(self, rows: Any) -> TextStates:
        return TextStates(self.states[rows], None if self.pooled is None else self.pooled[rows])


@dataclass(frozen=True)
class Prompts:
    """What N pictures are drawn from.

    `features (N, feature_dim)` or `(N, patches, feature_dim)`, as the adapter's `spec.features`
    says; `zero (1, …)` those of a dropped image; `weights (N,)` is λ of each picture. A picture's
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
    """As training encodes captions; longer ones than the encoder reads are cut."""
    tokenise = Tokenise(base.text)
    tokens = zip(*map(tokenise, prompts), strict=True)
    return TextStates(*text_states(base.text, [torch.stack(ids) for ids in tokens]))


def encode_pictures(
    encoder: ImageEncoder, pictures: Sequence[Image.Image], kind: str
) -> tuple[Tensor, Tensor]:
    """Features `(N, …)` of pictures, and `(1, …)` of a dropped one."""
    pixels = torch.stack([encoder.preprocess(picture) for picture in pictures])
    return encoder(pixels, kind), encoder.zero(kind)
