"""A cache holds what the encoders give, however it was interrupted and whoever wrote it."""

from __future__ import annotations

import logging
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from filelock import FileLock
from tqdm import tqdm

from ip_adapter_core.variants import FAMILIES, FEATURE_KINDS
from tests.support import image_folders
from tests.support.small_models import command
from training import cache
from training.caching import writer as cache_writing
from training.caching.dataset import CachedDataset
from training.caching.format import MANIFEST, Manifest, is_whole, open_tensors, shard_path
from training.config import parse
from training.data.buckets import Buckets, by_aspect, square
from training.data.dataset import EveryCaption, RawDataset, collate
from training.data.sources import Record, open_source
from training.errors import TrainingError
from training.models.base import load_encoders
from training.models.frozen import FrozenEncoders
from training.models.image_encoder import ImageEncoder

resource = pytest.importorskip("resource", reason="limits of a POSIX system")

EMBEDS, HIDDEN = FEATURE_KINDS
ROOT = Path(cache.__file__).parents[1]


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.name != ".lock"}


def encoders_of(settings, kind=EMBEDS):
    encoder = ImageEncoder.from_name(settings.image_encoder_path)
    return FrozenEncoders(load_encoders(settings.pretrained_model_name_or_path), encoder, kind)


def close(found, expected):
    return float((found.float() - expected).norm() / expected.norm()) < 1e-3  # half's precision


def check_rows(settings, encoders, buckets, broken=()):
    """Compare a cache's rows, number 5 of a run and on, with what the encoders give."""
    source = open_source(settings.train_data_dir)
    preprocess = encoders.image_encoder.preprocess
    raw = RawDataset(source, encoders.tokenise, preprocess, buckets, cache.NO_DRAWS)
    cached = CachedDataset(
        settings.output_dir, encoders.kind, cache.NO_DRAWS, encoders.fingerprints
    )
    rows = [row for row in range(len(source)) if row not in broken]
    assert len(cached) == len(rows)
    for place in (0, 6, 7, 8, *range(9, len(rows), 3), -1):
        place %= len(rows)
        found = collate([cached[5 + place, place]])
        expected = encoders.encode(collate([raw[5 + place, rows[place]]]))
        assert set(found) == set(expected)
        for name in ("mean", "log_variance", "states", "features", "pooled"):
            if name in expected:
                assert found[name].dtype == torch.float16
                assert close(found[name], expected[name]), name
        for name in ("time_ids", "noise", "weight"):
            assert torch.equal(found[name], expected[name])
    return cached


