"""Rows of a cache: what the frozen encoders gave, so that no image is opened again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file
from torch.utils.data import Dataset

from ..data.buckets import LATENT_STEP, Buckets
from ..data.columns import Column
from ..data.randomness import NoiseSettings, sample_caption, sample_noise
from ..errors import TrainingError
from ..loss import DroppedConditions
from .format import (
    DROPPED,
    TEXTS,
    Manifest,
    open_tensors,
    read_columns,
    read_manifest,
    shard_path,
)

Example = dict[str, Any]


class CachedDataset(Dataset[Example]):
    """Examples of a cache by (number, row), like `RawDataset`'s after the encoders.

    `mean` and `log_variance` (4, h, w), `states` (77, D), `pooled` (P,) for SDXL, `features` of
    `kind`, all as they were stored; `time_ids` (6,), `draws`, `weight` 1, `broken` empty. Rows are
    those whose images could be read, in the source's order; `buckets` has their sizes.

    A row's file is opened for that row alone: its mapped pages go with it, and a file cut short is
    refused. Besides two bytes a row (with buckets) nothing grows with the number of rows.

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
        self.manifest = _checked(self.folder, kind, expected or {}, names or {})
        self._draw_settings = draw_settings
        counts, buckets = np.zeros(self.manifest.shards, np.int64), []
        self.broken: list[str] = []
        for shard in range(self.manifest.shards):
            with self._opened(shard) as (file, about):
                counts[shard] = file.get_slice("row").get_shape()[0]
                self.broken += about["broken"]
                if len(self.manifest.sizes) > 1:
                    buckets.append(file.get_tensor("bucket").numpy())
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
        with self._opened(shard) as (file, _):
            example: Example = {
                name: file.get_slice(f"{name}.{height}x{width}")[place_in_bucket]
                for name in ("mean", "log_variance")
            }
            present = file.keys()
            text = place
            if "captions" in present:
                captions = file.get_tensor("captions")
                count = int(captions[place])
                text = int(captions[:place].sum())
                text += sample_caption(self._draw_settings.seed, number, count)
            for name, at in (*((name, text) for name in TEXTS), ("time_ids", place)):
                if name in present:
                    example[name] = file.get_slice(name)[at]
            example["features"] = file.get_slice(self.kind)[place]
        draws = sample_noise(self._draw_settings, number, (height, width))
        return example | {"draws": draws, "weight": 1.0, "broken": ""}

    def column(self, name: str) -> Column:
        """Return a column of these rows. Raises TrainingError if the cache does not hold it."""
        columns = read_columns(self.folder)
        if name not in columns:
            raise TrainingError(
                f"The cache '{self.folder}' does not hold the column '{name}' (it holds "
                f"{', '.join(columns) or 'none'}). Run the training/cache.py command that made it "
                "again, with --validation_split_column or --balance_column as here: that adds the "
                "column and encodes nothing anew."
            )
        rows = []
        for shard in range(self.manifest.shards):
            with self._opened(shard) as (file, _):
                rows.append(file.get_tensor("row").numpy())
        return replace(columns[name], of_row=columns[name].of_row[np.concatenate(rows)])

    def dropped(self) -> DroppedConditions:
        """Return what stands in for dropped conditions, as the encoders gave it."""
        found = load_file(self.folder / DROPPED)
        return DroppedConditions(found[self.kind], found["states"], found.get("pooled"))

    def _place(self, first: int, end: int, row: int) -> tuple[int, int]:
        """Where in its shard a row lies, among all and among those of its bucket."""
        if self.buckets.of_row is None:
            return row - first, row - first
        buckets = self.buckets.of_row[first:end]
        mine = buckets[row - first]
        in_bucket = int(np.count_nonzero(buckets[: row - first] == mine))
        return int(np.count_nonzero(buckets < mine)) + in_bucket, in_bucket

    @contextmanager
    def _opened(self, shard: int) -> Iterator[tuple[Any, dict[str, Any]]]:
        path = shard_path(self.folder, shard)
        try:
            with open_tensors(path) as opened:
                yield opened
        except OSError as error:
            raise TrainingError(
                f"'{path}' cannot be read: {error}. Run the training/cache.py command that made "
                "the cache again: it writes what is missing."
            ) from error


def _checked(
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
