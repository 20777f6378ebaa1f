"""Embeddings of faces, in the place of an image encoder's features."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ip_adapter_core import face_encoder
from ip_adapter_core.face_encoder import FaceEncoder, FaceEncoderError
from ip_adapter_core.face_projection import WIDTH
from ip_adapter_core.variants import FACE

from .. import fingerprints
from ..data.image import BrokenImageError
from ..errors import TrainingError


class EmbedFace:
    """A picture's largest face to `(512,)`, picklable, on one thread of the CPU.

    So that workers embed side by side, and what comes does not depend on their number. Raises
    BrokenImageError for a picture without a face.
    """

    shape = (WIDTH,)

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def __call__(self, image: Image.Image) -> Tensor:
        encoder = _encoder(self.folder, os.getpid())
        pixels = torch.from_numpy(np.array(image.convert("RGB"))) / 255
        try:
            face = max(encoder.faces(pixels), key=lambda face: face.area)
            return encoder.embed(face_encoder.aligned(pixels, face.points)[None])[0]
        except FaceEncoderError as error:
            raise BrokenImageError(str(error)) from error


@cache
def _encoder(folder: str, process: int) -> FaceEncoder:
    """Load a model pack; a process does not share its sessions with those that it forks."""
    return FaceEncoder(Path(folder), single=True)


class FaceEmbedder:
    """What `ImageEncoder` is for other variants, of faces: what is read is what `preprocess` gives.

    `folder`: a model pack. With `column` the data brings its embeddings, and the pack is for other
    pictures. Raises TrainingError for a pack that cannot be used.
    """

    part = "face encoder"

    def __init__(self, folder: str | None, column: str | None) -> None:
        self.preprocess = EmbedFace(folder or "")
        self.name = f"the column {column}" if column else str(folder)
        self.weights = f"column {column}"
        if folder:
            try:
                _encoder(folder, os.getpid())
                files = face_encoder.files(Path(folder))
            except FaceEncoderError as error:
                raise TrainingError(str(error)) from error
            if not column:
                self.weights = fingerprints.of_files(files)
        self._device = torch.device("cpu")

    def to(self, device: torch.device | str) -> FaceEmbedder:
        self._device = torch.device(device)
        return self

    def feature_dim(self, kind: str) -> int:
        return WIDTH

    def features(self, embeddings: Tensor, kinds: Sequence[str]) -> dict[str, Tensor]:
        """Return embeddings `(N, 512)` as they are, under their name."""
        return {FACE: embeddings.to(self._device)}

    def zero(self, kind: str) -> Tensor:
        """Return what stands for a dropped face, `(1, 512)`: zeros."""
        return torch.zeros(1, WIDTH, device=self._device)