class TestContent:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_rows_are_what_the_encoders_give(self, family, settings):
        given = settings(family)
        cache.make(given)
        for kind in FEATURE_KINDS:
            encoders = encoders_of(given, kind)
            cached = check_rows(given, encoders, square(64))
            assert cached.buckets.of_row is None
            dropped, expected = cached.dropped(), encoders.dropped()
            assert close(dropped.states, expected.states)
            if kind == HIDDEN:
                assert close(dropped.features, expected.features)
            else:
                assert not dropped.features.any()
            assert (dropped.pooled is None) == (family == "sd15")
            if dropped.pooled is not None:
                assert close(dropped.pooled, expected.pooled)
            assert dropped.features.shape == expected.features.shape

    def test_of_buckets_and_broken_pictures(self, settings, tmp_path):
        data = tmp_path / "data"
        image_folders.with_metadata(data, 30, sizes=((80, 80), (160, 80), (80, 160)), broken=8)
        buckets = {"enable_bucket": True, "resolution": 192, "rows_per_shard": 7}
        given = settings(train_data_dir=str(data), **buckets)
        cache.make(given)
        of_row = by_aspect(open_source(data), 192, tmp_path)
        cached = check_rows(given, encoders_of(given), of_row, broken=range(8))
        assert cached.buckets.of_row.tolist() == of_row.of_row[8:].tolist()
        assert len(set(cached.buckets.of_row)) == 3
        assert [said[:10] for said in cached.broken] == [f"{n:04}.png: " for n in range(8)]

    def test_one_kind_of_features_only(self, settings):
        cache.make(settings(features=HIDDEN))
        with open_tensors(shard_path(Path(settings().output_dir), 0)) as (file, _):
            assert {*file.keys()} & {*FEATURE_KINDS} == {HIDDEN}

    def test_encoders_of_another_precision_are_the_same_encoders(self, settings):
        given = settings(dtype="bfloat16", cache_dtype="bfloat16")
        cache.make(given)
        expected = encoders_of(given).fingerprints
        rows = CachedDataset(given.output_dir, EMBEDS, cache.NO_DRAWS, expected)
        assert rows[0, 0]["mean"].dtype == torch.bfloat16

    def test_broken_pictures_are_named(self, settings, tmp_path, caplog):
        image_folders.with_metadata(tmp_path / "data", 30, broken=9)
        with caplog.at_level(logging.INFO):
            cache.main(command(settings(train_data_dir=str(tmp_path / "data"))))
        assert (
            "9 images could not be read, or show no face, and are left out: 0000.png: "
            in caplog.text
        )
        assert "0004.png" in caplog.text
        assert "0005.png" not in caplog.text
        assert "21 rows" in caplog.text

    def test_nothing_but_broken_pictures(self, settings, tmp_path):
        image_folders.with_metadata(tmp_path / "data", 3, broken=3)
        with pytest.raises(TrainingError, match=r"none of its 3 pictures.*0000\.png: cannot"):
            cache.make(settings(train_data_dir=str(tmp_path / "data")))

    def test_numbers_that_the_dtype_cannot_hold(self, settings, monkeypatch):
        outputs = FrozenEncoders.outputs
        batches = []

        def overflowing(self, batch, kinds):
            found = outputs(self, batch, kinds)
            batches.append(batch)
            if len(batches) == 5:  # three batches a shard of eight rows
                found["log_variance"][1, 0, 0, 0] = 70_000.0
            return found

        monkeypatch.setattr(FrozenEncoders, "outputs", overflowing)
        said = r"log variance of row 12 became.*float16.*bfloat16"
        with pytest.raises(TrainingError, match=said):
            cache.make(settings())
        shards = [path.name for path in Path(settings().output_dir).glob("shard-*")]
        assert shards == ["shard-00000.safetensors"]
        batches.clear()
        cache.make(settings(cache_dtype="bfloat16", output_dir=settings().output_dir + "2"))


class Shaped:
    """Encoders of SD1.5 and ViT-H/14 as far as shapes go."""

    def outputs(self, batch, kinds):
        shapes = {"mean": (4, 64, 64), "log_variance": (4, 64, 64), "states": (77, 768)}
        features = {EMBEDS: (1024,), HIDDEN: (257, 1280)}
        shapes |= {kind: features[kind] for kind in kinds}
        return {name: torch.zeros(len(batch["weight"]), *s) for name, s in shapes.items()}


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [((EMBEDS,), 65_536 + 118_272 + 2_048), (FEATURE_KINDS, 65_536 + 118_272 + 659_968)],
)
def test_bytes_of_a_sample_of_sd15(kinds, expected, tmp_path, pictures):
    def one(_):
        return torch.zeros(1)

    source = [Record("", pictures / "00.png", "")] * 16
    dataset = EveryCaption(source, lambda text: (one(text),), one, square(512), cache.NO_DRAWS)
    manifest = Manifest(16, 16, kinds, "float16", ((512, 512),), {}, {})
    with tqdm(disable=True) as bar:
        cache_writing.write_shards(dataset, Shaped(), tmp_path, manifest, [0], 8, 0, bar)
    found = shard_path(tmp_path, 0).stat().st_size / 16
    assert expected < found < expected + 200


