"""Aspect-ratio buckets and the order of rows: who goes where, no repeats, no history, the same for
any number of processes."""

from __future__ import annotations

import logging
import tracemalloc
from itertools import islice

import numpy as np
import pytest
from PIL import Image

from tests.support.image_folders import encoded
from training.data import buckets
from training.data.buckets import Buckets, bucket_sizes, by_aspect, image_sizes, nearest, square
from training.data.sampler import BucketBatchSampler, RankBatchSampler
from training.data.sources import Record
from training.errors import TrainingError


class Pictures:
    """A source of encoded pictures that notes which are read."""

    def __init__(self, images, told=None, fingerprint="some"):
        self.images, self.told, self.fingerprint = images, told, fingerprint
        self.reads = []

    def __len__(self):
        return len(self.images)

    def __getitem__(self, row):
        self.reads.append(int(row))
        return Record(f"picture {row}", self.images[row], "text")

    def sizes(self):
        return np.array(self.told or np.zeros((len(self), 2)), np.int32)


def picture(height, width, kind="PNG", **options):
    return encoded(Image.new("L", (width, height)), kind, **options)


@pytest.mark.parametrize("size", [512, 768, 1024])
def test_the_sizes(size):
    found = bucket_sizes(size)
    assert found[0] == (size, size)
    assert len(set(found)) == len(found)
    assert {(w, h) for h, w in found} == set(found)
    for height, width in found:
        assert height % 64 == width % 64 == 0
        assert 0.85 * size**2 <= height * width <= size**2
        assert 0.5 <= height / width <= 2


def test_sizes_at_512_and_1024():
    assert bucket_sizes(512) == ((512, 512), (384, 640), (448, 576), (576, 448), (640, 384))
    # Those of SDXL's own training (arXiv 2307.01952, appendix I) that are not more than 2 : 1.
    assert {(704, 1408), (768, 1344), (832, 1216), (896, 1152)} <= set(bucket_sizes(1024))


@pytest.mark.parametrize("size", [0, -64, 511, 516])
def test_sizes_that_cannot_be(size):
    with pytest.raises(TrainingError, match=f"resolution is {size}; expected a multiple of 8"):
        square(size)
    with pytest.raises(TrainingError, match=f"resolution is {size}; expected a multiple of 64"):
        bucket_sizes(size)


def test_nearest_by_logarithm_of_the_aspect():
    sizes = bucket_sizes(1024)
    pictures = np.random.default_rng(0).integers(1, 3000, (2000, 2)).astype(np.int32)
    found = nearest(sizes, pictures)
    assert found.dtype == np.int16
    edges = np.log([h / w for h, w in sizes])
    distance = np.abs(np.log(pictures[:, :1] / pictures[:, 1:]) - edges)
    assert np.allclose(distance[np.arange(2000), found], distance.min(axis=1))
    assert nearest(sizes, 3 * np.array(sizes)).tolist() == [*range(len(sizes))]
    assert nearest(sizes, np.array([[0, 0], [0, 9], [9, 0]])).tolist() == [0, 0, 0]  # unknown


def test_headers_are_read_once(tmp_path, monkeypatch):
    monkeypatch.setattr(buckets, "BLOCK", 2)  # so that several threads read
    exif = Image.Exif()
    exif[0x0112] = 6
    images = [
        picture(40, 60),
        picture(60, 40),
        picture(50, 50),
        picture(40, 60, "JPEG", exif=exif),
        picture(400, 200)[:100],  # cut behind the header
    ]
    source = Pictures(images)
    expected = [[40, 60], [60, 40], [50, 50], [60, 40], [400, 200]]
    assert image_sizes(source, tmp_path).tolist() == expected
    assert sorted(source.reads) == [0, 1, 2, 3, 4]
    again = Pictures(images)
    found = by_aspect(again, 512, tmp_path)
    assert again.reads == []
    shapes = [(384, 640), (640, 384), (512, 512), (640, 384), (640, 384)]
    assert [found.size_of(row) for row in range(5)] == shapes
    other = Pictures(images, fingerprint="other")
    image_sizes(other, tmp_path)
    assert len(other.reads) == 5


def test_broken_pictures_go_to_the_square_and_are_tried_again(tmp_path):
    source = Pictures([b"broken", picture(40, 60), b""])
    assert by_aspect(source, 512, tmp_path).of_row.tolist() == [0, 1, 0]
    mended = Pictures([picture(60, 40), b"never read", b""])
    assert image_sizes(mended, tmp_path).tolist() == [[60, 40], [40, 60], [0, 0]]
    assert sorted(mended.reads) == [0, 2]


def test_sizes_that_the_data_tells_need_no_headers(tmp_path):
    whole = Pictures([b"", b""], told=[[40, 60], [60, 40]])
    assert by_aspect(whole, 512, tmp_path).of_row.tolist() == [1, 4]
    partly = Pictures([b"", picture(30, 30)], told=[[40, 60], [0, 0]])
    assert image_sizes(partly, tmp_path).tolist() == [[40, 60], [30, 30]]
    later = Pictures([b"", b""], told=[[0, 0], [20, 90]])  # wins over what was read
    assert image_sizes(later, tmp_path).tolist() == [[40, 60], [20, 90]]
    assert [source.reads for source in (whole, partly, later)] == [[], [1], []]


def test_an_error_in_a_thread_is_no_broken_picture(tmp_path, monkeypatch):
    def faulty(image):
        raise RuntimeError("disk on fire")

    monkeypatch.setattr(buckets, "upright_size", faulty)
    with pytest.raises(RuntimeError, match="disk on fire"):
        image_sizes(Pictures([b""]), tmp_path)
    assert not list(tmp_path.glob("*.npy"))


def test_small_buckets_are_named(caplog):
    found = Buckets(bucket_sizes(512), np.array([0] * 9 + [1] * 3 + [3] * 4, np.int16))
    with caplog.at_level(logging.WARNING):
        order = found.sampler(16, batch=4, seed=0)
    assert order.steps_per_epoch == 3
    (message,) = [record.getMessage() for record in caplog.records]
    assert all(part in message for part in ("640 × 384", "3 images", "batch of 4"))


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
