"""WebDataset shards: what they hold, what is said of bad ones, and endless streams of them: every
sample once in an epoch, the same for any workers, resumed exactly."""

from __future__ import annotations

import gzip
import http.server
import json
import logging
import shutil
import threading
from functools import partial
from itertools import chain, islice, pairwise
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

from tests.support.image_folders import encoded, shard
from training.data import dataset, webdataset
from training.data.buckets import Buckets, bucket_sizes, square
from training.data.dataset import Examples, loader
from training.data.image import open_image
from training.data.randomness import NoiseSettings, sample_noise
from training.data.sources import Columns, Record
from training.data.webdataset import (
    BUFFER,
    LANES,
    BucketCounts,
    Lane,
    LaneSampler,
    ShardReader,
    StreamDataset,
    expand_shards,
    is_stream,
)
from training.errors import TrainingError


def png(height=8, width=8, shade=0):
    return encoded(Image.new("L", (width, height), shade))


PAIRS = {
    "000.png": png(),
    "000.txt": b"zero\n",
    "001.png": png(shade=1),
    "001.txt": "eins ü".encode(),
}


def records(path, **options):
    return list(ShardReader(**options).records(str(path)))


class TestShards:
    def test_what_is_a_stream(self, tmp_path):
        names = ["a/{000..009}.tar", "x.tar", "x.tar.gz", "https://h/x.tar", "pipe:cat x", "s3://b"]
        assert all(map(is_stream, names))
        assert not any(map(is_stream, (tmp_path, "list.json", "metadata.jsonl", "pictures")))
        shard(tmp_path / "a.tar", PAIRS)
        assert is_stream(tmp_path)
        (tmp_path / "metadata.jsonl").write_text("")
        assert not is_stream(tmp_path)

    def test_patterns(self, tmp_path):
        paths = [shard(tmp_path / f"{n:03d}.tar", PAIRS) for n in range(12)]
        assert expand_shards(f"{tmp_path}/{{000..011}}.tar") == tuple(paths)
        assert expand_shards(f"{tmp_path}/{{000,003}}.tar") == (paths[0], paths[3])
        assert expand_shards(tmp_path / "*.tar") == expand_shards(tmp_path) == tuple(paths)
        urls = tuple(f"https://h/{n}.tar" for n in range(3))
        assert expand_shards("https://h/{0..2}.tar") == urls
        with pytest.raises(TrainingError, match=r"2 of 14 shards.*012\.tar, .*013\.tar\. Correct"):
            expand_shards(f"{tmp_path}/{{000..013}}.tar")
        with pytest.raises(TrainingError, match="do not exist"):
            expand_shards(f"{tmp_path}/none-*.tar")

    def test_pairs_packed_or_piped(self, tmp_path):
        path = shard(tmp_path / "a.tar", PAIRS)
        assert records(path) == [
            Record("000 in a.tar", png(), "zero"),
            Record("001 in a.tar", png(shade=1), "eins ü"),
        ]
        (tmp_path / "a.tar.gz").write_bytes(gzip.compress((tmp_path / "a.tar").read_bytes()))
        for other in (tmp_path / "a.tar.gz", f"pipe:cat '{path}'", f"file:{path}"):
            assert [record.text for record in records(other)] == ["zero", "eins ü"]

    @pytest.mark.skipif(shutil.which("curl") is None, reason="webdataset reads URLs with curl")
    def test_urls(self, tmp_path):
        class Quiet(http.server.SimpleHTTPRequestHandler):
            def log_message(self, *arguments):
                pass

        shard(tmp_path / "a.tar", PAIRS | {"meta.json": json.dumps({}).encode()})
        handler = partial(Quiet, directory=str(tmp_path))
        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            address = f"http://127.0.0.1:{server.server_port}"
            assert [r.text for r in records(f"{address}/a.tar")][:2] == ["zero", "eins ü"]
            (missing,) = records(f"{address}/b.tar")
            assert "lost" in missing.broken
            assert missing.name == f"{address}/b.tar"
            server.shutdown()

    @pytest.mark.parametrize(
        "files, options, expected",
        [
            ({"a.JPG": b"x", "a.TXT": b"t"}, {}, ("t", b"x", None)),
            ({"a.webp": b"x", "a.json": b'{"caption": "c", "n": 1}'}, {}, ("c", b"x", None)),
            (
                {"a.jpg": b"x", "a.txt": b"t", "a.json": b'{"alt": "from json"}'},
                {"columns": Columns(text="alt")},
                ("from json", b"x", None),
            ),
            ({"a.reference.png": b"r", "a.jpg": b"x", "a.txt": b"t"}, {}, ("t", b"x", b"r")),
            ({"dir/a.jpg": b"x", "dir/a.txt": b"t"}, {}, ("t", b"x", None)),
            ({"a.v2.jpg": b"x", "a.txt": b"t"}, {}, ("t", b"x", None)),
            ({"a.jpg": b"x"}, {"default_caption": ""}, ("", b"x", None)),
            ({"a.jpg": b"x", "a.txt": b" "}, {"default_caption": "d"}, ("d", b"x", None)),
            ({"a.jpg": b"x", "a.json": b"[1]"}, {"default_caption": "d"}, ("d", b"x", None)),
        ],
    )
    def test_samples(self, files, options, expected, tmp_path):
        (found,) = records(shard(tmp_path / "a.tar", files), **options)
        assert (found.text, found.image, found.reference) == expected
        assert not found.broken

    @pytest.mark.parametrize(
        "files, said",
        [
            ({"a.jpg": b"x", "a.cls": b"1"}, "no caption (.txt or .json) among its files jpg, cls"),
            ({"a.jpg": b"x", "a.txt": b"  "}, "no caption"),
            ({"a.txt": b"t", "a.mp4": b"x"}, "no picture among its files txt, mp4"),
            ({"a.jpg": b"x", "a.json": b"{bad"}, "its caption cannot be read"),
            ({"a.jpg": b"x", "a.txt": b"\xff"}, "its caption cannot be read"),
            ({"a.reference.jpg": b"x", "a.txt": b"t"}, "no picture"),
        ],
    )
    def test_samples_that_lack_something(self, files, said, tmp_path):
        path = shard(tmp_path / "a.tar", files)
        (found,) = records(path)
        assert said in found.broken
        with pytest.raises(TrainingError, match=r"a\.tar.*first sample a in a\.tar") as error:
            ShardReader().check([path])
        assert said in str(error.value)

    def test_a_shard_cut_short_gives_what_it_has(self, tmp_path):
        path = tmp_path / "a.tar"
        names = [f"{n:02d}" for n in range(10)]
        shard(path, {f"{name}.{end}": b"t" * 3000 for name in names for end in ("png", "txt")})
        path.write_bytes(path.read_bytes()[:45_000])
        found = records(path)
        assert [record.name for record in found[:-1]] == [f"{name} in a.tar" for name in names[:5]]
        assert found[-1].name == str(path)
        assert "rest of this shard is lost (unexpected end of data)" in found[-1].broken

    @pytest.mark.parametrize(
        "content, said",
        [(None, "No such file"), (b"", "empty file"), (b"no tar" * 500, "invalid header")],
        ids=["missing", "empty", "something else"],
    )
    def test_shards_that_are_none(self, content, said, tmp_path):
        path = tmp_path / "a.tar"
        if content is not None:
            path.write_bytes(content)
        (found,) = records(path)
        assert said in found.broken
        unreadable = "None of the first 3 of 5 shards can be read"
        with pytest.raises(TrainingError, match=unreadable) as error:
            ShardReader().check([str(path)] * 5)
        assert str(path) in str(error.value)
        ShardReader().check([str(path), shard(tmp_path / "good.tar", PAIRS)])

    def test_an_empty_tar_is_no_error_by_itself(self, tmp_path):
        path = shard(tmp_path / "a.tar", {})
        assert records(path) == []
        with pytest.raises(TrainingError, match="it is empty"):
            ShardReader().check([path])