def test_batches_stay_in_their_shard_and_bucket():
    buckets = Buckets(((8, 8), (8, 16)), np.array([0, 1, 0, 1, 1, 0, 0, 0, 1], np.int16))
    shards = range(5, 9), range(5)
    batches = (x for rows in shards for x in buckets.batches(np.array(rows), 2))
    found = [batch.tolist() for batch in batches]
    assert found == [[5, 6], [7], [8], [0, 2], [1, 3], [4]]


class TestCannotWrite:
    @pytest.mark.parametrize(
        "place",
        [
            "file",
            "file/cache",
            pytest.param(
                "locked",
                marks=pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere"),
            ),
        ],
    )
    def test_it_is_told_before_any_model_is_read(self, place, settings, tmp_path, monkeypatch):
        monkeypatch.setattr(cache, "load_encoders", lambda *_: pytest.fail("a model was read"))
        (tmp_path / "file").touch()
        (tmp_path / "locked").mkdir(mode=0o500)
        with pytest.raises(TrainingError, match=r"Nothing can be written to.*--output_dir"):
            cache.make(settings(output_dir=str(tmp_path / place)))

    def test_while_another_writes_there(self, finished):
        said = pytest.raises(TrainingError, match=r"Another cache\.py is writing")
        with FileLock(Path(finished.output_dir) / ".lock"), said:
            cache.make(finished)
        cache.make(finished)

    def test_a_full_disk(self, finished):
        """A limit on a file's size stands for it: the write fails half-way all the same."""
        out = Path(finished.output_dir)
        expected = contents(out)
        for shard in (1, 3):
            shard_path(out, shard).unlink()
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        try:
            with pytest.raises(TrainingError, match=r"shard-00001.*File too large.*same command"):
                cache.make(finished)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        left = contents(out)
        assert set(left) == set(expected) - {"shard-00001.safetensors", "shard-00003.safetensors"}
        assert all(is_whole(path) for path in out.glob("shard-*"))
        cache.make(finished)
        assert contents(out) == expected

    def test_what_will_not_suffice_is_told_after_the_first_shard(
        self, finished, monkeypatch, caplog
    ):
        usage = SimpleNamespace(free=1000)
        monkeypatch.setattr(cache_writing.shutil, "disk_usage", lambda _: usage)
        for shard in (1, 3):
            shard_path(Path(finished.output_dir), shard).unlink()
        cache.make(finished)
        assert "will not suffice" in caplog.text


class TestCommandLine:
    def test_it_gives_the_settings(self, settings):
        assert parse(cache.CacheConfig, "cache.py", command(settings())) == settings()

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (["--rows_per_shard", "0"], "rows_per_shard is 0; expected at least 1"),
            (["--features", "hidden"], "features"),
        ],
    )
    def test_a_value_that_cannot_be(self, arguments, said, settings, capsys):
        with pytest.raises(SystemExit) as error:
            parse(cache.CacheConfig, "cache.py", [*command(settings()), *arguments])
        assert error.value.code == 2
        assert said in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("data", "said"),
        [("/nowhere", "There is no '/nowhere'"), ("shards/{000..009}.tar", ".*WebDataset shards")],
    )
    def test_errors_are_messages(self, data, said, settings):
        with pytest.raises(SystemExit, match=rf"cache\.py: {said}"):
            cache.main(command(settings(train_data_dir=data)))


