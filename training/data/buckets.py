"""Aspect-ratio buckets: images of like shape go into one batch, and little is cropped away."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from filelock import FileLock

from ip_adapter_core.files.atomic import atomic

from ..errors import TrainingError
from .image import BrokenImageError, upright_size
from .sampler import LEFT_OUT, BalancedBatchSampler, BatchOrder, BucketBatchSampler
from .sources import Source

STEP = 64  # pixels; the UNet halves latents three times
LATENT_STEP = 8  # pixels of the VAE's latents
RATIO = 2.0  # of the longer side to the shorter: beyond, SDXL's own training had little
FULL = 0.85  # of size² pixels: smaller images would be rare and wasteful
MANY = 1 << 16  # rows that are computed at a time
BLOCK = 256  # rows whose headers one thread reads in one go

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Buckets:
    """Sizes `(height, width)` in pixels, and which of them each row has.

    `of_row` (rows,) int16, or None where there is one size only.
    """

    sizes: tuple[tuple[int, int], ...]
    of_row: np.ndarray | None = None

    def size_of(self, row: int) -> tuple[int, int]:
        """Height and width that this row's image is fitted to."""
        return self.sizes[0 if self.of_row is None else int(self.of_row[row])]

    def batches(self, rows: np.ndarray, batch: int) -> Iterator[np.ndarray]:
        """Split rows into batches of up to `batch`, each of one bucket."""
        buckets = np.zeros_like(rows) if self.of_row is None else self.of_row[rows]
        for bucket in np.unique(buckets):
            alike = rows[buckets == bucket]
            yield from (alike[start : start + batch] for start in range(0, len(alike), batch))

    def sampler(
        self,
        rows: int,
        batch: int,
        seed: int,
        held_out: np.ndarray | None = None,
        balanced: np.ndarray | None = None,
    ) -> BatchOrder:
        """Return the order of batches of `batch` samples. Names the buckets that never fill one.

        `held_out` (rows,) bool: rows that are in none. `balanced` (rows,) int32: the number of each
        row's value, of which all are to be equally frequent. Raises TrainingError if no bucket
        fills a batch.
        """
        of_row = self.of_row
        if held_out is not None:
            kept = np.int16(0) if of_row is None else of_row
            of_row = np.where(held_out, np.int16(LEFT_OUT), kept)
        if balanced is not None:
            return BalancedBatchSampler(of_row, balanced, batch, seed)
        order = BucketBatchSampler(of_row, rows, batch, seed)
        if self.of_row is not None and of_row is not None:
            counts = _counts(of_row, len(self.sizes))
            for (height, width), count in zip(self.sizes, counts, strict=True):
                if 0 < count < batch:
                    logger.warning(
                        "bucket of %d × %d pixels (width × height): its %d images never fill a "
                        "batch of %d, so none of them is seen; a smaller train_batch_size would "
                        "take them in",
                        *(width, height, count, batch),
                    )
        return order


def check_multiple(
    name: str, value: int, of: int = LATENT_STEP, why: str = "the pixels of one latent"
) -> None:
    """Raise TrainingError unless `value` is a positive multiple of `of`."""
    if value < of or value % of:
        raise TrainingError(f"{name} is {value}; expected a multiple of {of}, {why}.")


def square(size: int) -> Buckets:
    """Return one bucket, `size` × `size` pixels. Raises TrainingError unless the VAE divides it."""
    check_multiple("resolution", size)
    return Buckets(((size, size),))


def bucket_sizes(size: int) -> tuple[tuple[int, int], ...]:
    """Return all `(height, width)` of multiples of 64 that are 0.85 to 1 times size² pixels.

    Sides are at most 1 : 2, each as large as fits; the square one is first. Raises TrainingError
    unless `size` is a multiple of 64.
    """
    check_multiple("resolution", size, STEP, "with enable_bucket: 512, 768 or 1024")
    sizes = {(size, size)}
    for short in range(STEP, size, STEP):
        long = int(min(size * size // short, RATIO * short)) // STEP * STEP
        if short * long >= FULL * size * size:
            sizes |= {(short, long), (long, short)}
    return tuple(sorted(sizes, key=lambda s: (s[0] != s[1], s)))


def nearest(sizes: tuple[tuple[int, int], ...], images: np.ndarray) -> np.ndarray:
    """Which of `sizes` is nearest in aspect ratio (by its logarithm) to each of `images`.

    `images` (rows, 2) height and width; (rows,) int16. Of unknown size (0): as if square.
    """
    edges = np.log([height / width for height, width in sizes])
    order = np.argsort(edges, kind="stable")
    between = (edges[order][1:] + edges[order][:-1]) / 2
    buckets = np.zeros(len(images), np.int16)
    for start in range(0, len(images), MANY):  # what is computed on the way is larger
        height, width = images[start : start + MANY].T
        known: np.ndarray = (height > 0) & (width > 0)
        aspect = np.log(np.where(known, height, 1) / np.where(known, width, 1))
        buckets[start : start + MANY] = order[np.searchsorted(between, aspect)]
    return buckets


def by_aspect(source: Source, size: int, folder: Path) -> Buckets:
    """Return a bucket for every row of `source`, of about `size`² pixels.

    Sizes come from the data's `height` and `width` columns; for the others the headers of the
    images are read, once: they are kept in `folder`. Unreadable ones go to the square bucket.
    """
    sizes = bucket_sizes(size)
    of_row = nearest(sizes, image_sizes(source, folder))
    counts = _counts(of_row, len(sizes))
    listed = (f"{w}×{h}: {n}" for (h, w), n in zip(sizes, counts, strict=True) if n)
    logger.info("buckets (width × height: pictures): %s", ", ".join(listed))
    return Buckets(sizes, of_row)


def image_sizes(source: Source, folder: Path) -> np.ndarray:
    """Upright height and width of every image, (rows, 2) int32; 0 for those that are broken."""
    sizes = source.sizes()
    if sizes.all():
        return sizes
    name = hashlib.blake2b(f"sizes {source.fingerprint}".encode(), digest_size=16).hexdigest()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.npy"
    with FileLock(path.with_suffix(".lock")):
        if path.exists():
            sizes = np.where(sizes == 0, np.load(path), sizes)
        unknown = np.flatnonzero(np.min(sizes, axis=1) == 0)  # broken ones are tried again
        if len(unknown):
            sizes = _read_headers(source, sizes.copy(), unknown)
            with atomic(path) as temporary, temporary.open("wb") as file:
                np.save(file, sizes)
    return sizes


def _read_headers(source: Source, sizes: np.ndarray, rows: np.ndarray) -> np.ndarray:
    if len(rows) > BLOCK:
        logger.info("reading the headers of %d pictures for their buckets, once", len(rows))

    def read(block: np.ndarray) -> None:
        for row in block:
            record = source[row]
            try:
                if not record.broken:
                    sizes[row] = upright_size(record.image)
            except BrokenImageError as error:
                logger.debug("%s: %s", record.name, error)

    blocks = (rows[start : start + BLOCK] for start in range(0, len(rows), BLOCK))
    with ThreadPoolExecutor(min(32, 4 * (os.cpu_count() or 1))) as pool:
        for _ in pool.map(read, blocks):
            pass  # raises what a thread raised
    return sizes


def _counts(of_row: np.ndarray, buckets: int) -> list[int]:
    # np.bincount would copy all of it to int64.
    return [int(np.count_nonzero(of_row == bucket)) for bucket in range(buckets)]
