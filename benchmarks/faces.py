"""Time of encoding a face on a CPU beside insightface, from the same random model pack.

Both begin with ComfyUI's picture, and find the largest face, cut it out and embed it, in
onnxruntime sessions of the same settings. The networks are small: what the pack itself does shows,
where the published ones would take most of the time on both sides. Runs alternate; the median of
the pairs' ratios counts.
"""

from __future__ import annotations

import importlib.util
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from ip_adapter_core.face_encoder import FaceEncoder, aligned
from tests.support import faces

from . import report

Encode = Callable[[Tensor], Tensor]
CONFIDENT = -1.5  # what leaves a few faces in the picture


def measure(rounds: int) -> dict[str, float]:
    """Return `face_ratio`, this pack's time over insightface's; nothing where that is missing."""
    if importlib.util.find_spec("insightface") is None:
        report.progress("insightface is not installed: encoding a face was not timed beside it")
        return {}
    image = picture()

    def seconds(encode: Encode) -> float:
        start = time.perf_counter()
        encode(image)
        return time.perf_counter() - start

    with tempfile.TemporaryDirectory() as folder:  # insightface opens the files again when it runs
        pack = faces.write_pack(Path(folder) / "buffalo_l", confident=CONFIDENT)
        ours, theirs = this_pack(pack), insightface(pack)
        for encode in (ours, theirs):
            encode(image)
        ratios = [seconds(ours) / seconds(theirs) for _ in range(rounds)]
    return {"face_ratio": statistics.median(ratios)}


def picture(height: int = 768, width: int = 1024) -> Tensor:
    """Return a picture of large and small details, `(H, W, 3)`."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(1, 3, 5, 7, generator=generator)
    fine = torch.rand(1, 3, height // 8, width // 8, generator=generator)
    both = [interpolate(x, (height, width), mode="bicubic") for x in (coarse, fine)]
    mixed = (0.7 * both[0] + 0.3 * both[1]).clamp(0, 1)[0].movedim(0, -1)
    return ((mixed * 255).round() / 255).contiguous()


def this_pack(pack: Path) -> Encode:
    """Return what embeds a picture's largest face, `(1, 512)`."""
    encoder = FaceEncoder(pack)

    def encode(image: Tensor) -> Tensor:
        face = max(encoder.faces(image), key=lambda face: face.area)
        return encoder.embed(aligned(image, face.points)[None])

    return encode


def insightface(pack: Path) -> Encode:
    """Return the same by insightface, as its `FaceAnalysis.get` does it."""
    from insightface.app.common import Face
    from insightface.model_zoo.arcface_onnx import ArcFaceONNX
    from insightface.model_zoo.scrfd import SCRFD

    detector = SCRFD(model_file=str(pack / "det_10g.onnx"))
    detector.prepare(0, input_size=(640, 640), det_thresh=0.5)
    recognizer = ArcFaceONNX(model_file=str(pack / "w600k_r50.onnx"))
    recognizer.prepare(0)

    def encode(image: Tensor) -> Tensor:
        pixels = np.rint(image.numpy() * 255).astype(np.uint8)[..., ::-1]
        boxes, points = detector.detect(pixels, max_num=1, metric="max")
        face = Face(bbox=boxes[0, :4], kps=points[0], det_score=boxes[0, 4])
        return torch.from_numpy(recognizer.get(pixels, face))[None]

    return encode
