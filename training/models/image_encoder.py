"""The frozen CLIP image encoder, of open_clip or transformers, behind one interface."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from PIL import Image
from torch import Tensor, nn

from ip_adapter_core.variants import FEATURE_KINDS

from .. import fingerprints
from ..errors import TrainingError
from .image_towers import OPEN_CLIP, Preprocess, Tower, open_clip_tower, transformers_tower


class ImageEncoder(nn.Module):
    """Pixels `(N, 3, s, s)` to what an image prompt is made of, without gradients.

    `image_embeds (N, E)`: the projected class token, not normalised.
    `penultimate_hidden_states (N, T, W)`: what goes into the last transformer block, class token
    first and before any final norm: transformers' `hidden_states[-2]`.

    `preprocess` is the encoder's own, for one picture. `weights` is a hash of parameters and
    settings as they were given, before any cast.
    """

    def __init__(self, tower: Tower, preprocess: Preprocess, name: str) -> None:
        super().__init__()
        self.name = name
        self.tower = tower.requires_grad_(False).eval()
        self.size = tower.size
        self.preprocess = preprocess
        found = preprocess(Image.new("RGB", (self.size, self.size))).shape
        if found != (3, self.size, self.size):
            raise TrainingError(
                f"'{name}' reads pictures of {self.size} pixels, but its preprocessing gives "
                f"{tuple(found)}. Mend its preprocessor_config.json."
            )
        self.weights = fingerprints.of_settings(
            fingerprints.of_weights(tower), tower.settings, preprocess.settings
        )
        self._zero: dict[str, Tensor] = {}

    @staticmethod
    def from_name(name: str, dtype: torch.dtype = torch.float32) -> ImageEncoder:
        """The encoder of that name, in `dtype` on the CPU.

        `open_clip:ViT-H-14/laion2b_s32b_b79k` (any of open_clip's models and weights),
        `open_clip:ViT-H-14@FILE` (weights from a file), or a folder or hub id of a transformers
        CLIP model. Raises TrainingError for names and files that give no such encoder.
        """
        load: Callable[[str], tuple[Tower, Preprocess]] = transformers_tower
        if name.startswith(OPEN_CLIP):
            load = open_clip_tower
        tower, preprocess = load(name)
        return ImageEncoder(tower, preprocess, name).to(dtype)

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def train(self, mode: bool = True) -> ImageEncoder:
        """Stays in evaluation mode, whatever it is part of: it is frozen."""
        return super().train(False)

    def feature_dim(self, kind: str) -> int:
        """Width of the features of that kind."""
        return self.zero(kind).shape[-1]

    def forward(self, pixels: Tensor, kind: str) -> Tensor:
        """`(N, E)` or `(N, T, W)`, as `kind` says."""
        return self.features(pixels, [kind])[kind]

    @torch.no_grad()
    def features(self, pixels: Tensor, kinds: Sequence[str]) -> dict[str, Tensor]:
        """The features of each of `kinds`, from one pass."""
        for kind in kinds:
            if kind not in FEATURE_KINDS:
                raise ValueError(
                    f"There are no features {kind!r}; expected {' or '.join(FEATURE_KINDS)}."
                )
        return self.tower.features(pixels.to(self.device, self.dtype), kinds)

    def zero(self, kind: str) -> Tensor:
        """What stands for a dropped image, `(1, E)` or `(1, T, W)`.

        Zeros in place of the embedding; the hidden states of zero *normalised* pixels
        (tencent-ailab/IP-Adapter, tutorial_train.py and tutorial_train_plus.py).
        """
        if kind not in self._zero:
            found = self(torch.zeros(1, 3, self.size, self.size), kind)
            self._zero[kind] = torch.zeros_like(found) if kind == FEATURE_KINDS[0] else found
        return self._zero[kind].to(self.device, self.dtype)