SETTINGS = NoiseSettings(
    seed=1, drop_image=0.1, drop_text=0.1, drop_both=0.1, timesteps=1000, noise_offset=0.0
)
SHAPES = [(40, 60), (60, 40), (50, 50)]


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
    return [*chain.from_iterable(lists)]


class TestOrder:
    def test_an_epoch_holds_every_sample_once(self, shards):
        found = flat(numbers(islice(opened(shards(16, 8)), 256)))
        first, second = found[:128], found[128:]
        assert sorted(first) == sorted(second) == list(range(128))
        assert first != second
        assert first != sorted(first)

    def test_the_buffer_mixes_and_loses_nothing(self):
        found = list(webdataset._shuffled(iter(range(1000)), np.random.RandomState(0)))
        assert sorted(found) == list(range(1000))
        assert sum(a > b for a, b in pairwise(found[:500])) > 150
        assert max(abs(place - item) for place, item in enumerate(found)) > BUFFER
        few = list(webdataset._shuffled(iter(range(9)), np.random.RandomState(0)))
        assert sorted(few) == list(range(9)) != few

    def test_each_epoch_and_seed_has_an_order_of_its_own(self, shards):
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
    def test_no_sample_belongs_to_two_readers(self, count, world):
        split = LaneSampler(tuple(f"{n}.tar" for n in range(count)), world * LANES, 0)
        for epoch in range(3):
            dealt = [split.units(epoch, lane) for lane in range(split.lanes)]
            assert all(dealt)
            taken = [(u.shard, n) for u in flat(dealt) for n in range(u.part, 48, u.parts)]
            assert len(taken) == len(set(taken)) == count * 48

    @pytest.mark.parametrize(
        "workers", [2, *(pytest.param(n, marks=pytest.mark.nightly) for n in (0, 1, 3, 4))]
    )
    def test_workers_change_nothing(self, workers, shards):
        paths = shards(10, 7)
        expected = list(islice(opened(paths, batch=2), 60))
        found = list(islice(loader(opened(paths, batch=2), None, workers), 60))
        torch.testing.assert_close(found, expected, rtol=0, atol=0)

    def test_workers_that_can_share_the_lanes(self, shards):
        asked = (0, 1, 3, 4, 7, 8, 30)
        assert [StreamDataset.max_workers(n) for n in asked] == [0, 1, 2, 4, 4, 8, 8]
        assert loader(opened(shards(1, 8)), None, 7).num_workers == 4

    def test_processes_share_an_epoch(self, shards):
        paths = shards(32, 4)
        parts = [islice(opened(paths, batch=4, rank=rank, world=2), 32) for rank in range(2)]
        taken = [set(flat(numbers(part))) for part in parts]
        assert [len(one) for one in taken] == [64, 64]
        assert taken[0] | taken[1] == set(range(128))

    def test_draws_are_of_the_samples_number(self, shards):
        found = islice(opened(shards(16, 8), batch=4, rank=1, world=2, first_step=5), 3)
        for step, batch in enumerate(found, 5):
            expected = [sample_noise(SETTINGS, step * 4 + 2 + place, (1, 1)) for place in range(2)]
            assert torch.equal(batch["noise"], torch.stack([one.noise for one in expected]))
            assert batch["timestep"].tolist() == [one.timestep for one in expected]

    def test_few_shards_are_split_by_sample(self, shards, caplog):
        with caplog.at_level(logging.WARNING):
            found = opened(shards(2, 64))
        assert "2 shards for 8 readers (1 processes): each shard is read 4 times" in caplog.text
        assert sorted(flat(numbers(islice(found, 128)))) == list(range(128))
        caplog.clear()
        opened(shards(8, 1))
        assert not caplog.records

    def test_buckets(self, shards):
        paths = shards(8, 30, lambda n: png(*SHAPES[n % 3]))
        found = list(islice(opened(paths, batch=2, buckets=Buckets(bucket_sizes(384))), 120))
        for batch, samples in zip(found, numbers(found), strict=True):
            ((height, width),) = {SHAPES[n % 3] for n in samples}
            tall, wide = batch["pixels"].shape[2:]
            assert (tall > wide, tall < wide) == (height > width, height < width)
        assert sorted(flat(numbers(found))) == list(range(240))

    def test_fingerprint(self, shards, tmp_path):
        paths = shards(4, 1)
        plain = opened(paths).fingerprint
        assert opened(paths).fingerprint == opened(paths, first_step=9).fingerprint == plain
        others = [opened(paths[:3]), opened(paths, batch=2), opened(paths, buckets=square(16))]
        others.append(opened(paths, batch=2, world=2, rank=1))
        assert len({plain, *(other.fingerprint for other in others)}) == 5
        (tmp_path / "moved").mkdir()
        moved = [shutil.move(path, tmp_path / "moved") for path in paths]
        assert opened(moved).fingerprint == plain


