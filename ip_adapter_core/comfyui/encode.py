"""Images through CLIP_VISION: what the encoder gets of them, and the image prompt it makes."""

from __future__ import annotations

import math
from typing import Any

import comfy.model_management as memory
import torch
from comfy.clip_model import clip_preprocess
from comfy.clip_vision import ClipVisionModel
from torch import Tensor
from torch.nn.functional import interpolate, pad

from ..crops import checked, square_at, tiles
from ..files.fingerprint import fingerprint
from ..image_prompt import DAMAGED_ENCODER, ImageFeatures, ImagePrompt, describe_encoder
from ..variants import FEATURE_KINDS
from .siglip import MODEL_TYPE as SIGLIP
from .siglip import pooled

CROPS = ("center", "pad", "none")
SQUARES = ("point", "tiles")
AT_ONCE = 16  # images: of a video's frames what is kept is features


def encode(
    clip_vision: ClipVisionModel, image: Tensor, negative_image: Tensor | None, crop: str
) -> ImagePrompt:
    """Encode `image (N, H, W, C)`, values 0 … 1, C = 1, 3 or 4, as an image prompt.

    `crop`: "center" resizes the short side and cuts the long one, as in training; "pad" adds
    margins of the encoder's mean color; "none" squeezes the image into the square. Raises
    ValueError for no images, other shapes, or values that are not finite, of the images or out of
    the encoder.
    """
    check_kind(clip_vision)
    positive = _features(clip_vision, image, crop, "image")
    black = None
    if negative_image is None:
        negative, black = _zero_image(clip_vision, positive.image_embeds.shape[-1])
    else:
        negative = _features(clip_vision, negative_image, crop, "negative_image")
    made = ImagePrompt(positive, negative, *described(clip_vision, positive), black=black)
    _check_finite(made)
    return made


def described(clip_vision: ClipVisionModel, found: ImageFeatures) -> tuple[str, str]:
    """Describe the encoder that gave these features, in words and by its fingerprint."""
    quick = _activation(clip_vision).lower().replace("_", "") == "quickgelu"
    words = describe_encoder(found, clip_vision.image_size, quick)
    return words, _fingerprint(clip_vision)


def features(
    clip_vision: ClipVisionModel, image: Tensor, mask: Tensor | None = None
) -> ImageFeatures:
    """Encode `image (N, H, W, C)` as `encode` does with its center crop, and say no more of it.

    `mask (M, S, S)`, S the encoder's side, multiplies the normalised pixels; M is 1 or N.
    Raises ValueError as `encode` does.
    """
    check_kind(clip_vision)
    if mask is None:
        return _features(clip_vision, image, "center", "image")
    memory.load_model_gpu(clip_vision.patcher)
    where = clip_vision.load_device
    pixels = clip_preprocess(
        _cropped(clip_vision, image, "center", "image").to(where),
        size=clip_vision.image_size,
        mean=clip_vision.image_mean,
        std=clip_vision.image_std,
    ).float()
    return _of_pixels(clip_vision, pixels * mask[:, None].to(where))


def zero_features(clip_vision: ClipVisionModel, black: bool = False) -> ImageFeatures:
    """Return the dropped image of training, or with `black` a black picture's features."""
    check_kind(clip_vision)
    size = clip_vision.image_size
    if black:
        return _features(clip_vision, torch.zeros(1, size, size, 3), "center", "image")
    memory.load_model_gpu(clip_vision.patcher)
    pixels = torch.zeros(1, 3, size, size, device=clip_vision.load_device)
    return _of_pixels(clip_vision, pixels)


def _of_pixels(clip_vision: ClipVisionModel, pixels: Tensor) -> ImageFeatures:
    """Encode normalised pixels `(N, 3, S, S)`."""
    out = clip_vision.model(pixel_values=pixels, intermediate_output=-2)
    embeds = _embeds(clip_vision, {"image_embeds": out[2], "last_hidden_state": out[0]})
    return ImageFeatures(embeds.float().cpu(), out[1].float().cpu())


def _embeds(clip_vision: ClipVisionModel, out: Any) -> Tensor:
    """Leave out what ComfyUI passes on of the pooled state where there is no projection."""
    if clip_vision.model_type == SIGLIP:
        return pooled(clip_vision, out["last_hidden_state"])
    embeds: Tensor = out["image_embeds"]
    if isinstance(clip_vision.model.visual_projection, torch.nn.Identity):
        return embeds[:, :0]
    return embeds


def prepare_image(
    clip_vision: ClipVisionModel, image: Tensor, crop: str, x: float, y: float, grid: int
) -> Tensor:
    """Return `image (N, H, W, C)` as it meets the encoder, `(M, size, size, 3)`.

    RGB of 8 bits, within 0 … 1, before normalization: encoded with any crop it gives the same
    features.

    `crop`: those of `encode`; "point", the square of the short side around the point `x`, `y` in
    fractions of the image; "tiles", M/N squares an image that together cover it, `grid` along the
    short side. Raises ValueError for what `encode`, `square_at` or `tiles` refuse.
    """
    check_kind(clip_vision)
    if crop == "point":
        image = square_at(checked(image, "image"), x, y)
    elif crop == "tiles":
        image = tiles(checked(image, "image"), grid)
    elif crop in CROPS:
        image = _cropped(clip_vision, image, crop, "image")
    else:
        raise ValueError(f"crop is {crop!r}; expected one of {', '.join((*CROPS, *SQUARES))}.")
    # The encoder's own device, whose resampling rounds its own way.
    pixels = clip_preprocess(
        image.to(clip_vision.load_device),
        size=clip_vision.image_size,
        mean=[0.0] * 3,
        std=[1.0] * 3,
        crop=crop != "none",
    )
    return pixels.movedim(1, -1).contiguous().to(memory.intermediate_device())


