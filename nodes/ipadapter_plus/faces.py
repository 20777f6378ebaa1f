"""Faces for the served nodes: this pack's encoder, or an insightface of the caller's own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...ip_adapter_core.crops import checked
from ...ip_adapter_core.face_encoder import SIZES, Face, FaceEncoder, FaceEncoderError, aligned
from .. import paths


def loaded(name: str) -> FaceEncoder:
    """Return the face encoder of a model pack. Raises FaceEncoderError or FileNotFoundError."""
    return FaceEncoder(paths.face_encoder_path(name))


def encoded(analysis: Any, image: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """Return embeddings `(N, 512)` and crops `(N, side, side, 3)` of each picture's first face.

    Raises FaceEncoderError for a picture without a face.
    """
    pictures = checked(image, "image").cpu()
    embeds, crops = [], []
    for picture in pictures:
        if isinstance(analysis, FaceEncoder):
            face = analysis.faces(picture)[0]
            embeds.append(analysis.embed(aligned(picture, face.points)[None])[0])
        else:
            face, embed = _by_insightface(analysis, picture)
            embeds.append(embed)
        crops.append(aligned(picture, face.points, side))
    return torch.stack(embeds), torch.stack(crops)


def _by_insightface(analysis: Any, picture: Tensor) -> tuple[Face, Tensor]:
    """Ask insightface's FaceAnalysis, as other packs hand it in."""
    pixels = (picture * 255).byte().numpy()[..., ::-1].copy()
    for side in SIZES:
        analysis.det_model.input_size = (side, side)
        found = analysis.get(pixels)
        if found:
            box, points = (torch.as_tensor(found[0][key]) for key in ("bbox", "kps"))
            embed = torch.as_tensor(found[0]["embedding"]).float()
            return Face(box, points, float(found[0]["det_score"])), embed
    raise FaceEncoderError(
        f"No face was found, sought at {SIZES[0]} down to {SIZES[-1]} pixels. Take a picture in "
        "which the face is larger, upright and not covered."
    )
