"""Which samples of WebDataset shards each reader gives, in which order."""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..errors import TrainingError
from .buckets import Buckets, nearest
from .image import BrokenPictureError, upright_size
from .records import Record
from .shards import ShardReader

BUFFER = 128  # compressed samples that each lane shuffles: 1,024 in a process


class Unit(NamedTuple):
    """Every `parts`-th sample of a shard from `part` on; the whole shard if parts is 1."""

    shard: str
    part: int
    parts: int


@dataclass(frozen=True)
class Split:
    """Which samples each of `lanes` reads in an epoch: shards, or parts of shards if these are too
    few. In an epoch each sample belongs to one lane."""

    shards: tuple[str, ...]
    lanes: int
    seed: int

    @property
    def parts(self) -> int:
        return -(-self.lanes // len(self.shards))

    def units(self, epoch: int, lane: int) -> list[Unit]:
        """What a lane reads in an epoch, in this order; dealt anew in each."""
        units = [Unit(s, part, self.parts) for s in self.shards for part in range(self.parts)]
        random.Random(f"{self.seed} {epoch}").shuffle(units)
        return units[lane :: self.lanes]


class Counts:
    """How many samples of each bucket a unit holds, learnt while it is read and kept in a
    folder: with them a resumed run passes over whole epochs without reading."""

    def __init__(self, folder: Path | None, buckets: Buckets) -> None:
        self._folder, self._sizes = folder, buckets.sizes

    def get(self, unit: Unit) -> np.ndarray | None:
        with suppress(OSError, ValueError, TypeError):
            return np.array(json.loads(self._path(unit).read_text()), dtype=np.int64)
        return None

    def put(self, unit: Unit, counts: np.ndarray) -> None:
        with suppress(OSError, TypeError):  # only time is lost without it
            path = self._path(unit)
            path.parent.mkdir(exist_ok=True)
            temporary = path.with_suffix(f".{os.getpid()}.tmp")
            temporary.write_text(json.dumps(counts.tolist()))
            os.replace(temporary, path)

    def _path(self, unit: Unit) -> Path:
        state: tuple[int, ...] = ()
        with suppress(OSError):  # a URL
            stat = os.stat(unit.shard)
            state = stat.st_size, stat.st_mtime_ns
        key = repr((tuple(unit), state, self._sizes))
        name = hashlib.blake2b(key.encode(), digest_size=16).hexdigest()
        return self._folder / f"{name}.count.json"  # type: ignore[operator]  # TypeError: no folder


Batch = tuple[list[Record], tuple[int, int]]


@dataclass(frozen=True, eq=False)
class Lane:
    """One reader's batches of `batch` records and their `(height, width)`, epoch after epoch.
    What fills no batch is left out of its epoch."""

    number: int
    split: Split
    reader: ShardReader
    buckets: Buckets
    batch: int
    counts: Counts

    def batches(self, skip: int) -> Iterator[Batch]:
        """From the batch after the first `skip` ones; what is skipped is read, not decoded.

        Raises TrainingError if every shard was tried and nothing to train on came of them.
        """
        tried: set[Unit] = set()
        for epoch in count():
            units = self.split.units(epoch, self.number)
            tried.update(units)
            known = self._known_batches(units)
            if known and known <= skip:
                skip -= known
                tried.clear()
                continue
            for records, size in self._epoch(epoch, units):
                if any(not record.broken for record in records):
                    tried.clear()
                if skip:
                    skip -= 1
                else:
                    yield records, size
            if len(tried) == len(self.split.shards) * self.split.parts:
                raise TrainingError(
                    f"No batch of {self.batch} readable samples came of {len(self.split.shards)} "
                    f"shards, read by {self.split.lanes} readers: '{self.split.shards[0]}', … "
                    "Look for broken shards in the log above. If there are none, the shards hold "
                    f"too few samples, and {self.batch * self.split.lanes} would be enough if they "
                    "were of one shape: give more, or a smaller batch_size."
                )

    def _known_batches(self, units: Sequence[Unit]) -> int:
        """How many batches an epoch of these units gives; 0 if that is not known."""
        found = [self.counts.get(unit) for unit in units]
        known = [counts for counts in found if counts is not None]
        if len(known) < len(units):
            return 0
        return int((np.sum(known, axis=0) // self.batch).sum())

    def _epoch(self, epoch: int, units: Sequence[Unit]) -> Iterator[Batch]:
        chance = random.Random(f"{self.split.seed} {epoch} {self.number}")
        waiting: dict[int, list[Record]] = {}
        for record, bucket in _shuffled(self._read(units), chance):
            waiting.setdefault(bucket, []).append(record)
            if len(waiting[bucket]) == self.batch:
                yield waiting.pop(bucket), self.buckets.sizes[bucket]

    def _read(self, units: Sequence[Unit]) -> Iterator[tuple[Record, int]]:
        for unit in units:
            counts, whole = np.zeros(len(self.buckets.sizes), np.int64), True
            for place, record in enumerate(self.reader.records(unit.shard)):
                whole = whole and record.name != unit.shard
                if place % unit.parts == unit.part:
                    bucket = self._bucket(record)
                    counts[bucket] += 1
                    yield record, bucket
            if whole:
                self.counts.put(unit, counts)

    def _bucket(self, record: Record) -> int:
        if len(self.buckets.sizes) == 1 or record.broken:
            return 0
        try:
            size = upright_size(record.image)
        except BrokenPictureError:
            return 0
        return int(nearest(self.buckets.sizes, np.array([size]))[0])


def _shuffled(items: Iterator[Any], chance: random.Random) -> Iterator[Any]:
    buffer: list[Any] = []
    for item in items:
        if len(buffer) < BUFFER:
            buffer.append(item)
        else:
            place = chance.randrange(BUFFER)
            buffer[place], item = item, buffer[place]
            yield item
    chance.shuffle(buffer)
    yield from buffer
