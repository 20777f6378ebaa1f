"""Endless streams: every sample once in an epoch, the same for any workers, resumed exactly."""

from __future__ import annotations

import logging
from itertools import islice, pairwise

import numpy as np
import pytest
import torch
from PIL import Image

from tests.support.image_folders import encoded, shard
from training.data import dataset, webdataset
from training.data.buckets import Buckets, bucket_sizes, square
from training.data.dataset import Examples, loader
from training.data.randomness import NoiseSettings, sample_noise
from training.data.webdataset import (
    BUFFER,
    LANES,
    BucketCounts,
    Lane,
    LaneSampler,
    ShardReader,
    StreamDataset,
)
from training.errors import TrainingError

SETTINGS = NoiseSettings(
    seed=1, drop_image=0.1, drop_text=0.1, drop_both=0.1, timesteps=1000, noise_offset=0.0
)


def png(height=8, width=8):
    return encoded(Image.new("L", (width, height)))


def tokenise(text):
    return (torch.tensor([int(text or -1)]),)


def preprocess(image):
    return torch.zeros(1)


@pytest.fixture
def shards(tmp_path):
    """Shards of numbered samples: shards(16, 8) are 16 of 8."""

    def shards(count, each, picture=lambda n: png()):
        paths = []
        for s in range(count):
            files = {}
            for n in range(s * each, (s + 1) * each):
                files |= {f"{n:05d}.png": picture(n), f"{n:05d}.txt": str(n).encode()}
            paths.append(shard(tmp_path / f"{s:03d}.tar", files))
        return paths

    return shards


def opened(paths, *, batch=1, buckets=None, **options):
    examples = Examples(tokenise, preprocess, SETTINGS)
    return StreamDataset(
        paths, ShardReader(), examples, buckets or square(8), batch=batch, seed=3, **options
    )


def numbers(batches):
    return [batch["tokens"][0][:, 0].tolist() for batch in batches]


def flat(lists):
    return [x for one in lists for x in one]


def test_an_epoch_holds_every_sample_once(shards):
    found = numbers(islice(opened(shards(16, 8)), 256))
    first, second = flat(found[:128]), flat(found[128:])
    assert sorted(first) == sorted(second) == list(range(128))
    assert first != second
    assert first != sorted(first)


def test_the_buffer_mixes_and_loses_nothing():
    found = list(webdataset._shuffled(iter(range(1000)), np.random.RandomState(0)))
    assert sorted(found) == list(range(1000))
    descents = sum(a > b for a, b in pairwise(found[:500]))
    assert descents > 150
    assert max(abs(place - item) for place, item in enumerate(found)) > BUFFER
    few = list(webdataset._shuffled(iter(range(9)), np.random.RandomState(0)))
    assert sorted(few) == list(range(9)) != few


def test_each_epoch_and_seed_has_an_order_of_its_own(shards):
    def order(seed):
        split = LaneSampler(tuple(shards(1, 30)), 1, seed)
        counts = BucketCounts(None, square(8))
        lane = Lane(0, split, ShardReader(), square(8), 1, counts)
        found = [records[0].text for records, _ in islice(lane.batches(0), 60)]
        return found[:30], found[30:]

    orders = [*order(0), *order(1)]
    assert all(sorted(one) == sorted(orders[0]) for one in orders)
    assert len({tuple(one) for one in orders}) == 4


@pytest.mark.parametrize("count", [1, 3, 8, 11, 16, 40])
@pytest.mark.parametrize("world", [1, 2])
def test_no_sample_belongs_to_two_readers(count, world):
    split = LaneSampler(tuple(f"{n}.tar" for n in range(count)), world * LANES, 0)
    for epoch in range(3):
        dealt = [split.units(epoch, lane) for lane in range(split.lanes)]
        assert all(dealt)
        taken = [(u.shard, n) for u in flat(dealt) for n in range(u.part, 48, u.parts)]
        assert len(taken) == len(set(taken)) == count * 48


@pytest.mark.parametrize(
    "workers", [2, *(pytest.param(n, marks=pytest.mark.nightly) for n in (0, 1, 3, 4))]
)
def test_workers_change_nothing(workers, shards):
    paths = shards(10, 7)
    expected = list(islice(opened(paths, batch=2), 60))
    found = list(islice(loader(opened(paths, batch=2), None, workers), 60))
    assert numbers(found) == numbers(expected)
    assert all(torch.equal(a["noise"], b["noise"]) for a, b in zip(found, expected, strict=True))