class TestResumed:
    @pytest.mark.parametrize("first_step", [5, 24, 61])
    @pytest.mark.parametrize(
        "buckets, counted",
        [
            (square(8), True),
            (square(8), False),
            (Buckets(bucket_sizes(384)), True),
            pytest.param(Buckets(bucket_sizes(384)), False, marks=pytest.mark.nightly),
        ],
        ids=["square, counted", "square", "buckets, counted", "buckets"],
    )
    def test_from_any_step(self, buckets, counted, first_step, shards, tmp_path):
        paths = shards(9, 13, lambda n: png(*SHAPES[n * n % 3]))
        folder = tmp_path if counted else None
        options = {"batch": 2, "buckets": buckets, "folder": folder}
        straight = numbers(islice(opened(paths, **options), 80))
        found = opened(paths, first_step=first_step, **options)
        assert numbers(islice(found, 80 - first_step)) == straight[first_step:]
        again = loader(opened(paths, first_step=first_step, **options), None, 2)
        assert numbers(islice(again, 10)) == straight[first_step : first_step + 10]

    def test_nothing_is_decoded_and_known_epochs_are_passed_over(self, shards, tmp_path):
        paths = shards(16, 8)
        straight = numbers(islice(opened(paths, folder=tmp_path), 128 * 3 + 20))
        resumed = opened(paths, folder=tmp_path, first_step=128 * 3 + 8)
        reading = mock.patch.object(
            ShardReader, "records", autospec=True, side_effect=ShardReader.records
        )
        with mock.patch.object(dataset, "open_image", wraps=open_image) as decoded, reading as read:
            assert numbers(islice(resumed, 12)) == straight[-12:]
        assert decoded.call_count == 12
        assert read.call_count == len(paths)  # one epoch, where each lane has two shards

    def test_changed_shards_are_counted_anew(self, shards, tmp_path):
        list(islice(opened(shards(16, 8), folder=tmp_path), 300))
        paths = shards(16, 4)
        straight = numbers(islice(opened(paths), 200))
        resumed = opened(paths, folder=tmp_path, first_step=150)
        assert numbers(islice(resumed, 50)) == straight[150:]


