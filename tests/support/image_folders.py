"""Folders of images as training and evaluation read them."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def image(seed: int, size: tuple[int, int] = (40, 32)) -> Image.Image:
    """Draw soft patches of color."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def with_metadata(
    folder: Path, count: int, sizes: Sequence[tuple[int, int]] = ((40, 32),), broken: int = 0
) -> None:
    """Write `count` images and metadata.jsonl.

    Of `sizes` (width, height) in turn, the first `broken` no images at all.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number in range(count):
        name = f"{number:04}.png"
        if number < broken:
            (folder / name).write_bytes(b"not a picture")
        else:
            image(number, sizes[number % len(sizes)]).save(folder / name)
        lines.append(json.dumps({"file_name": name, "text": f"picture number {number}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")


def coco(folder: Path, count: int) -> None:
    """Write COCO's layout: val2017/ and annotations/captions_val2017.json, two captions each."""
    (folder / "val2017").mkdir(parents=True)
    (folder / "annotations").mkdir()
    images: list[Any] = []
    annotations: list[Any] = []
    for number in range(count):
        name = f"{number:012}.png"
        image(number).save(folder / "val2017" / name)
        images.append({"id": number, "file_name": name})
        for which in ("first", "second"):
            caption = f"the {which} caption of picture {number}\n"
            annotations.append({"image_id": number, "id": len(annotations), "caption": caption})
    content = {"images": images, "annotations": annotations}
    path = folder / "annotations" / "captions_val2017.json"
    path.write_text(json.dumps(content), encoding="utf-8")


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """Return an image as the bytes of a file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def shard(path: Path, files: Mapping[str, bytes]) -> str:
    """Write a WebDataset shard and return its path."""
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return str(path)
