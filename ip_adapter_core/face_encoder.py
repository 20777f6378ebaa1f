"""Faces of a picture, and the embedding that says whose: SCRFD and ArcFace by onnxruntime.

The files are insightface's model packs (buffalo_l, antelopev2), whose weights are for
non-commercial research only; its library is not needed. What is computed follows it: SCRFD
(arXiv 2105.04714) finds boxes and five points at up to six sizes, a similarity transform lays the
points over a template, and ArcFace (arXiv 1801.07698) reads the 112 pixels of that.

Pixels are counted in numpy wherever it can: torch's threads and onnxruntime's wait for each other,
which takes several times as long as the work.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import grid_sample, interpolate

SIZES = range(640, 256, -64)
"""Sides in pixels at which faces are sought, one after the other until there is one."""
CROP = 112
_TEMPLATE = torch.tensor(
    [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655],
     [70.7299, 92.2041]], dtype=torch.float64,
)  # fmt: skip
"""Eyes, nose and corners of the mouth in a crop of 112 pixels."""
_STRIDES, _ANCHORS = (8, 16, 32), 2
_SCORE, _OVERLAP = 0.5, 0.4
DETECTORS = ("det_10g.onnx", "scrfd_10g_bnkps.onnx")
RECOGNIZERS = ("w600k_r50.onnx", "glintr100.onnx")


class FaceEncoderError(ValueError):
    """A pack that cannot be used, or a picture without a face; with a remedy."""


@dataclass(frozen=True)
class Face:
    """`box` x₁ y₁ x₂ y₂ and five `points (5, 2)` in pixels of the picture, and how sure it is."""

    box: Tensor
    points: Tensor
    score: float

    @property
    def area(self) -> float:
        width, height = (self.box[2:] - self.box[:2]).clamp(min=0).tolist()
        return float(width * height)


def missing(folder: Path) -> list[str]:
    """Return what a folder lacks of a model pack, the names to choose from."""
    parts = DETECTORS, RECOGNIZERS
    return [" or ".join(names) for names in parts if not any((folder / n).is_file() for n in names)]


def files(folder: Path) -> list[Path]:
    """Return a model pack's detector and recognizer. Raises FaceEncoderError if one is missing."""
    lacking = missing(folder)
    if lacking:
        raise FaceEncoderError(
            f"'{folder}' lacks {' and '.join(lacking)}. Put the files of insightface's model "
            "pack buffalo_l (or antelopev2) into that folder."
        )
    parts = DETECTORS, RECOGNIZERS
    return [next(folder / n for n in names if (folder / n).is_file()) for names in parts]


