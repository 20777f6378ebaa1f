"""Pictures as ComfyUI_IPAdapter_plus prepares them, to the pixel: tiles, crops, noise, sharpening.

Resizing is PIL's or torchvision's, as there: other code would round pixels another way.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate, pad
from torchvision.transforms import v2 as transforms
from torchvision.transforms.v2 import functional as vision

INTERPOLATIONS = ("LANCZOS", "BICUBIC", "HAMMING", "BILINEAR", "BOX", "NEAREST")
CROPS = ("top", "bottom", "left", "right", "center", "pad")
NOISES = ("fade", "dissolve", "gaussian", "shuffle")
SIDE = 224
TILE = 256
_LONGEST = 4  # tiles in a row
_BICUBIC = transforms.InterpolationMode.BICUBIC


def prepared(image: Tensor, interpolation: str, crop: str, sharpening: float) -> Tensor:
    """Return pictures `(N, H, W, C)` as squares of 224 pixels.

    `crop`: the square at an edge or the centre, or "pad" with black margins, which fall one pixel
    short where sides differ by an odd number.
    """
    images = _square(image.movedim(-1, 1), crop)
    return sharpened(_resized(images, (SIDE, SIDE), interpolation), sharpening).movedim(1, -1)


def _square(images: Tensor, crop: str) -> Tensor:
    height, width = images.shape[2:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    if crop == "pad":
        return pad(images, (top, top, left, left))
    top = {"top": 0, "bottom": height - side}.get(crop, top)
    left = {"left": 0, "right": width - side}.get(crop, left)
    return images[..., top : top + side, left : left + side]


def tiled(
    image: Tensor, mask: Tensor | None, sharpening: float
) -> tuple[list[Tensor], list[Tensor]]:
    """Cut pictures `(N, H, W, C)` into tiles of 256 pixels, each with its mask over the whole.

    Pictures that are nearly square are cut to a square and give four tiles; others have tiles along
    their longer side, evenly spread from edge to edge, at most four. `mask (M, H, W)` is resized to
    the picture first.
    """
    height, width = image.shape[1:3]
    if mask is None:
        mask = image.new_ones(1, height, width)
    images, masks = (
        image.movedim(-1, 1),
        vision.resize(mask[:, None], [height, width], interpolation=_BICUBIC, antialias=True),
    )
    ratio = height / width
    if 0.75 < ratio < 1.33:
        square = [min(height, width)] * 2
        images, masks = vision.center_crop(images, square), vision.center_crop(masks, square)
        size = (2 * TILE, 2 * TILE)
    elif ratio < 1:
        size = (int(TILE * width / height), TILE)
    else:
        size = (TILE, int(TILE * ratio))
    images = _resized(images, size, "LANCZOS")
    masks = vision.resize(masks, [*reversed(size)], interpolation=_BICUBIC, antialias=True)
    if not 1 / _LONGEST <= ratio <= _LONGEST:
        longest = [TILE, TILE * _LONGEST] if ratio < 1 else [TILE * _LONGEST, TILE]
        images, masks = vision.center_crop(images, longest), vision.center_crop(masks, longest)
    images = sharpened(images, sharpening).movedim(1, -1)
    tiles, parts = [], []
    for top in _starts(images.shape[1]):
        for left in _starts(images.shape[2]):
            place = (slice(None), slice(top, top + TILE), slice(left, left + TILE))
            part = torch.zeros_like(masks[:, 0])
            part[place] = masks[:, 0][place]
            tiles.append(images[place])
            parts.append(part)
    return tiles, parts


def _starts(length: int) -> list[int]:
    """Return where tiles begin, from edge to edge."""
    count = math.ceil(length / TILE)
    overlap = (count * TILE - length) / max(1, count - 1)
    return [int(i * (TILE - overlap)) for i in range(count)]


def _resized(images: Tensor, size: tuple[int, int], interpolation: str) -> Tensor:
    """Resize `(N, C, H, W)` to (width, height) in 8 bits, by PIL."""
    resample = Image.Resampling[interpolation]
    made = [vision.to_pil_image(image.cpu()).resize(size, resample) for image in images]
    return torch.stack([vision.pil_to_tensor(x).float() / 255 for x in made])


def sharpened(images: Tensor, amount: float) -> Tensor:
    """Sharpen `(N, C, H, W)` where there is little contrast (AMD's CAS); 0 leaves them alone."""
    if amount <= 0:
        return images
    padded = pad(images.cpu(), (1, 1, 1, 1))
    height, width = images.shape[2:]

    def at(y: int, x: int) -> Tensor:
        return padded[..., 1 + y : 1 + y + height, 1 + x : 1 + x + width]

    center = at(0, 0)
    beside = [at(-1, 0), at(0, -1), at(0, 1), at(1, 0)]
    cross = torch.stack([*beside, center])
    corners = torch.stack([at(-1, -1), at(-1, 1), at(1, -1), at(1, 1)])
    low = cross.amin(0).clamp(min=0) + corners.amin(0).clamp(min=0)
    high = cross.amax(0).clamp(max=1) + corners.amax(0).clamp(max=1)
    # In this order, so that encoders see the same 8 bits.
    contrast = (torch.reciprocal(high) * torch.minimum(low, 2 - high)).sqrt()
    weight = -contrast * (amount * (1 / 5 - 1 / 8) + 1 / 8)
    made = (sum(beside[1:], beside[0]) * weight + center) * torch.reciprocal(1 + 4 * weight)
    return made.nan_to_num().clamp(0, 1)


def noise(image: Tensor | None, kind: str, strength: float, blur: int) -> Tensor:
    """Make noise of a picture's centre square at 224 pixels, the same for the same picture.

    The seed is the sum of its pixels; no other generator is touched. `blur` is the width of a
    Gaussian kernel in pixels, made odd.
    """
    if image is None:
        image = torch.zeros(1, SIDE, SIDE, 3)
    images = vision.center_crop(image.movedim(-1, 1), [min(image.shape[1:3])] * 2)
    images = vision.resize(images, [SIDE, SIDE], interpolation=_BICUBIC, antialias=True)
    images = images.movedim(1, -1)  # random numbers are drawn channels last
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(images.sum().item()) % 1000000007)
        made = _noisy(images, kind, strength).clamp(0, 1)
    if blur > 0:
        kernel = blur + 1 - blur % 2
        made = vision.gaussian_blur(made.movedim(-1, 1), [kernel, kernel]).movedim(1, -1)
    return made