def test_workers_that_can_share_the_lanes():
    assert [StreamDataset.max_workers(n) for n in (0, 1, 3, 4, 7, 8, 30)] == [0, 1, 2, 4, 4, 8, 8]


@pytest.mark.parametrize("counted", [True, False])
@pytest.mark.parametrize("first_step", [1, 5, 24, 61])
def test_resumed(counted, first_step, shards, tmp_path):
    paths = shards(10, 7)
    folder = tmp_path if counted else None
    straight = numbers(islice(opened(paths, batch=2, folder=folder), 80))
    found = opened(paths, batch=2, folder=folder, first_step=first_step)
    assert numbers(islice(found, 80 - first_step)) == straight[first_step:]
    again = loader(opened(paths, batch=2, folder=folder, first_step=first_step), None, 2)
    assert numbers(islice(again, 10)) == straight[first_step : first_step + 10]


def test_resuming_decodes_nothing_and_passes_over_known_epochs(shards, tmp_path, monkeypatch):
    paths = shards(16, 8)
    straight = numbers(islice(opened(paths, folder=tmp_path), 128 * 3 + 20))
    decoded, read = [], []
    open_image, records = dataset.open_image, ShardReader.records

    def counting_open(picture):
        decoded.append(picture)
        return open_image(picture)

    def counting_records(self, path):
        read.append(path)
        return records(self, path)

    resumed = opened(paths, folder=tmp_path, first_step=128 * 3 + 8)
    monkeypatch.setattr(dataset, "open_image", counting_open)
    monkeypatch.setattr(ShardReader, "records", counting_records)
    assert numbers(islice(resumed, 12)) == straight[-12:]
    assert len(decoded) == 12
    assert len(read) == len(paths)  # one epoch, where each lane has two shards


def test_changed_shards_are_counted_anew(shards, tmp_path):
    list(islice(opened(shards(16, 8), folder=tmp_path), 300))
    paths = shards(16, 4)
    straight = numbers(islice(opened(paths), 200))
    resumed = opened(paths, folder=tmp_path, first_step=150)
    assert numbers(islice(resumed, 50)) == straight[150:]


def test_processes_share_an_epoch(shards):
    paths = shards(32, 4)
    parts = [list(islice(opened(paths, batch=4, rank=rank, world=2), 32)) for rank in range(2)]
    taken = [set(flat(numbers(part))) for part in parts]
    assert [len(one) for one in taken] == [64, 64]
    assert taken[0] | taken[1] == set(range(128))


def test_draws_are_of_the_samples_number(shards):
    found = list(islice(opened(shards(16, 8), batch=4, rank=1, world=2, first_step=5), 3))
    for step, batch in enumerate(found, 5):
        expected = [sample_noise(SETTINGS, step * 4 + 2 + place, (1, 1)) for place in range(2)]
        assert torch.equal(batch["noise"], torch.stack([one.noise for one in expected]))
        assert batch["timestep"].tolist() == [one.timestep for one in expected]


def test_few_shards_are_split_by_sample(shards, caplog):
    with caplog.at_level(logging.WARNING):
        found = opened(shards(2, 64))
    assert "2 shards for 8 readers (1 processes): each shard is read 4 times" in caplog.text
    epoch = flat(numbers(islice(found, 128)))
    assert sorted(epoch) == list(range(128))
    caplog.clear()
    opened(shards(8, 1))
    assert not caplog.records


def test_buckets(shards):
    shapes = [(40, 60), (60, 40), (50, 50)]
    paths = shards(8, 30, lambda n: png(*shapes[n % 3]))
    buckets = Buckets(bucket_sizes(128 * 3))
    found = list(islice(opened(paths, batch=2, buckets=buckets), 120))
    for batch in found:
        kinds = {n % 3 for n in batch["tokens"][0][:, 0].tolist()}
        assert len(kinds) == 1
        height, width = shapes[kinds.pop()]
        tall, wide = batch["pixels"].shape[2:]
        assert (tall > wide, tall < wide) == (height > width, height < width)
    assert sorted(flat(numbers(found))) == list(range(240))


@pytest.mark.parametrize("counted", [True, pytest.param(False, marks=pytest.mark.nightly)])
def test_buckets_resumed(counted, shards, tmp_path):
    shapes = [(40, 60), (60, 40), (50, 50)]
    paths = shards(9, 13, lambda n: png(*shapes[n * n % 3]))
    options = {
        "batch": 2,
        "buckets": Buckets(bucket_sizes(384)),
        "folder": tmp_path if counted else None,
    }
    straight = numbers(islice(opened(paths, **options), 160))
    for first_step in (3, 50, 150):
        resumed = opened(paths, first_step=first_step, **options)
        assert numbers(islice(resumed, 10)) == straight[first_step : first_step + 10]