class TestBroken:
    def test_pictures_have_no_weight(self, shards):
        paths = shards(8, 4, lambda n: b"damaged" if n == 9 else png())
        for buckets in (square(8), Buckets(bucket_sizes(384))):
            batches = list(islice(opened(paths, buckets=buckets), 32))
            broken = flat(batch["broken"] for batch in batches)
            assert broken == ["00009 in 002.tar: cannot identify image file"]
            assert sum(int(batch["weight"].sum()) for batch in batches) == 31

    def test_shards_are_named_passed_over_and_not_counted(self, shards, tmp_path):
        paths = shards(16, 8)
        (tmp_path / "003.tar").write_bytes(b"no tar")
        (tmp_path / "005.tar").write_bytes((tmp_path / "005.tar").read_bytes()[:5000])
        (tmp_path / "007.tar").unlink()
        counts = tmp_path / "counts"
        batches = list(islice(opened(paths, folder=counts), 110))
        broken = flat(batch["broken"] for batch in batches)
        for name in ("003.tar", "005.tar", "007.tar"):
            assert sum(name in one for one in broken) in (1, 2)  # some lanes began the next epoch
        weights = torch.cat([batch["weight"] for batch in batches])
        assert weights.sum() == 110 - len(broken)
        assert len(list(counts.iterdir())) == 13  # the next time more of the others may arrive

    def test_a_shard_is_named_once_in_an_epoch(self, shards, tmp_path):
        (path,) = shards(1, 64)
        data = (tmp_path / "000.tar").read_bytes()
        (tmp_path / "000.tar").write_bytes(data[: len(data) // 2])
        batches = islice(opened([path]), 33)
        assert len(flat(batch["broken"] for batch in batches)) == 1

    def test_no_batch_of_any_shard(self, shards, tmp_path):
        said = "No batch of 4 readable.*too few.*smaller train_batch_size"
        with pytest.raises(TrainingError, match=said):
            next(iter(opened(shards(8, 3), batch=4)))
        # One sample for eight readers: each finds it in some epoch.
        one = shard(tmp_path / "one.tar", {"a.png": png(), "a.txt": b"1"})
        assert numbers(islice(opened([one]), 16)) == [[1]] * 16

    def test_shards_that_vanish_during_a_run(self, shards, tmp_path):
        found = iter(opened(shards(8, 4)))
        next(found)
        for path in tmp_path.glob("*.tar"):
            path.unlink()
        with pytest.raises(TrainingError, match="Look for broken shards"):
            for _ in range(1000):
                next(found)

    def test_what_is_refused_at_once(self, shards, tmp_path):
        with pytest.raises(TrainingError, match="no caption"):
            opened([shard(tmp_path / "a.tar", {"a.png": png()})])
        with pytest.raises(ValueError, match="3 cannot be split over 2"):
            opened(shards(1, 1), batch=3, world=2)
