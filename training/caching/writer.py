"""From rows to shards: the same bytes, however many processes write them."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from torch import Tensor
from tqdm import tqdm

from ..checkpoints import make_writable
from ..data.dataset import EveryCaption, loader
from ..errors import TrainingError
from ..models.frozen import FrozenEncoders
from .format import (
    DROPPED,
    MANIFEST,
    SEVERAL_CAPTIONS,
    TEXTS,
    Manifest,
    is_whole,
    read_manifest,
    shard_path,
    write_manifest,
    write_tensors,
)

logger = logging.getLogger(__name__)


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Make `folder` and keep others from it. Raises TrainingError if it cannot be written to."""
    make_writable(folder)
    try:
        lock = FileLock(folder / ".lock").acquire(timeout=0)
    except Timeout as error:
        raise TrainingError(
            f"Another cache.py is writing to '{folder}'. Wait for it, or give another "
            "--output_dir. (Several processes of one cache are started by one `accelerate launch`.)"
        ) from error
    with lock:
        yield


def begin(folder: Path, manifest: Manifest, encoders: FrozenEncoders) -> None:
    """Say whose cache this is. Raises TrainingError if the folder holds something else."""
    found = read_manifest(folder)
    if found is None and any(folder.glob("shard-*.safetensors")):
        raise TrainingError(
            f"'{folder}' holds shards without a {MANIFEST}, so nobody knows whose they are. Delete "
            "the folder, or choose another --output_dir."
        )
    if found is not None and (differing := found.differing(manifest)):
        raise TrainingError(
            f"'{folder}' holds the cache of another run. It differs in: {'; '.join(differing)}. "
            "Choose another --output_dir, or delete that folder."
        )
    for leftover in (*folder.glob("*.tmp"), *folder.glob(".tmp*")):  # safetensors' own
        leftover.unlink()
    if not is_whole(folder / DROPPED):
        _write_dropped(folder, manifest, encoders)
    if found is None:
        write_manifest(folder, manifest)


def _write_dropped(folder: Path, manifest: Manifest, encoders: FrozenEncoders) -> None:
    dtype = getattr(torch, manifest.dtype)
    dropped = {kind: encoders.dropped(kind) for kind in manifest.features}
    tensors: dict[str, Tensor | None] = {kind: one.features for kind, one in dropped.items()}
    text = next(iter(dropped.values()))
    tensors |= {"states": text.states, "pooled": text.pooled}
    kept = {name: x.to("cpu", dtype) for name, x in tensors.items() if x is not None}
    write_tensors(folder / DROPPED, kept, {})


def missing_shards(folder: Path, manifest: Manifest) -> list[int]:
    """Numbers of the shards that are still to be written."""
    return [s for s in range(manifest.shards) if not is_whole(shard_path(folder, s))]


def write_shards(
    dataset: EveryCaption,
    encoders: FrozenEncoders,
    folder: Path,
    manifest: Manifest,
    shards: Sequence[int],
    batch_size: int,
    workers: int,
    bar: tqdm,
) -> None:
    """Encode and write the shards of these numbers, from images that `workers` processes read.

    A batch never reaches over a shard's end, so a shard's bytes are the same whichever process
    writes it. Raises TrainingError if the disk is full, or an encoder gives what is not finite.
    """
    if not shards:
        return
    buckets = dataset.buckets

    def batches(shard: int) -> Iterator[np.ndarray]:
        return buckets.batches(np.array(manifest.rows_of(shard)), batch_size)

    numbered = ([(row, row) for row in x.tolist()] for shard in shards for x in batches(shard))
    loaded = iter(loader(dataset, numbered, workers))
    for shard in shards:
        content = _Shard(manifest)
        for rows in batches(shard):
            batch = next(loaded)
            content.add(rows, batch, encoders.outputs(batch, manifest.features))
            bar.update(len(rows))
        path = shard_path(folder, shard)
        write_tensors(path, content.tensors(buckets.of_row), {"broken": content.broken})
        if shard == shards[0]:
            _look_ahead(folder, path.stat().st_size, len(shards) - 1)


@dataclass
class _Shard:
    """What has been encoded of one shard, in the order of its batches."""

    manifest: Manifest
    parts: dict[str, list[Tensor]] = field(default_factory=dict)
    rows: list[np.ndarray] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)

    def add(self, rows: np.ndarray, batch: dict[str, Any], outputs: dict[str, Tensor]) -> None:
        sound = batch["weight"] > 0
        self.broken += batch["broken"]
        if not sound.any():
            return
        rows = rows[sound.numpy()]
        self.rows.append(rows)
        self._keep("time_ids", batch["time_ids"][sound])
        dtype = getattr(torch, self.manifest.dtype)
        captions = batch["captions"]
        if self.manifest.format == SEVERAL_CAPTIONS:
            self._keep("captions", captions[sound])
        for name, output in outputs.items():
            count = captions if name in TEXTS else torch.ones_like(captions)  # of each row
            kept = output.to("cpu", dtype)[sound.repeat_interleave(count)]
            self._check_finite(name, kept, rows.repeat(count[sound].numpy()))
            if name in ("mean", "log_variance"):
                name += ".{}x{}".format(*kept.shape[2:])
            self._keep(name, kept)

    def _keep(self, name: str, tensor: Tensor) -> None:
        self.parts.setdefault(name, []).append(tensor.contiguous())

    def _check_finite(self, name: str, tensor: Tensor, rows: np.ndarray) -> None:
        finite = tensor.isfinite().flatten(1).all(dim=1)
        if not finite.all():
            row = rows[int(finite.int().argmin())]
            raise TrainingError(
                f"{name.replace('_', ' ')} of row {row} became NaN or infinite: it exceeds the "
                f"numbers of the encoders' dtype, or those of the cache's, {self.manifest.dtype}. "
                "Give --dtype float32 or bfloat16; if that is not it, --cache_dtype bfloat16."
            )

    def tensors(self, of_row: np.ndarray | None) -> dict[str, Tensor]:
        rows = np.sort(np.concatenate([*self.rows, np.empty(0, np.int64)]))
        buckets = np.zeros(len(rows), np.int16) if of_row is None else of_row[rows]
        index = {"row": torch.from_numpy(rows), "bucket": torch.from_numpy(buckets)}
        return index | {name: torch.cat(parts) for name, parts in self.parts.items()}


def _look_ahead(folder: Path, shard_bytes: int, more: int) -> None:
    needed, free = shard_bytes * more, shutil.disk_usage(folder).free
    logger.info("this process's %d further shards take about %.1f GiB", more, needed / 2**30)
    if needed > free:
        logger.warning(
            "only %.1f GiB are free in '%s': this will not suffice", free / 2**30, folder
        )