def check_kind(clip_vision: ClipVisionModel | None) -> None:
    """Raise ValueError for what is no CLIP vision model."""
    if clip_vision is None:
        raise ValueError(
            "There is no image encoder at 'clip_vision': a FaceID or Portrait adapter that was "
            "found by Auto Load IP-Adapter reads none. Take Encode Face in place of this node, or "
            "another preset."
        )
    if clip_vision.model_type not in ("clip_vision_model", SIGLIP):
        raise ValueError(
            f"The image encoder is a {clip_vision.model_type}, which no supported IP-Adapter was "
            "trained with; expected a CLIP vision model. Load the adapter's own encoder, CLIP "
            "ViT-H/14 for most."
        )


def _cropped(clip_vision: ClipVisionModel, image: Tensor, crop: str, name: str) -> Tensor:
    """Return checked RGB images `(N, H, W, 3)` that ComfyUI preprocesses at any shape."""
    image = checked(image, name)
    if crop == "center":
        return _trim(image, clip_vision.image_size)
    if crop == "pad":
        return _pad(_shrink(image, 8 * clip_vision.image_size), clip_vision.image_mean)
    if crop == "none":
        return image
    raise ValueError(f"crop is {crop!r}; expected one of {', '.join(CROPS)}.")


def _trim(image: Tensor, size: int) -> Tensor:
    """Shorten strips of more than 4:1 to what the center crop and its filter reach.

    A 1×4000 image would be enlarged to 224×896000 first. Others stay as they are.
    """
    short = min(image.shape[1:3])
    reach = 2 * math.ceil(max(1.0, short / size)) + 1  # of the bicubic filter, in pixels
    keep = max(4 * short, short + 2 * reach)
    for dim in (1, 2):
        margin = (image.shape[dim] - keep) // 2  # equal on both sides: the center stays
        if margin > 0:
            image = image.narrow(dim, margin, image.shape[dim] - 2 * margin)
    return image


def _shrink(image: Tensor, limit: int) -> Tensor:
    """Bound the long side: padded to a square, a strip of 1×30000 would take 11 GB."""
    height, width = image.shape[1:3]
    if max(height, width) <= limit:
        return image
    size = [max(1, round(side * limit / max(height, width))) for side in (height, width)]
    small = interpolate(image.movedim(-1, 1), size, mode="bicubic", antialias=True)
    return small.movedim(1, -1).clamp(0, 1)


def _pad(image: Tensor, color: list[float]) -> Tensor:
    height, width = image.shape[1:3]
    side = max(height, width)
    left, top = (side - width) // 2, (side - height) // 2
    mean = image.new_tensor(color)
    margins = (0, 0, left, side - width - left, top, side - height - top)
    return pad(image - mean, margins) + mean


def _features(clip_vision: ClipVisionModel, image: Tensor, crop: str, name: str) -> ImageFeatures:
    found = []
    for part in image.split(AT_ONCE):
        square = crop != "none"
        out = clip_vision.encode_image(_cropped(clip_vision, part, crop, name), crop=square)
        embeds = _embeds(clip_vision, out)
        found.append((embeds.float().cpu(), out["penultimate_hidden_states"].float().cpu()))
    return ImageFeatures(*map(torch.cat, zip(*found, strict=True)))


def _check_finite(prompt: ImagePrompt) -> None:
    for side in (prompt.positive, prompt.negative):
        for kind in FEATURE_KINDS:
            if not getattr(side, kind).isfinite().all():
                raise ValueError(
                    f"The {kind.replace('_', ' ')} contain NaN or infinite values, out of "
                    f"{prompt.encoder}: {DAMAGED_ENCODER}"
                )


def _fingerprint(clip_vision: ClipVisionModel) -> str:
    """Of the weights and of what else decides what they make of an image."""
    return fingerprint(
        clip_vision.model,
        activation=_activation(clip_vision),
        image_size=clip_vision.image_size,
        mean=[round(x, 6) for x in clip_vision.image_mean],
        std=[round(x, 6) for x in clip_vision.image_std],
    )


def _activation(clip_vision: ClipVisionModel) -> str:
    """Return the name: ComfyUI's are functions, named in the config; open_clip's are modules."""
    names = {type(module).__name__ for module in clip_vision.model.modules()}
    used = ", ".join(sorted(name for name in names if "GELU" in name))
    return str(clip_vision.config.get("hidden_act", used))


def _zero_image(clip_vision: ClipVisionModel, embed_dim: int) -> tuple[ImageFeatures, Tensor]:
    """Return the dropped image of training, and the embedding of a black picture.

    A zero embedding, and the hidden states of pixels that are zero *after* normalization.
    `encode_image` would round the mean color to 8 bits.
    """
    memory.load_model_gpu(clip_vision.patcher)
    size, where = clip_vision.image_size, clip_vision.load_device
    mean, std = (torch.tensor(x) for x in (clip_vision.image_mean, clip_vision.image_std))
    colors = torch.stack([torch.zeros(3), -mean / std])[..., None, None]
    found = _of_pixels(clip_vision, colors.expand(2, 3, size, size).to(where))
    zero = ImageFeatures(torch.zeros(1, embed_dim), found.penultimate_hidden_states[:1])
    return zero, found.image_embeds[1:]