class FaceEncoder:
    """A model pack. Pictures are `(H, W, 3)`, RGB within 0 … 1.

    `single`: on one CPU thread, as one of several processes that share a machine.

    Raises FaceEncoderError where onnxruntime or a file is missing, or a file is damaged.
    """

    def __init__(self, folder: Path, *, single: bool = False) -> None:
        self.name = folder.name
        self._detector, self._recognizer = (_session(path, single) for path in files(folder))

    def faces(self, image: Tensor) -> list[Face]:
        """Return the faces of a picture, the surest first.

        Raises FaceEncoderError for none: it tells at which sizes, and the best candidate's score.
        """
        best = 0.0
        pixels = torch.from_numpy(_levels(image).clip(0, 255).astype(np.uint8)).movedim(-1, 0)[None]
        for side in SIZES:
            found, score = self._detect(pixels, side)
            if found:
                return found
            best = max(best, score)
        raise FaceEncoderError(
            f"No face was found in a picture of {image.shape[1]}×{image.shape[0]} pixels, sought "
            f"at {SIZES[0]} down to {SIZES[-1]} pixels; the best candidate has a score of "
            f"{best:.2f}, and {_SCORE} is asked for. Take a picture in which the face is larger, "
            "upright and not covered, with some room around it."
        )

    def _detect(self, pixels: Tensor, side: int) -> tuple[list[Face], float]:
        """Return the faces found at a size, and the best score, of 8 bits `(1, 3, H, W)`."""
        height, width = pixels.shape[2:]
        scale = min(side / height, side / width)
        if height >= width:
            size = (side, max(1, int(side / (height / width))))
        else:
            size = (max(1, int(side * (height / width))), side)
        scale = size[0] / height
        square = np.full((1, 3, side, side), -127.5, np.float32)
        small = interpolate(pixels, size, mode="bilinear").numpy()
        np.subtract(small, 127.5, out=square[..., : size[0], : size[1]], dtype=np.float32)
        square /= 128
        name = self._detector.get_inputs()[0].name
        out = self._detector.run(None, {name: square})
        boxes, points, scores = [], [], []
        levels, best = len(_STRIDES), 0.0
        for level, stride in enumerate(_STRIDES):
            score, box, five = (
                torch.from_numpy(out[level + levels * i]).reshape(-1, n)
                for i, n in enumerate((1, 4, 10))
            )
            sure = score[:, 0] >= _SCORE
            best = max(best, float(score.max()))
            centers = _centers(side // stride, stride)[sure]
            box, five = box[sure] * stride, five[sure].reshape(-1, 5, 2) * stride
            boxes.append(torch.cat([centers - box[:, :2], centers + box[:, 2:]], dim=1))
            points.append(centers[:, None] + five)
            scores.append(score[sure, 0])
        score, order = torch.cat(scores).sort(descending=True, stable=True)
        box, five = torch.cat(boxes)[order] / scale, torch.cat(points)[order] / scale
        return [Face(box[i], five[i], float(score[i])) for i in _suppressed(box)], best

    def embed(self, crops: Tensor) -> Tensor:
        """Return embeddings `(N, 512)`, as they come, of aligned crops `(N, 112, 112, 3)`."""
        name = self._recognizer.get_inputs()[0].name
        pixels = (crops.movedim(-1, 1).float().numpy() * 255 - 127.5) / 127.5
        made = [
            torch.from_numpy(self._recognizer.run(None, {name: one[None]})[0])
            for one in np.ascontiguousarray(pixels, np.float32)
        ]
        embeds = torch.cat(made).float()
        if not embeds.isfinite().all():
            raise FaceEncoderError(
                f"The face encoder '{self.name}' gives NaN or infinite embeddings: its files are "
                "damaged. Put insightface's model pack there again."
            )
        return embeds


def _session(path: Path, single: bool) -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise FaceEncoderError(
            "Faces are encoded by onnxruntime, which is not installed. Install it into this "
            "Python (ComfyUI's, for its nodes): pip install onnxruntime"
        ) from error
    wanted = ("CUDAExecutionProvider", "CPUExecutionProvider")[single:]
    providers = [p for p in wanted if p in onnxruntime.get_available_providers()]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = int(single)  # 0: as many as there are cores
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=providers)
    except Exception as error:  # onnxruntime raises a dozen kinds of its own
        first = next(iter(str(error).splitlines()), "")
        raise FaceEncoderError(
            f"'{path}' cannot be read ({first}). It was cut short, or is no ONNX model: put "
            "insightface's model pack there again."
        ) from error


def _levels(image: Tensor) -> Any:
    """Return the nearest of 256 levels for each value."""
    return np.rint(image.float().numpy() * 255)


def _centers(count: int, stride: int) -> Tensor:
    """Return x and y of the anchors of a level, `(count² · anchors, 2)`, row by row."""
    line = torch.arange(count, dtype=torch.float32) * stride
    y, x = torch.meshgrid(line, line, indexing="ij")
    return torch.stack([x, y], dim=-1).reshape(-1, 2).repeat_interleave(_ANCHORS, dim=0)


def _suppressed(boxes: Tensor) -> list[int]:
    """Return which boxes stay, the best first, where they overlap."""
    low, high = boxes[:, :2].numpy(), boxes[:, 2:].numpy()
    areas = (high - low + 1).prod(axis=1)
    kept: list[int] = []
    left = np.arange(len(boxes))
    while left.size:
        first, left = left[0], left[1:]
        kept.append(int(first))
        reach = np.minimum(high[first], high[left]) - np.maximum(low[first], low[left]) + 1
        shared = reach.clip(min=0).prod(axis=1)
        left = left[shared <= _OVERLAP * (areas[first] + areas[left] - shared)]
    return kept