def test_broken_pictures_have_no_weight(shards):
    paths = shards(8, 4, lambda n: b"damaged" if n == 9 else png())
    for buckets in (square(8), Buckets(bucket_sizes(384))):
        batches = list(islice(opened(paths, buckets=buckets), 32))
        broken = [name for batch in batches for name in batch["broken"]]
        assert broken == ["00009 in 002.tar: cannot identify image file"]
        assert sum(int(batch["weight"].sum()) for batch in batches) == 31


def test_broken_shards_are_named_and_passed_over(shards, tmp_path):
    paths = shards(16, 8)
    (tmp_path / "003.tar").write_bytes(b"no tar")
    (tmp_path / "005.tar").write_bytes((tmp_path / "005.tar").read_bytes()[:5000])
    (tmp_path / "007.tar").unlink()
    batches = list(islice(opened(paths), 110))
    broken = [name for batch in batches for name in batch["broken"]]
    for name in ("003.tar", "005.tar", "007.tar"):
        assert sum(name in one for one in broken) in (1, 2)  # some lanes began the next epoch
    weights = torch.cat([batch["weight"] for batch in batches])
    assert weights.sum() == 110 - len(broken)


def test_what_a_broken_shard_gave_is_not_kept(shards, tmp_path):
    paths = shards(16, 8)
    (tmp_path / "005.tar").write_bytes((tmp_path / "005.tar").read_bytes()[:5000])
    folder = tmp_path / "counts"
    folder.mkdir()
    list(islice(opened(paths, folder=folder), 300))
    assert len(list(folder.iterdir())) == 15  # the next time more of it may arrive


def test_a_broken_shard_is_named_once_in_an_epoch(shards, tmp_path):
    (path,) = shards(1, 64)
    data = (tmp_path / "000.tar").read_bytes()
    (tmp_path / "000.tar").write_bytes(data[: len(data) // 2])
    batches = list(islice(opened([path]), 33))
    assert len(flat(batch["broken"] for batch in batches)) == 1


def test_no_batch_of_any_shard(shards, tmp_path):
    with pytest.raises(
        TrainingError, match=r"No batch of 4 readable.*too few.*smaller train_batch_size"
    ):
        next(iter(opened(shards(8, 3), batch=4)))
    # One sample for eight readers: each finds it in some epoch.
    one = shard(tmp_path / "one.tar", {"a.png": png(), "a.txt": b"1"})
    assert numbers(islice(opened([one]), 16)) == [[1]] * 16


def test_shards_that_vanish_during_a_run(shards, tmp_path):
    found = iter(opened(shards(8, 4)))
    next(found)
    for path in tmp_path.glob("*.tar"):
        path.unlink()
    with pytest.raises(TrainingError, match="Look for broken shards"):
        for _ in range(1000):
            next(found)


def test_shards_without_captions_are_refused_at_once(tmp_path):
    with pytest.raises(TrainingError, match="no caption"):
        opened([shard(tmp_path / "a.tar", {"a.png": png()})])


def test_wrong_splits(shards):
    with pytest.raises(ValueError, match="3 cannot be split over 2"):
        opened(shards(1, 1), batch=3, world=2)


def test_fingerprint(shards, tmp_path):
    paths = shards(4, 1)
    plain = opened(paths).fingerprint
    assert opened(paths).fingerprint == opened(paths, first_step=9).fingerprint == plain
    others = [opened(paths[:3]), opened(paths, batch=2), opened(paths, world=1, buckets=square(16))]
    assert len({plain, *(other.fingerprint for other in others)}) == 4
    assert opened(paths, batch=2, world=2, rank=1).fingerprint != others[1].fingerprint
    for path in tmp_path.glob("*.tar"):
        (tmp_path / "moved").mkdir(exist_ok=True)
        path.rename(tmp_path / "moved" / path.name)
    moved = [str(tmp_path / "moved" / f"{n:03d}.tar") for n in range(4)]
    assert opened(moved).fingerprint == plain


def test_the_loader_of_a_stream_uses_a_fitting_number_of_workers(shards):
    found = loader(opened(shards(1, 8)), None, 7)
    assert found.num_workers == 4
    assert LANES % found.num_workers == 0
