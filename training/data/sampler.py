"""Which row of the data every sample of a run is: for any step, any process, without a history."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np

from ..errors import TrainingError
from .randomness import BALANCE, counted

LEFT_OUT = -1  # bucket of a row that is in no batch


class BucketBatchSampler:
    """Global batches of rows, epoch after epoch without end; a batch holds one bucket only.

    Each epoch is a permutation that follows from (seed, epoch, bucket) alone. What does not fill
    a bucket's last batch is left out of that epoch (other rows in each), so no row is seen twice
    in one. Holds two int32 numbers a row.

    `bucket_of_row` (rows,) int16, or None for a single bucket; LEFT_OUT for rows that are in no
    batch. `batch` is the number of samples of all processes in one micro-step. Raises TrainingError
    if no bucket fills a batch.
    """

    def __init__(self, bucket_of_row: np.ndarray | None, rows: int, batch: int, seed: int) -> None:
        self.batch_size, self.seed = batch, seed
        self._grouped, counts = _grouped(bucket_of_row, rows)
        self._ends = np.cumsum(counts)
        self._batches = counts // batch  # of each bucket
        self.steps_per_epoch = int(self._batches.sum())
        if not self.steps_per_epoch:
            raise TrainingError(
                f"The data has {len(self._grouped)} rows to train on, and no bucket fills a batch: "
                f"the fullest has {counts.max(initial=0)} images, a batch of all processes takes "
                f"{batch}. Give more images, a smaller train_batch_size (with more "
                "gradient_accumulation_steps), fewer processes, or no buckets."
            )
        self._epoch = -1
        self._permuted = np.empty(0, np.int32)
        self._batch_order = np.empty(0, np.int32)

    @property
    def fingerprint(self) -> str:
        """Changes with everything that the order depends on."""
        return _digest(("philox", self.batch_size, self.seed), self._ends, self._grouped)

    def batch(self, step: int) -> tuple[range, np.ndarray]:
        """Global micro-batch `step` of the run: numbers of its samples, and their rows (batch,)."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._begin(epoch)
        start = int(self._batch_order[place]) * self.batch_size
        rows = self._permuted[start : start + self.batch_size]
        return range(step * self.batch_size, (step + 1) * self.batch_size), rows

    def _begin(self, epoch: int) -> None:
        self._permuted = np.empty(self.steps_per_epoch * self.batch_size, np.int32)
        filled = 0
        for bucket, (end, batches) in enumerate(zip(self._ends, self._batches, strict=True)):
            rows = self._grouped[self._ends[bucket - 1] if bucket else 0 : end].copy()
            counted(self.seed, epoch, bucket).shuffle(rows)
            used = int(batches) * self.batch_size
            self._permuted[filled : filled + used] = rows[:used]
            filled += used
        self._batch_order = np.arange(self.steps_per_epoch, dtype=np.int32)
        counted(self.seed, epoch, len(self._ends)).shuffle(self._batch_order)
        self._epoch = epoch


class BalancedBatchSampler:
    """Global batches in which all values of a column are equally frequent in expectation.

    Each sample's row is drawn, with replacement, with the probability 1 / (values · rows of its
    value): a batch draws its bucket by the sum of these over the bucket's rows, and its rows
    within. A batch follows from (seed, its number) alone. Holds 16 bytes a row.

    `bucket_of_row` and `batch`: as `BucketBatchSampler`'s; `value_of_row` (rows,) int32. Raises
    TrainingError if there is no row.
    """

    def __init__(
        self, bucket_of_row: np.ndarray | None, value_of_row: np.ndarray, batch: int, seed: int
    ) -> None:
        self.batch_size, self.seed = batch, seed
        self._grouped, counts = _grouped(bucket_of_row, len(value_of_row))
        if not len(self._grouped):
            raise TrainingError("The data has no rows to train on. Give more images.")
        self._ends = np.cumsum(counts)
        self._values = value_of_row[self._grouped]
        self._until = np.cumsum(1 / np.bincount(self._values)[self._values])

    @property
    def fingerprint(self) -> str:
        """Changes with everything that the order depends on."""
        about = "balanced", self.batch_size, self.seed
        return _digest(about, self._ends, self._grouped, self._values)

    def batch(self, step: int) -> tuple[range, np.ndarray]:
        """Global micro-batch `step` of the run: numbers of its samples, and their rows (batch,)."""
        bucket, *places = counted(self.seed, step, BALANCE).random_sample(1 + self.batch_size)
        (one,) = self._drawn(np.array([bucket]), 0, len(self._grouped))
        number = int(self._ends.searchsorted(one, side="right"))
        first, end = int(self._ends[number - 1]) if number else 0, int(self._ends[number])
        rows = self._grouped[self._drawn(np.array(places), first, end)]
        return range(step * self.batch_size, (step + 1) * self.batch_size), rows

    def _drawn(self, uniform: np.ndarray, first: int, end: int) -> np.ndarray:
        """Places from `first` up to `end` that numbers in [0, 1) stand for."""
        low, high = self._until[first - 1] if first else 0.0, self._until[end - 1]
        places = self._until.searchsorted(low + uniform * (high - low), side="right")
        return places.clip(first, end - 1)  # a sum may be rounded up


BatchOrder = BucketBatchSampler | BalancedBatchSampler


class RankBatchSampler:
    """This process's part of every global batch from `first_step` on, without end.

    A `batch_sampler` for torch's DataLoader: lists of (number, row). Process `rank` of `world`
    takes places [rank·B/world, (rank + 1)·B/world) of a batch of B, so that the processes' parts
    side by side are what one process alone would see.
    """

    def __init__(
        self, order: BatchOrder, rank: int = 0, world: int = 1, first_step: int = 0
    ) -> None:
        if order.batch_size % world:
            raise ValueError(
                f"A global batch of {order.batch_size} cannot be split over {world} processes."
            )
        self.order, self.first_step = order, first_step
        share = order.batch_size // world
        self._part = slice(rank * share, (rank + 1) * share)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        step = self.first_step
        while True:
            numbers, rows = self.order.batch(step)
            yield list(zip(numbers[self._part], rows[self._part].tolist(), strict=True))
            step += 1


def _digest(about: tuple[str | int, ...], ends: np.ndarray, *of_row: np.ndarray) -> str:
    digest = hashlib.blake2b(repr(about).encode(), digest_size=16)
    digest.update(ends.astype("<i8").tobytes())
    for numbers in of_row:
        digest.update(numbers.astype("<i4").tobytes())
    return digest.hexdigest()


def _grouped(bucket_of_row: np.ndarray | None, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows bucket by bucket, and how many each has. Without a temporary of int64 for all rows."""
    if bucket_of_row is None:
        return np.arange(count, dtype=np.int32), np.array([count])
    if len(bucket_of_row) != count:
        raise ValueError(f"{len(bucket_of_row)} buckets were given for {count} rows.")
    rows = np.empty(count, np.int32)
    counts = np.zeros(int(bucket_of_row.max(initial=-1)) + 1, np.int64)
    filled = 0
    for bucket in range(len(counts)):
        found = np.flatnonzero(bucket_of_row == bucket)
        counts[bucket] = len(found)
        rows[filled : filled + len(found)] = found
        filled += len(found)
    return rows[:filled], counts