def aligned(image: Tensor, points: Tensor, side: int = CROP) -> Tensor:
    """Return the crop `(side, side, 3)` of a picture whose five points lie over the template."""
    ratio, shift = (side / CROP, 0.0) if side % CROP == 0 else (side / 128, 8 * side / 128)
    template = _TEMPLATE * ratio + torch.tensor([shift, 0.0], dtype=torch.float64)
    matrix = similarity(points.double(), template)
    inverse = torch.linalg.inv(torch.cat([matrix, matrix.new_tensor([[0, 0, 1]])])).numpy()
    height, width = image.shape[:2]
    y, x = np.ogrid[:side, :side]
    grid = np.empty((1, side, side, 2), np.float32)
    for i, end in enumerate((max(1, width - 1), max(1, height - 1))):
        a, b, c = inverse[i]
        grid[0, ..., i] = 2 * (a * x + b * y + c) / end - 1
    pixels, places = image.movedim(-1, 0)[None].float(), torch.from_numpy(grid)
    cut = grid_sample(pixels, places, mode="bilinear", padding_mode="zeros", align_corners=True)
    return torch.from_numpy((_levels(cut[0].movedim(0, -1)) / 255).clip(0, 1))


def similarity(points: Tensor, onto: Tensor) -> Tensor:
    """Return the matrix `(2, 3)` that turns, scales and moves points `(N, 2)` onto others.

    With the least squared error (Umeyama 1991).
    """
    centers = points.mean(0), onto.mean(0)
    one, other = points - centers[0], onto - centers[1]
    u, values, v = torch.linalg.svd(other.T @ one / len(points))
    sign = torch.ones(2, dtype=points.dtype)
    if torch.linalg.det(u) * torch.linalg.det(v) < 0:
        sign[-1] = -1
    rotation = u @ torch.diag(sign) @ v
    variance = one.square().sum(1).mean()
    if not variance > 0:
        raise FaceEncoderError("The five points of a face lie in one place; it cannot be cut out.")
    scale = (values * sign).sum() / variance
    return torch.cat([scale * rotation, (centers[1] - scale * rotation @ centers[0])[:, None]], 1)


def marked(image: Tensor, face: Face, side: int) -> Tensor:
    """Return the surroundings of a face as `(side, side, 3)`, with its box and points drawn."""
    height, width = image.shape[:2]
    center, reach = (face.box[:2] + face.box[2:]) / 2, (face.box[2:] - face.box[:2]).max() * 0.8
    low = (center - reach).floor().long()
    length = max(8, math.ceil(float(2 * reach)))
    cut = torch.zeros(length, length, 3)
    top, left = max(0, int(low[1])), max(0, int(low[0]))
    bottom, right = min(height, int(low[1]) + length), min(width, int(low[0]) + length)
    if bottom > top and right > left:
        y, x = top - int(low[1]), left - int(low[0])
        cut[y : y + bottom - top, x : x + right - left] = image[top:bottom, left:right]
    drawn = interpolate(cut.movedim(-1, 0)[None], (side, side), mode="bilinear")[0].movedim(0, -1)
    scale = side / length
    for point, color in zip((face.points - low) * scale, torch.eye(3).repeat(2, 1), strict=False):
        x, y = (int(v) for v in point.round().tolist())
        drawn[max(0, y - 3) : max(0, y + 4), max(0, x - 3) : max(0, x + 4)] = color
    x1, y1, x2, y2 = (int(v) for v in ((face.box - low.repeat(2)) * scale).round().tolist())
    for edge in (y1, y2):
        drawn[max(0, edge) : max(0, edge + 2), max(0, x1) : max(0, x2)] = 1.0
    for edge in (x1, x2):
        drawn[max(0, y1) : max(0, y2), max(0, edge) : max(0, edge + 2)] = 1.0
    return drawn
