"""Opening images of every kind as upright RGB, and fitting them to a size."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

ImageData = Path | bytes | Image.Image

MAX_ASPECT = 32  # beyond, the shortest side's enlargement alone would fill the memory
_SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that swap width and height
_DEEP = 65535  # white of a 16-bit image


class BrokenImageError(Exception):
    """An image that cannot be used; the message says why, not which."""


def open_image(data: ImageData) -> Image.Image:
    """Return an upright RGB copy, transparency over white, the first frame of an animation.

    Raises BrokenImageError for what cannot be read: missing, cut short, no image at all,
    larger than Pillow's decompression-bomb limit, of floating-point numbers, or a mere strip.
    """
    with _opened(data) as image:
        image.load()
        with contextlib.suppress(Exception):  # damaged EXIF beside sound pixels loses no image
            ImageOps.exif_transpose(image, in_place=True)
        return _rgb(image)


def upright_size(data: ImageData) -> tuple[int, int]:
    """Return `open_image`'s (height, width) from the header alone, or raise BrokenImageError."""
    with _opened(data) as image:
        width, height = image.size
        # Pillow decodes a whole PNG in search of EXIF behind its pixels, and tells a TIFF's size as
        # it will be turned.
        if image.format != "TIFF" and (image.format != "PNG" or "exif" in image.info):
            with contextlib.suppress(Exception):
                if image.getexif().get(ExifTags.Base.Orientation) in _SIDEWAYS:
                    return width, height
        return height, width


class Fitted(NamedTuple):
    """`pixels` (3, H, W) float32 in -1..1, and where the crop began in the resized image."""

    pixels: Tensor
    top: int
    left: int


def fit(image: Image.Image, size: tuple[int, int]) -> Fitted:
    """Resize an RGB image to the least size that covers `(height, width)`; crop at its centre.

    Bit for bit torchvision's Resize (bilinear, antialiased), CenterCrop, ToTensor and
    Normalize([0.5], [0.5]), the reference's transform (tencent-ailab/IP-Adapter,
    tutorial_train.py), without converting what is cropped away.
    """
    height, width = size
    if image.height * width <= image.width * height:  # wider than the crop
        resized = height, image.width * height // image.height
    else:
        resized = image.height * width // image.width, width
    top, left = round((resized[0] - height) / 2), round((resized[1] - width) / 2)
    if (image.height, image.width) != resized:
        image = image.resize(resized[::-1], Image.Resampling.BILINEAR)
    image = image.crop((left, top, left + width, top + height))
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float()
    return Fitted(pixels.div_(127.5).sub_(1), top, left)


@contextlib.contextmanager
def _opened(data: ImageData) -> Iterator[Image.Image]:
    if isinstance(data, bytes) and not data:
        raise BrokenImageError("it is empty (0 bytes)")
    try:
        if isinstance(data, Image.Image):
            image = data.copy()  # the caller's stays open
        else:
            image = Image.open(io.BytesIO(data) if isinstance(data, bytes) else data)
        with image:
            if max(image.size) > MAX_ASPECT * min(image.size):
                raise BrokenImageError(f"a strip of {image.width} × {image.height} pixels")
            yield image
    except BrokenImageError:
        raise
    except Exception as error:  # Pillow's plugins raise a dozen kinds for damaged files
        raise BrokenImageError(_reason(error)) from error


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise BrokenImageError("floating-point pixels, whose range is not known")
    if image.mode == "I" or image.mode.startswith("I;16"):
        return _from_deep(image)
    if not image.has_transparency_data:
        return image.convert("RGB")
    opaque = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, opaque).convert("RGB")


def _from_deep(image: Image.Image) -> Image.Image:
    # Pillow's own conversion clips at 255 instead of scaling.
    values = np.asarray(image.convert("I"))
    if values.min() < 0 or values.max() > _DEEP:
        raise BrokenImageError("pixels of more than 16 bits, whose range is not known")
    grey = np.rint(values * (255 / _DEEP)).astype(np.uint8)
    return Image.fromarray(grey).convert("RGB")


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "there is no such file"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    # Pillow names the file or an object's address; the name is told beside the reason.
    text = str(error).split(" '")[0].split(" <")[0]
    return text or type(error).__name__