def launched(settings, shards=None, seconds=0.0):
    """Run cache.py in a fresh process; its exit code. With `shards` it is killed, so many seconds
    after there are so many of them."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["training.cache"])
    process = context.Process(target=cache.main, args=(command(settings),))
    process.start()
    if shards is not None:
        out = Path(settings.output_dir)
        while process.is_alive() and len(list(out.glob("shard-*.safetensors"))) < shards:
            time.sleep(0.002)
        time.sleep(seconds)
        process.kill()
    process.join()
    return process.exitcode


class TestGoingOn:
    @pytest.mark.nightly
    def test_two_processes_write_what_one_writes(self, settings, tmp_path):
        cache.make(settings(dataloader_num_workers=1))
        both = settings(output_dir=str(tmp_path / "both"))
        script = str(ROOT / "training" / "cache.py")
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        result = subprocess.run(
            [*launch, "--nproc_per_node", "2", script, *command(both)],
            env={**os.environ, "OMP_NUM_THREADS": "2"},
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, result.stderr
        assert "the first of 2 processes" in result.stderr
        assert "40 rows" in result.stderr
        assert contents(both.output_dir) == contents(settings().output_dir)

    def test_what_is_whole_is_kept_and_the_rest_is_the_same(self, finished):
        out = Path(finished.output_dir)
        expected = contents(out)
        times = {path: path.stat().st_mtime_ns for path in out.glob("shard-*")}
        cut, *lost = (shard_path(out, shard) for shard in (1, 0, 3))
        cut.write_bytes(cut.read_bytes()[:-1])
        for path in lost:
            path.unlink()
        cache.make(finished)
        assert contents(out) == expected
        for path, written in times.items():
            assert (path.stat().st_mtime_ns == written) == (path not in (cut, *lost))

    @pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.nightly)])
    def test_killed_at_any_moment(self, kills, settings):
        given = settings(rows_per_shard=2)
        out = Path(given.output_dir)
        assert launched(given) == 0
        expected = contents(out)
        shutil.rmtree(out)
        chance, counts = random.Random(0), []
        for _ in range(kills):
            there = len(list(out.glob("shard-*")))
            if there > 15:
                shutil.rmtree(out)
                there = 0
            moment = chance.uniform(0, chance.choice([0.02, 1.5]))  # among shards, or before them
            launched(given, chance.randint(there, there + 3), moment)
            shards = list(out.glob("shard-*.safetensors"))
            counts.append(len(shards))
            for path in shards:
                assert path.read_bytes() == expected[path.name]
        assert len({*counts} - {0, 20}) >= kills // 4  # it was killed while writing
        assert launched(given) == 0
        assert contents(out) == expected

    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"family": "sdxl"}, r"vae|text encoder \(there '?.*sd15'?, now '?.*sdxl"),
            ({"resolution": 72}, r"sizes \(there \(\(64, 64\),\), now \(\(72, 72\),\)\)"),
            ({"features": EMBEDS}, "features"),
            ({"cache_dtype": "float32"}, r"dtype \(there float16, now float32\)"),
            ({"rows_per_shard": 4}, r"shard_rows \(there 8, now 4\)"),
            ({"train_data_dir": "data"}, r"data \(there .*pictures.*, now data\)"),
        ],
    )
    def test_other_settings_are_refused(
        self, changes, said, settings, finished, tmp_path, monkeypatch
    ):
        monkeypatch.chdir(tmp_path)
        image_folders.with_metadata(Path("data"), 40)
        before = contents(finished.output_dir)
        with pytest.raises(TrainingError, match=f"cache of another run.*{said}"):
            cache.make(settings(**changes))
        assert contents(finished.output_dir) == before

    def test_more_workers_or_another_batch_are_no_other_settings(self, settings, finished):
        shard_path(Path(finished.output_dir), 0).unlink()
        cache.make(settings(dataloader_num_workers=1, batch_size=5))

    def test_leftovers_of_a_kill_are_removed(self, finished):
        out = Path(finished.output_dir)
        for name in ("shard-00001.safetensors.tmp", ".tmpAbCdEf", "cache.json.tmp"):
            (out / name).write_bytes(b"half")
        cache.make(finished)
        assert not list(out.glob("*.tmp")) + list(out.glob(".tmp*"))

    def test_shards_of_nobody(self, finished):
        (Path(finished.output_dir) / MANIFEST).unlink()
        with pytest.raises(TrainingError, match=r"holds shards without a cache\.json"):
            cache.make(finished)
