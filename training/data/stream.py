"""Endless batches out of WebDataset shards, the same for any number of workers."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info

from .buckets import Buckets
from .dataset import Examples, collate
from .lanes import BUFFER, Batch, Counts, Lane, Split
from .shards import ShardReader

# Of each process: batch k comes from lane k % LANES, whatever worker serves that lane. So the
# number of workers, a divisor of this, changes nothing.
LANES = 8

logger = logging.getLogger(__name__)


class StreamDataset(IterableDataset[dict[str, Any]]):
    """This process's collated batches from `first_step` on, without end.

    `batch` is the global one; `buckets.of_row` is not used: the pictures' headers decide.
    `folder` keeps what was learnt about the shards for resuming. The order follows from seed,
    shards, batch and `world`. Raises TrainingError if the shards cannot be read or hold no
    captions.
    """

    def __init__(
        self,
        shards: Sequence[str],
        reader: ShardReader,
        examples: Examples,
        buckets: Buckets,
        *,
        batch: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        first_step: int = 0,
        folder: Path | None = None,
    ) -> None:
        if batch % world:
            raise ValueError(f"A global batch of {batch} cannot be split over {world} processes.")
        reader.check(shards)
        self._reader, self._examples, self._buckets = reader, examples, buckets
        self._batch, self._rank, self._share = batch, rank, batch // world
        self._first_step = first_step
        self._split = Split(tuple(shards), world * LANES, seed)
        self._counts = Counts(folder, buckets)
        if self._split.parts > 1 and not rank:
            logger.warning(
                "%d shards for %d readers (%d processes): each shard is read %d times an epoch, "
                "each time for other samples; more and smaller shards would be faster",
                *(len(shards), self._split.lanes, world, self._split.parts),
            )

    @property
    def fingerprint(self) -> str:
        """Changes with everything that the order depends on but the shards' contents."""
        names = [os.path.basename(shard) for shard in self._split.shards]
        state = names, self._split.lanes, self._split.seed, self._batch, self._buckets.sizes
        key = repr((state, self._reader, BUFFER)).encode()
        return hashlib.blake2b(key, digest_size=16).hexdigest()

    @staticmethod
    def max_workers(asked: int) -> int:
        """The largest number of workers up to `asked` among which the lanes can be shared."""
        return max((n for n in range(1, asked + 1) if LANES % n == 0), default=0)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        if LANES % workers:
            raise ValueError(f"{workers} workers cannot share {LANES} lanes; see max_workers.")
        lanes: dict[int, Iterator[Batch]] = {}
        for step in count(self._first_step + worker, workers):
            lane = step % LANES
            if lane not in lanes:
                lanes[lane] = self._lane(lane)
            records, size = next(lanes[lane])
            first = step * self._batch + self._rank * self._share
            yield collate([self._examples(r, first + i, size) for i, r in enumerate(records)])

    def _lane(self, lane: int) -> Iterator[Batch]:
        number = self._rank * LANES + lane
        lanes = Lane(number, self._split, self._reader, self._buckets, self._share, self._counts)
        return lanes.batches(skip=len(range(lane, self._first_step, LANES)))
