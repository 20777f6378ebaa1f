"""The order of rows: no repeats, no history, the same for any number of processes."""

from __future__ import annotations

import tracemalloc
from itertools import islice

import numpy as np
import pytest

from training.data.sampler import BucketBatchSampler, RankBatchSampler
from training.errors import TrainingError

BUCKETS = np.array([0] * 11 + [1] * 7 + [2] * 2 + [3] * 4, dtype=np.int16)


def bucketed(batch=3, buckets=BUCKETS, seed=5):
    return BucketBatchSampler(buckets, len(BUCKETS), batch, seed)


def epoch_of(order, epoch):
    steps = order.steps_per_epoch
    return [order.batch(step)[1] for step in range(epoch * steps, (epoch + 1) * steps)]


def test_an_epoch_is_a_permutation():
    order = BucketBatchSampler(None, rows=40, batch=4, seed=1)
    assert order.steps_per_epoch == 10
    epochs = [np.concatenate(epoch_of(order, e)) for e in range(3)]
    for rows in epochs:
        assert sorted(rows) == list(range(40))
        assert list(rows) != list(range(40))
    assert not np.array_equal(epochs[0], epochs[1])
    other = BucketBatchSampler(None, rows=40, batch=4, seed=2)
    assert not np.array_equal(epochs[0][:4], other.batch(0)[1])


def test_what_fills_no_batch_is_left_out_of_one_epoch_only():
    order = BucketBatchSampler(None, rows=10, batch=4, seed=0)
    assert order.steps_per_epoch == 2
    seen = [set(np.concatenate(epoch_of(order, e))) for e in range(20)]
    assert all(len(rows) == 8 for rows in seen)
    assert set.union(*seen) == set(range(10))


def test_a_batch_holds_one_bucket():
    order = bucketed()
    assert order.steps_per_epoch == 3 + 2 + 0 + 1
    mixed = []
    for epoch in range(4):
        batches = epoch_of(order, epoch)
        rows = np.concatenate(batches)
        assert len(set(rows)) == len(rows)
        assert all(len(set(BUCKETS[rows])) == 1 for rows in batches)
        mixed.append([int(BUCKETS[rows[0]]) for rows in batches])
    assert all(sorted(one) == [0, 0, 0, 1, 1, 3] for one in mixed)
    assert len({tuple(one) for one in mixed}) > 1  # the buckets' batches are shuffled


def test_any_step_without_those_before():
    straight = list(islice(RankBatchSampler(bucketed()), 20))
    assert [number for batch in straight for number, _ in batch] == list(range(60))
    order = bucketed()
    for step in (18, 0, 7, 6, 13, 1, 16):
        resumed = RankBatchSampler(order, first_step=step)
        assert list(islice(resumed, 20 - step)) == straight[step:]


@pytest.mark.parametrize("world", [2, 3, 6])
def test_processes_side_by_side_are_one_process(world):
    def run(rank, world):
        return islice(RankBatchSampler(bucketed(batch=6), rank, world), 10)

    parts = zip(*(run(rank, world) for rank in range(world)), strict=True)
    joined = [[sample for part in batch for sample in part] for batch in parts]
    assert joined == list(run(0, 1))
    assert all(type(x) is int for batch in joined for sample in batch for x in sample)


def test_the_order_of_a_seed_never_changes():
    # Runs of earlier versions are resumed with it.
    order = BucketBatchSampler(np.array([0, 1] * 6), rows=12, batch=2, seed=3)
    found = [order.batch(step)[1].tolist() for step in (0, 1, 6)]
    assert found == [[4, 10], [1, 5], [9, 1]]


def test_fingerprint():
    changed = BUCKETS.copy()
    changed[0] = 1
    swapped = BUCKETS[::-1].copy()
    swapped[[0, -1, 3, -4]] = swapped[[-1, 0, -4, 3]]
    assert np.array_equal(np.bincount(BUCKETS), np.bincount(swapped))
    others = [{"buckets": changed}, {"buckets": swapped}, {"buckets": None}]
    others += [{"batch": 2}, {"seed": 6}]
    plain = bucketed().fingerprint
    assert len({plain, *(bucketed(**other).fingerprint for other in others)}) == 6
    assert bucketed(buckets=BUCKETS.copy()).fingerprint == plain


@pytest.mark.parametrize("buckets", [1, 8])
def test_memory_of_a_million_rows(buckets):
    rows = 1_000_000
    of_row = (np.arange(rows) % buckets).astype(np.int16) if buckets > 1 else None
    tracemalloc.start()
    order = BucketBatchSampler(of_row, rows, batch=64, seed=0)
    for step in (0, order.steps_per_epoch, 0):
        order.batch(step)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 9 * rows  # bytes: two int32 numbers a row, and the batches' order


@pytest.mark.parametrize(
    "buckets, rows, said",
    [
        (None, 7, "7 rows.*takes 8.*smaller train_batch_size"),
        (None, 0, "0 rows.*more images"),
        (np.arange(9) % 2, 9, "no bucket fills a batch.*fullest has 5 images.*no buckets"),
    ],
)
def test_too_few_rows(buckets, rows, said):
    with pytest.raises(TrainingError, match=said):
        BucketBatchSampler(buckets, rows, batch=8, seed=0)


def test_batches_that_cannot_be_split():
    with pytest.raises(ValueError, match="9 cannot be split over 2"):
        RankBatchSampler(BucketBatchSampler(None, 20, batch=9, seed=0), 0, 2)
    with pytest.raises(ValueError, match="2 buckets were given for 3 rows"):
        BucketBatchSampler(np.zeros(2, np.int16), 3, 1, 0)
