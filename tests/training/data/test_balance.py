"""Rows are drawn so that all values of a column are equally frequent, or held out altogether."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest

from training.data.buckets import Buckets, square
from training.data.sampler import LEFT_OUT, BalancedBatchSampler, RankBatchSampler
from training.errors import TrainingError

HANDS = np.array([0] * 90 + [1] * 9 + [2], dtype=np.int32)
BUCKETS = (np.arange(100) % 3).astype(np.int16)
SIZES = ((64, 64), (64, 128), (128, 64))


def balanced(batch=4, seed=5, hands=HANDS, buckets=BUCKETS):
    return BalancedBatchSampler(buckets, hands, batch, seed)


@pytest.mark.parametrize("buckets", [None, BUCKETS])
def test_values_are_equally_frequent_and_so_are_a_values_rows(buckets):
    order, steps = balanced(buckets=buckets), 3000
    drawn = np.stack([order.batch(step)[1] for step in range(steps)])
    samples = drawn.size
    counts = np.bincount(drawn.ravel(), minlength=100)
    shares = np.bincount(HANDS[drawn.ravel()]) / samples
    # A batch is of one bucket: its samples are not independent, but batches are.
    assert np.abs(shares - 1 / 3).max() < 5 * (2 / 9 / steps) ** 0.5
    expected = samples / 3 / np.bincount(HANDS)[HANDS]
    assert (np.abs(counts - expected) < 6 * (4 * expected) ** 0.5).all()
    if buckets is not None:
        assert all(len({*BUCKETS[rows]}) == 1 for rows in drawn)


def test_any_step_without_those_before():
    straight = list(islice(RankBatchSampler(balanced()), 20))
    assert [number for batch in straight for number, _ in batch] == list(range(80))
    for step in (0, 7, 19):
        resumed = RankBatchSampler(balanced(), first_step=step)
        assert list(islice(resumed, 20 - step)) == straight[step:]
    assert list(islice(RankBatchSampler(balanced(seed=6)), 20)) != straight


def test_processes_side_by_side_are_one_process():
    parts = (islice(RankBatchSampler(balanced(), rank, 2), 10) for rank in range(2))
    joined = [[*first, *second] for first, second in zip(*parts, strict=True)]
    assert joined == list(islice(RankBatchSampler(balanced()), 10))


def test_the_order_of_a_seed_never_changes():
    # Runs of earlier versions are resumed with it.
    found = [balanced().batch(step)[1].tolist() for step in (0, 1, 6)]
    assert found == [[98, 5, 32, 29], [99, 99, 99, 96], [99, 30, 48, 99]]


def test_fingerprint():
    other_hands = HANDS[::-1].copy()
    other_buckets = BUCKETS[::-1].copy()
    others = [{"hands": other_hands}, {"buckets": other_buckets}, {"batch": 2}, {"seed": 6}]
    found = {balanced(**other).fingerprint for other in [{}, *others, {"buckets": None}]}
    assert len(found) == 6
    assert balanced(hands=HANDS.copy()).fingerprint == balanced().fingerprint


@pytest.mark.parametrize("balance", [None, HANDS])
@pytest.mark.parametrize("buckets", [Buckets(SIZES, BUCKETS), square(64)])
def test_held_out_rows_are_in_no_batch(balance, buckets):
    held_out = np.arange(100) % 4 == 0
    order = buckets.sampler(100, 2, 5, held_out, balance)
    drawn = np.concatenate([order.batch(step)[1] for step in range(1500)])
    assert {*drawn.tolist()} == {*np.flatnonzero(~held_out).tolist()}
    assert order.fingerprint != buckets.sampler(100, 2, 5, None, balance).fingerprint
    if balance is not None:  # what is held out counts for nothing
        left = HANDS[~held_out]
        shares = np.bincount(HANDS[drawn]) / len(drawn)
        assert len({*left}) == 3
        assert np.abs(shares - 1 / 3).max() < 0.07


def test_nothing_left_to_train_on():
    with pytest.raises(TrainingError, match="no rows to train on"):
        balanced(buckets=np.full(100, LEFT_OUT, np.int16))
    with pytest.raises(TrainingError, match=r"3 rows to train on.*takes 4"):
        square(64).sampler(100, 4, 5, np.arange(100) > 2)


def test_small_values_and_buckets_fill_batches():
    order = balanced(batch=16, buckets=np.array([0] * 98 + [2, 4], np.int16))
    found = {tuple({*order.batch(step)[1].tolist()}) for step in range(200)}
    assert {(98,), (99,)} <= found
