"""Rows of a cache come back as they were stored, fast, and out of no cache but the right one."""

from __future__ import annotations

import json
import pickle

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from training.caching.dataset import CachedDataset
from training.caching.format import (
    DROPPED,
    MANIFEST,
    Manifest,
    is_whole,
    open_tensors,
    read_manifest,
    shard_path,
    write_manifest,
    write_tensors,
)
from training.data.dataset import collate, loader
from training.data.randomness import NoiseSettings, sample_noise
from training.data.sampler import RankBatchSampler
from training.errors import TrainingError

EMBEDS, HIDDEN = "image_embeds", "penultimate_hidden_states"
DRAWS = NoiseSettings(3, 0.1, 0.1, 0.1, 1000, 0.05)
SIZES = ((64, 64), (64, 128), (128, 64))


def values(row, name, shape):
    generator = torch.Generator().manual_seed(hash((row, name)) % 2**31)
    return torch.randn(shape, generator=generator).half()


def row_of(row, bucket, pooled):
    """What the cache holds of a row; every number of it tells which."""
    height, width = (side // 8 for side in SIZES[bucket])
    found = {
        "mean": values(row, "mean", (4, height, width)),
        "log_variance": values(row, "log_variance", (4, height, width)),
        "states": values(row, "states", (77, 6)),
        EMBEDS: values(row, EMBEDS, (10,)),
        HIDDEN: values(row, HIDDEN, (5, 7)),
        "time_ids": torch.arange(6.0) + row,
    }
    return found | ({"pooled": values(row, "pooled", (3,))} if pooled else {})


def write(folder, rows=23, shard_rows=8, buckets=None, pooled=False, broken=(), **changes):
    """A cache as writer.py makes it, of tensors made up for each row."""
    folder.mkdir(exist_ok=True)
    of_row = np.zeros(rows, np.int16) if buckets is None else np.array(buckets, np.int16)
    about = {
        "rows": rows,
        "shard_rows": shard_rows,
        "features": (EMBEDS, HIDDEN),
        "dtype": "float16",
        "sizes": SIZES[: of_row.max() + 1],
        "parts": {"vae": "a1", "text encoder": "b2", "image encoder": "c3", "data": "d4"},
        "names": {"vae": "base", "text encoder": "base", "image encoder": "clip", "data": "x"},
    }
    manifest = Manifest(**(about | changes))
    for shard in range(manifest.shards):
        sound = np.array([r for r in manifest.rows_of(shard) if r not in broken], np.int64)
        tensors = {"row": torch.from_numpy(sound), "bucket": torch.from_numpy(of_row[sound])}
        parts = {}
        for row in sound[np.argsort(of_row[sound], kind="stable")]:
            for name, value in row_of(int(row), of_row[row], pooled).items():
                if name in ("mean", "log_variance"):
                    name += f".{value.shape[1]}x{value.shape[2]}"
                parts.setdefault(name, []).append(value)
        tensors |= {name: torch.stack(part) for name, part in parts.items()}
        names = [f"{r}.png: bad" for r in manifest.rows_of(shard) if r in broken]
        write_tensors(shard_path(folder, shard), tensors, {"broken": names})
    dropped = {EMBEDS: torch.zeros(1, 10), HIDDEN: torch.ones(1, 5, 7)}
    dropped["states"] = torch.full((1, 77, 6), 2.0)
    write_tensors(folder / DROPPED, dropped | ({"pooled": torch.ones(1, 3)} if pooled else {}), {})
    write_manifest(folder, manifest)
    return manifest


def check_row(example, number, row, bucket, kind, pooled=False):
    expected = row_of(row, bucket, pooled)
    expected["features"] = expected[kind]
    for name in ("mean", "log_variance", "states", "features", "time_ids", "pooled"):
        if name in expected:
            assert torch.equal(example[name], expected[name]), name
    draws = sample_noise(DRAWS, number, tuple(expected["mean"].shape[1:]))
    assert torch.equal(example["draws"].noise, draws.noise)
    assert (example["weight"], example["broken"]) == (1.0, "")


class TestRows:
    @pytest.mark.parametrize("kind", [EMBEDS, HIDDEN])
    def test_each_is_what_was_stored(self, kind, tmp_path):
        write(tmp_path)
        dataset = CachedDataset(tmp_path, kind, DRAWS)
        assert len(dataset) == 23
        assert dataset.buckets.of_row is None
        for row in range(23):
            example = dataset[100 + row, row]
            check_row(example, 100 + row, row, 0, kind)
            assert "pooled" not in example

    def test_of_several_sizes_in_one_shard(self, tmp_path):
        buckets = np.random.default_rng(0).integers(0, 3, 23)
        write(tmp_path, buckets=buckets, pooled=True)
        dataset = CachedDataset(tmp_path, EMBEDS, DRAWS)
        assert dataset.buckets.sizes == SIZES
        assert dataset.buckets.of_row.tolist() == buckets.tolist()
        for row in range(23):
            check_row(dataset[row, row], row, row, buckets[row], EMBEDS, pooled=True)

    def test_broken_ones_are_left_out_and_named(self, tmp_path):
        buckets = np.random.default_rng(1).integers(0, 2, 23)
        broken = (0, 5, *range(8, 16), 22)  # the second shard whole
        write(tmp_path, buckets=buckets, broken=broken)
        dataset = CachedDataset(tmp_path, EMBEDS, DRAWS)
        assert dataset.broken == [f"{row}.png: bad" for row in broken]
        left = [row for row in range(23) if row not in broken]
        assert len(dataset) == len(left)
        for place, row in enumerate(left):
            check_row(dataset[7, place], 7, row, buckets[row], EMBEDS)

    def test_outside_there_is_nothing(self, tmp_path):
        write(tmp_path)
        dataset = CachedDataset(tmp_path, EMBEDS, DRAWS)
        for row in (-1, 23):
            with pytest.raises(IndexError):
                dataset[0, row]

    def test_bfloat16(self, tmp_path):
        manifest = write(tmp_path, rows=3)
        path = shard_path(tmp_path, 0)
        tensors = {
            k: v.bfloat16() if v.dtype == torch.half else v for k, v in load_file(path).items()
        }
        write_tensors(path, tensors, {"broken": []})
        assert manifest.shards == 1
        example = CachedDataset(tmp_path, HIDDEN, DRAWS)[0, 1]
        assert torch.equal(example["features"], values(1, HIDDEN, (5, 7)).bfloat16())

    def test_what_stands_in_for_dropped_conditions(self, tmp_path):
        write(tmp_path, pooled=True)
        dataset = CachedDataset(tmp_path, HIDDEN, DRAWS)
        dropped = dataset.dropped()
        assert torch.equal(dropped.features, torch.ones(1, 5, 7))
        assert torch.equal(dropped.states, torch.full((1, 77, 6), 2.0))
        assert torch.equal(dropped.pooled, torch.ones(1, 3))
        assert dataset.dropped().features.shape[-1] == 7

    @pytest.mark.parametrize("workers", [0, 2])
    def test_batches_of_an_epoch(self, workers, tmp_path):
        buckets = np.arange(48) % 3
        write(tmp_path, rows=48, buckets=buckets)
        dataset = CachedDataset(tmp_path, EMBEDS, DRAWS)
        order = dataset.buckets.sampler(len(dataset), 4, seed=1)
        batches = iter(loader(dataset, RankBatchSampler(order), workers))
        seen = []
        for step in range(order.steps_per_epoch):
            batch, (numbers, rows) = next(batches), order.batch(step)
            expected = collate([dataset[index] for index in zip(numbers, rows, strict=True)])
            for key in ("mean", "features", "noise", "drop_image", "weight"):
                assert torch.equal(batch[key], expected[key])
            seen += (batch["time_ids"][:, 0]).tolist()
        assert sorted(seen) == list(range(48))

    def test_it_goes_to_other_processes(self, tmp_path):
        write(tmp_path)
        dataset = CachedDataset(tmp_path, EMBEDS, DRAWS)
        dataset[0, 3]
        check_row(pickle.loads(pickle.dumps(dataset))[0, 20], 0, 20, 0, EMBEDS)


class TestMemory:
    def test_reading_everything_keeps_nothing(self, tmp_path):
        """Memory-mapped pages would stay: 200 MiB of them."""
        write(tmp_path, rows=4, shard_rows=1)
        index = torch.zeros(1, dtype=torch.int64)
        big = {"row": index, "bucket": index.short()}
        for shard in range(4):
            tensors = load_file(shard_path(tmp_path, shard)) | big
            tensors[HIDDEN] = torch.zeros(1, 257, 102_000, dtype=torch.half)
            write_tensors(shard_path(tmp_path, shard), tensors, {"broken": []})
        dataset = CachedDataset(tmp_path, HIDDEN, DRAWS)
        dataset[0, 0]
        process = psutil.Process()
        before = process.memory_info().rss
        for row in range(4):
            dataset[0, row]
        assert process.memory_info().rss - before < 2**20 * 20


class TestRefused:
    def test_no_cache(self, tmp_path):
        for folder in (tmp_path, tmp_path / "nowhere"):
            with pytest.raises(TrainingError, match=r"There is no cache in.*training/cache\.py"):
                CachedDataset(folder, EMBEDS, DRAWS)

    def test_of_another_encoder(self, tmp_path):
        manifest = write(tmp_path)
        CachedDataset(tmp_path, EMBEDS, DRAWS, manifest.parts)
        CachedDataset(tmp_path, EMBEDS, DRAWS, {"vae": "a1"})
        with pytest.raises(TrainingError) as error:
            CachedDataset(
                tmp_path,
                EMBEDS,
                DRAWS,
                {**manifest.parts, "image encoder": "other"},
                {"image encoder": "open_clip:ViT-H-14/laion2b_s32b_b79k"},
            )
        said = str(error.value)
        assert "image encoder: the cache's is 'clip' (c3)" in said
        assert "this run's is 'open_clip:ViT-H-14/laion2b_s32b_b79k' (other)" in said
        assert "vae" not in said

    def test_without_the_kind_of_features(self, tmp_path):
        write(tmp_path, features=(EMBEDS,))
        with pytest.raises(TrainingError, match=f"holds image_embeds, but.*--features {HIDDEN}"):
            CachedDataset(tmp_path, HIDDEN, DRAWS)

    def test_not_complete(self, tmp_path):
        write(tmp_path)
        shard_path(tmp_path, 1).unlink()
        with pytest.raises(TrainingError, match=r"1 of 3 shards are missing, number 1.*again"):
            CachedDataset(tmp_path, EMBEDS, DRAWS)

    @pytest.mark.parametrize("length", [0, 4, 100, -1])
    def test_a_shard_cut_short(self, length, tmp_path):
        write(tmp_path)
        path = shard_path(tmp_path, 2)
        path.write_bytes(path.read_bytes()[:length])
        assert not is_whole(path)
        with pytest.raises(TrainingError, match=r"shard-00002.*cannot be read.*again"):
            CachedDataset(tmp_path, EMBEDS, DRAWS)

    def test_a_shard_cut_short_while_training(self, tmp_path):
        write(tmp_path)
        dataset = CachedDataset(tmp_path, EMBEDS, DRAWS)
        dataset[0, 0]
        path = shard_path(tmp_path, 0)
        path.write_bytes(path.read_bytes()[:1000])
        with pytest.raises(TrainingError, match=r"shard-00000.*cannot be read"):
            [dataset[0, row] for row in range(8)]
        path.unlink()
        with pytest.raises(TrainingError, match="No such file"):
            dataset[0, 0]

    def test_nothing_but_broken_pictures(self, tmp_path):
        write(tmp_path, rows=3, broken=(0, 1, 2))
        with pytest.raises(TrainingError, match=r"none of its 3 pictures.*0\.png: bad"):
            CachedDataset(tmp_path, EMBEDS, DRAWS)

    def test_written_by_another_version(self, tmp_path):
        write(tmp_path, format=2)
        with pytest.raises(TrainingError, match="format 2, this version reads 1"):
            CachedDataset(tmp_path, EMBEDS, DRAWS)

    @pytest.mark.parametrize("text", ["", "[]", '{"format": 1}', "{"])
    def test_a_manifest_that_is_none(self, text, tmp_path):
        (tmp_path / MANIFEST).write_text(text)
        with pytest.raises(TrainingError, match="no description of a cache"):
            CachedDataset(tmp_path, EMBEDS, DRAWS)


class TestFiles:
    def test_a_manifest_comes_back(self, tmp_path):
        manifest = write(tmp_path, buckets=np.arange(23) % 3)
        assert read_manifest(tmp_path) == manifest
        assert json.loads((tmp_path / MANIFEST).read_text())["parts"]["vae"] == "a1"

    def test_equal_tensors_give_equal_bytes(self, tmp_path):
        tensors = {name: torch.arange(5) for name in "edcba"}
        write_tensors(tmp_path / "a", tensors, {"broken": ["é"], "x": 1})
        write_tensors(tmp_path / "b", dict(sorted(tensors.items())), {"x": 1, "broken": ["é"]})
        assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
        with open_tensors(tmp_path / "a") as (_, about):
            assert about == {"broken": ["é"], "x": 1}

    def test_others_may_read_what_they_may_read_elsewhere(self, tmp_path):
        (tmp_path / "plain").touch()
        write_tensors(tmp_path / "tensors", {"a": torch.zeros(1)}, {})
        assert (tmp_path / "tensors").stat().st_mode == (tmp_path / "plain").stat().st_mode

    def test_a_file_of_somebody_else_is_not_whole(self, tmp_path):
        save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
        assert not is_whole(tmp_path / "other.safetensors")
        assert not is_whole(tmp_path / "nowhere")
