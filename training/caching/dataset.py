"""Rows of a cache: what the frozen encoders gave, so that no picture is opened again."""

from __future__ import annotations

import math
from collections.abc import Mapping
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import Dataset

from ..data.buckets import LATENT_STEP, Buckets
from ..data.randomness import NoiseSettings, sample_noise
from ..errors import TrainingError
from ..loss import Dropped
from .format import DROPPED, Header, Manifest, Where, read_header, read_manifest, shard_path

HEADERS = 256  # shards whose headers are kept, some KB each

Example = dict[str, Any]


class CachedDataset(Dataset[Example]):
    """Examples of a cache by (number, row), like `RawDataset`'s after the encoders.

    `mean` and `log_variance` (4, h, w), `states` (77, D), `pooled` (P,) for SDXL, `features` of
    `kind`, all as they were stored; `time_ids` (6,), `draws`, `weight` 1, `broken` empty. Rows are
    those whose pictures could be read, in the source's order; `buckets` has their sizes.

    Rows are read with positioned reads, not mapped: pages of a map would count as this process's
    memory, and a file cut short would end it. Besides two bytes a row (with buckets) nothing grows
    with the number of rows.

    `expected`: fingerprints of the run's parts (`FrozenEncoders.fingerprints`, `data`); `names`:
    where those came from, for the message.
    Raises TrainingError for a folder without a cache, one of other parts or without `kind`, or one
    that is not complete.
    """

    def __init__(
        self,
        folder: str | Path,
        kind: str,
        draw_settings: NoiseSettings,
        expected: Mapping[str, str] | None = None,
        names: Mapping[str, str] | None = None,
    ) -> None:
        self.folder, self.kind = Path(folder), kind
        self.manifest = _opened(self.folder, kind, expected or {}, names or {})
        self._draw_settings = draw_settings
        self._headers: dict[int, Header] = {}
        counts, buckets = np.zeros(self.manifest.shards, np.int64), []
        self.broken: list[str] = []
        for shard in range(self.manifest.shards):
            header = self._read_header(shard)
            counts[shard] = header.tensors["row"].shape[0]
            self.broken += header.about["broken"]
            if len(self.manifest.sizes) > 1:
                with shard_path(self.folder, shard).open("rb", buffering=0) as file:
                    buckets.append(_read(file, header.tensors["bucket"]).numpy())
        self._ends = counts.cumsum()
        if not len(self):
            raise TrainingError(
                f"The cache '{folder}' has no rows: none of its {self.manifest.rows} pictures "
                f"could be read ({self.broken[0]}). Correct the data and cache it anew."
            )
        of_row = np.concatenate(buckets) if buckets else None
        self.buckets = Buckets(self.manifest.sizes, of_row)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: tuple[int, int]) -> Example:
        number, row = index
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of a cache of {len(self)} rows")
        shard = int(self._ends.searchsorted(row, side="right"))
        first = int(self._ends[shard - 1]) if shard else 0
        place, place_in_bucket = self._place(first, int(self._ends[shard]), row)
        height, width = (side // LATENT_STEP for side in self.buckets.size_of(row))
        tensors = self._header(shard).tensors
        example: Example = {}
        try:
            with shard_path(self.folder, shard).open("rb", buffering=0) as file:
                for name in ("mean", "log_variance"):
                    where = tensors[f"{name}.{height}x{width}"]
                    example[name] = _read_row(file, where, place_in_bucket)
                for name in ("states", "pooled", "time_ids"):
                    if name in tensors:
                        example[name] = _read_row(file, tensors[name], place)
                example["features"] = _read_row(file, tensors[self.kind], place)
        except (OSError, EOFError) as error:
            raise self._unreadable(shard, error) from error
        draws = sample_noise(self._draw_settings, number, (height, width))
        return example | {"draws": draws, "weight": 1.0, "broken": ""}

    def dropped(self) -> Dropped:
        """What stands in for dropped conditions, as the encoders gave it."""
        found = load_file(self.folder / DROPPED)
        return Dropped(found[self.kind], found["states"], found.get("pooled"))

    @property
    def feature_dim(self) -> int:
        """Width of the features."""
        return self.dropped().features.shape[-1]

    def _place(self, first: int, end: int, row: int) -> tuple[int, int]:
        """Where in its shard a row lies, among all and among those of its bucket."""
        if self.buckets.of_row is None:
            return row - first, row - first
        buckets = self.buckets.of_row[first:end]
        mine = buckets[row - first]
        in_bucket = int(np.count_nonzero(buckets[: row - first] == mine))
        return int(np.count_nonzero(buckets < mine)) + in_bucket, in_bucket

    def _header(self, shard: int) -> Header:
        header = self._headers.get(shard)
        if header is None:
            if len(self._headers) >= HEADERS:
                self._headers.clear()
            self._headers[shard] = header = self._read_header(shard)
        return header

    def _read_header(self, shard: int) -> Header:
        try:
            return read_header(shard_path(self.folder, shard))
        except (OSError, ValueError, KeyError) as error:
            raise self._unreadable(shard, error) from error

    def _unreadable(self, shard: int, error: Exception) -> TrainingError:
        return TrainingError(
            f"'{shard_path(self.folder, shard)}' cannot be read: {error}. Run the "
            "training/cache.py command that made the cache again: it writes what is missing."
        )


def _opened(
    folder: Path, kind: str, expected: Mapping[str, str], names: Mapping[str, str]
) -> Manifest:
    manifest = read_manifest(folder)
    if manifest is None:
        raise TrainingError(
            f"There is no cache in '{folder}' (no cache.json). Make one with training/cache.py, or "
            "correct the path."
        )
    other = [
        f"{part}: the cache's is {_told(manifest.names, manifest.parts, part)}, this run's is "
        f"{_told(names, expected, part)}"
        for part in expected
        if manifest.parts.get(part) != expected[part]
    ]
    if other:
        raise TrainingError(
            f"The cache '{folder}' was not made for this run. {'. '.join(other)}. Change the "
            "settings back, or make a cache for them with training/cache.py in another folder."
        )
    if kind not in manifest.features:
        raise TrainingError(
            f"The cache '{folder}' holds {', '.join(manifest.features)}, but this variant reads "
            f"{kind}. Make a cache with --features {kind}, or both, in another folder."
        )
    missing = [s for s in range(manifest.shards) if not shard_path(folder, s).exists()]
    if missing:
        raise TrainingError(
            f"The cache '{folder}' is not complete: {len(missing)} of {manifest.shards} shards "
            f"are missing, number {missing[0]} first. Run the training/cache.py command that began "
            "it again: it goes on where it stopped."
        )
    return manifest


def _told(names: Mapping[str, str], parts: Mapping[str, str], part: str) -> str:
    value = parts.get(part, "unknown")
    return f"'{names[part]}' ({value[:8]})" if part in names else f"'{value}'"


def _read_row(file: FileIO, where: Where, row: int) -> Tensor:
    shape = where.shape[1:]
    begin = where.begin + row * math.prod(shape) * where.dtype.itemsize
    return _read(file, Where(where.dtype, shape, begin))


def _read(file: FileIO, where: Where) -> Tensor:
    tensor = torch.empty(where.shape, dtype=where.dtype)
    if tensor.numel():
        buffer = tensor.flatten().view(torch.uint8).numpy().data
        file.seek(where.begin)
        if file.readinto(buffer) != buffer.nbytes:
            raise EOFError("it ends before its tensors do")
    return tensor
