"""The same cache comes of any number of processes, however often they were killed."""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ip_adapter_core.variants import FEATURE_KINDS
from tests.support import image_folders
from tests.support.small_models import command
from training import cache
from training.caching.format import MANIFEST, shard_path
from training.errors import TrainingError

EMBEDS, HIDDEN = FEATURE_KINDS
ROOT = Path(cache.__file__).parents[1]

pytestmark = pytest.mark.usefixtures("arrow", "accelerate_anew")


@pytest.fixture
def finished(settings, tmp_path_factory):
    """Settings of a small cache that is finished: made once, and copied."""
    kept = tmp_path_factory.getbasetemp() / "finished_cache"
    if not kept.exists():
        cache.make(settings(output_dir=str(kept)))
    shutil.copytree(kept, settings().output_dir)
    return settings()


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.name != ".lock"}


class TestProcesses:
    @pytest.mark.nightly
    def test_two_write_what_one_writes(self, settings, tmp_path):
        cache.make(settings(dataloader_num_workers=1))
        alone = contents(settings().output_dir)
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
        assert contents(both.output_dir) == alone

    def test_shards_do_not_depend_on_which_are_written(self, finished):
        whole = finished
        expected = contents(whole.output_dir)
        for shard in (0, 2, 3):
            shard_path(Path(whole.output_dir), shard).unlink()
        cache.make(whole)
        assert contents(whole.output_dir) == expected


class TestGoingOn:
    def test_what_is_whole_is_kept(self, finished):
        given = finished
        expected = contents(given.output_dir)
        times = {path: path.stat().st_mtime_ns for path in Path(given.output_dir).glob("shard-*")}
        cut = shard_path(Path(given.output_dir), 1)
        cut.write_bytes(cut.read_bytes()[:-1])
        cache.make(given)
        assert contents(given.output_dir) == expected
        for path, written in times.items():
            assert (path.stat().st_mtime_ns == written) == (path != cut)

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
        ],
    )
    def test_other_settings_are_refused(self, changes, said, settings, finished):
        before = contents(settings().output_dir)
        with pytest.raises(TrainingError, match=f"cache of another run.*{said}"):
            cache.make(settings(**changes))
        assert contents(settings().output_dir) == before

    def test_other_pictures_are_refused(self, settings, finished, tmp_path):
        image_folders.with_metadata(tmp_path / "data", 40)
        with pytest.raises(TrainingError, match=r"data \(there .*pictures.*, now .*data\)"):
            cache.make(settings(train_data_dir=str(tmp_path / "data")))

    def test_more_workers_or_another_batch_are_no_other_settings(self, settings, finished):
        shard_path(Path(settings().output_dir), 0).unlink()
        cache.make(settings(dataloader_num_workers=1, batch_size=5))

    def test_leftovers_of_a_kill_are_removed(self, settings):
        out = Path(settings().output_dir)
        out.mkdir()
        for name in ("shard-00001.safetensors.tmp", ".tmpAbCdEf", "cache.json.tmp"):
            (out / name).write_bytes(b"half")
        cache.make(settings())
        assert not list(out.glob("*.tmp")) + list(out.glob(".tmp*"))

    def test_shards_of_nobody(self, settings, finished):
        (Path(settings().output_dir) / MANIFEST).unlink()
        with pytest.raises(TrainingError, match=r"holds shards without a cache\.json"):
            cache.make(settings())


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