def _noisy(images: Tensor, kind: str, strength: float) -> Tensor:
    if kind == "fade":
        return images * (1 - strength) + torch.rand_like(images) * strength
    if kind == "dissolve":
        taken = (torch.rand_like(images) < strength).float()
        return images * (1 - taken) + torch.rand_like(images) * taken
    if kind == "gaussian":
        return images + torch.randn_like(images) * strength
    moved = shuffled(images, (1 - strength) * 3.5)
    normal = torch.randn_like(moved) * (strength * 0.75)
    return moved * (1 - normal) + normal


def shuffled(images: Tensor, sigma: float) -> Tensor:
    """Distort pictures `(N, H, W, C)` and turn them upside down, by torch's own generator."""
    change = transforms.Compose(
        [
            transforms.ElasticTransform(alpha=75.0, sigma=sigma),
            transforms.RandomVerticalFlip(p=1.0),
            transforms.RandomHorizontalFlip(p=1.0),
        ]
    )
    return change(images.movedim(-1, 1)).movedim(1, -1)


def first_noise(image: Tensor, strength: float) -> Tensor:
    """Make the negative picture of the nodes before 2024-03-23, `(N, 224, 224, C)`."""
    images = vision.center_crop(image.movedim(-1, 1), [min(image.shape[1:3])] * 2)
    images = vision.resize(images, [SIDE, SIDE], interpolation=_BICUBIC, antialias=True)
    images = images.movedim(1, -1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        moved = shuffled(images, 3.5 * strength)
        return moved + (0.25 * (1 - strength) + 0.05) * torch.randn_like(moved)


def masked_tiles(image: Tensor, along: int, weight: float) -> tuple[Tensor, Tensor]:
    """Cut the first picture into tiles of 224 pixels, `along` the short side, with a mask each.

    Masks hold `weight`; where tiles lie in rows and columns, larger ones of weight 1 come first.
    (*IPAdapter Masked Tiles*, until 2024-03-23.)
    """
    height, width = image.shape[1:3]
    if width < height:
        size = [height * SIDE * along // width, SIDE * along]
    else:
        size = [SIDE * along, width * SIDE * along // height]
    counts = [length // SIDE for length in size]
    starts = [0, 0]
    for axis, length in enumerate(size):
        rest = length % SIDE
        if rest >= SIDE // 4:
            counts[axis] += 1
        else:
            starts[axis] = (length - SIDE * counts[axis]) // 2
    one_row = 1 in counts
    whole = interpolate(image.movedim(-1, 1), size=size, mode="bicubic").movedim(1, -1)
    tiles, masks = [], []
    for row in range(counts[0]):
        for column in range(counts[1]):
            place = []
            for axis, number in enumerate((row, column)):
                first = number * SIDE + starts[axis]
                last = first + SIDE + starts[axis]
                if last > size[axis]:
                    first, last = size[axis] - SIDE, size[axis]
                place.append(slice(first, last))
            tiles.append(whole[0, place[0], place[1]])
            mask = image.new_zeros(*size)
            mask[place[0], place[1]] = 1.0 if one_row else weight
            masks.append(mask)
    cut, over = torch.stack(tiles), torch.stack(masks)
    if one_row:
        return cut, over
    larger, larger_masks = masked_tiles(whole, 1, 1.0)
    larger = _to_size(larger.movedim(-1, 1), cut.shape[1:3]).movedim(1, -1)
    larger_masks = _to_size(larger_masks[:, None], over.shape[1:3])[:, 0]
    return torch.cat([larger, cut]), torch.cat([larger_masks, over])


def _to_size(images: Tensor, size: Sequence[int]) -> Tensor:
    if tuple(images.shape[2:]) == tuple(size):
        return images
    return interpolate(images, size=[*size], mode="bicubic")


def for_face_detection(image: Tensor, crop: str, sharpening: float, around: bool) -> Tensor:
    """Return squares of 640 pixels; with white margins `around` a smaller one."""
    margin = 30 if around else 0
    side = 580 if around else 640
    images = _resized(_square(image.movedim(-1, 1), crop), (side, side), "LANCZOS")
    images = sharpened(images, sharpening)
    return pad(images, (margin,) * 4, value=1.0).movedim(1, -1)
