"""Pictures of faces as image prompts."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from comfy.clip_vision import ClipVisionModel
from torch import Tensor

from ..crops import checked
from ..face_encoder import Face, FaceEncoder, FaceEncoderError, aligned, marked
from ..face_projection import WIDTH
from ..image_prompt import ImageFeatures, ImagePrompt
from .encode import described, features, zero_features

ORDERS = ("largest", "left to right")
SEVERAL = ("side by side", "average")
SHOWN = 256  # pixels of a side
_CROP = 224  # what FaceID Plus was trained on


@dataclass(frozen=True)
class FacePrompt:
    """A prompt of faces; their crops and the faces with their points, `(N, S, S, 3)`."""

    prompt: ImagePrompt
    crops: Tensor
    shown: Tensor


def encode_faces(
    encoder: FaceEncoder,
    image: Tensor,
    clip_vision: ClipVisionModel | None,
    *,
    order: str = "largest",
    number: int = 1,
    several: str = "side by side",
    structure: float = 1.0,
) -> FacePrompt:
    """Encode one face of each picture `(N, H, W, C)`.

    Args:
        encoder: Finds and describes faces.
        image: The pictures.
        clip_vision: Reads the faces' crops, for FaceID Plus; None: those adapters cannot use it.
        order: "largest" counts faces from the largest, "left to right" by their places.
        number: Which of them, from 1.
        several: "average" makes one person of all pictures.
        structure: How much FaceID Plus v2 follows the crop beside the embedding.

    Raises:
        ValueError: For what `checked` refuses, a picture without that face, or another order.
    """
    if order not in ORDERS:
        raise ValueError(f"order is {order!r}; expected one of {', '.join(ORDERS)}.")
    pictures = checked(image, "image").cpu()
    chosen = [_chosen(encoder.faces(one), order, number, i) for i, one in enumerate(pictures, 1)]
    pairs = [*zip(pictures, chosen, strict=True)]
    faces = encoder.embed(torch.stack([aligned(one, face.points) for one, face in pairs]))
    crops = torch.stack([aligned(one, face.points, _CROP) for one, face in pairs])
    named = f"the face encoder '{encoder.name}'"
    prompt = prompt_of(faces, clip_vision, crops, named, structure, several)
    shown = torch.stack([marked(one, face, SHOWN) for one, face in pairs])
    return FacePrompt(prompt, crops, shown)


def _chosen(faces: Sequence[Face], order: str, number: int, picture: int) -> Face:
    if order == "largest":
        ordered = sorted(faces, key=lambda face: -face.area)
    else:
        ordered = sorted(faces, key=lambda face: float(face.box[0]))
    if not 1 <= number <= len(ordered):
        raise ValueError(
            f"Picture {picture} has {len(ordered)} faces, but face {number} is asked for. Choose "
            f"a number from 1 to {len(ordered)}."
        )
    return ordered[number - 1]


def prompt_of(
    face_embeds: Tensor,
    clip_vision: ClipVisionModel | None,
    crops: Tensor | None,
    named: str,
    structure: float = 1.0,
    several: str = "side by side",
) -> ImagePrompt:
    """Return the prompt of face embeddings `(N, 512)`, with the crops' features where there are.

    Raises ValueError for embeddings of another shape, or that are not finite, for another number of
    crops, and for another `several`.
    """
    if several not in SEVERAL:
        raise ValueError(f"several is {several!r}; expected one of {', '.join(SEVERAL)}.")
    faces = checked_embeds(face_embeds)
    count, fingerprint = len(faces), ""
    positive = ImageFeatures(torch.zeros(count, 0), torch.zeros(count, 0, 0), faces)
    negative = ImageFeatures(torch.zeros(1, 0), torch.zeros(1, 0, 0), torch.zeros(1, WIDTH))
    if clip_vision is not None and crops is not None:
        if len(crops) != count:
            raise ValueError(
                f"face_embeds holds {count} faces, but image holds {len(crops)} pictures. Connect "
                "the crop of each face, in their order, or no clip_vision."
            )
        found, zero = features(clip_vision, crops), zero_features(clip_vision)
        description, fingerprint = described(clip_vision, found)
        named = f"{named} and {description}"
        positive = replace(found, face_embeds=faces)
        embeds = torch.zeros(1, found.image_embeds.shape[-1])
        negative = ImageFeatures(embeds, zero.penultimate_hidden_states, torch.zeros(1, WIDTH))
    digest = hashlib.sha256(f"{named} {fingerprint}".encode()).hexdigest()
    positive = positive.mean() if several == "average" else positive
    return ImagePrompt(positive, negative, named, digest, structure)


def checked_embeds(face_embeds: Tensor) -> Tensor:
    """Return embeddings `(N, 512)`, float32 on the CPU. Raises ValueError for others."""
    embeds = torch.as_tensor(face_embeds).float().cpu()
    shape = [*embeds.shape]
    if embeds.ndim in (1, 2, 3) and embeds.shape[-1] == WIDTH and embeds.numel():
        embeds = embeds.reshape(-1, WIDTH)
    else:
        raise FaceEncoderError(
            f"face_embeds has the shape {shape}; expected [faces, {WIDTH}], as ArcFace gives them. "
            "Take those of insightface's buffalo_l or antelopev2."
        )
    if not embeds.isfinite().all():
        raise FaceEncoderError(
            "face_embeds contains NaN or infinite values. Look at the node that made them."
        )
    return embeds
