"""Rows of a cache come back fast, and out of no cache but the right one."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from ip_adapter_core.variants import FEATURE_KINDS
from training.cache import NO_DRAWS
from training.caching.dataset import CachedDataset
from training.caching.format import (
    MANIFEST,
    is_whole,
    open_tensors,
    read_manifest,
    shard_path,
    write_manifest,
    write_tensors,
)
from training.data.dataset import collate, loader
from training.data.sampler import RankBatchSampler
from training.errors import TrainingError

EMBEDS, HIDDEN = FEATURE_KINDS


@pytest.fixture
def folder(finished):
    """Holds a cache of 40 rows in 5 shards."""
    return Path(finished.output_dir)


def opened(folder, kind=EMBEDS, *parts):
    return CachedDataset(folder, kind, NO_DRAWS, *parts)


class TestRows:
    @pytest.mark.parametrize("workers", [0, 2])
    def test_batches_of_an_epoch(self, workers, folder):
        dataset = opened(folder)
        order = dataset.buckets.sampler(len(dataset), 4, seed=1)
        batches = iter(loader(dataset, RankBatchSampler(order), workers))
        seen = []
        for step in range(order.steps_per_epoch):
            numbers, rows = order.batch(step)
            expected = collate([dataset[index] for index in zip(numbers, rows, strict=True)])
            torch.testing.assert_close(next(batches), expected, rtol=0, atol=0)
            seen += rows.tolist()
        assert sorted(seen) == list(range(40))

    def test_outside_there_is_nothing(self, folder):
        dataset = opened(folder)
        for row in (-1, 40):
            with pytest.raises(IndexError):
                dataset[0, row]

    def test_it_goes_to_other_processes(self, folder):
        dataset = opened(folder)
        sent = pickle.loads(pickle.dumps(dataset))
        found, expected = collate([sent[0, 20]]), collate([dataset[0, 20]])
        torch.testing.assert_close(found, expected, rtol=0, atol=0)

    def test_reading_everything_keeps_nothing(self, folder):
        """Memory-mapped pages would stay: 200 MiB of them."""
        for shard in range(4):
            path = shard_path(folder, shard)
            features = torch.zeros(8, 257, 12_800, dtype=torch.half)
            write_tensors(path, load_file(path) | {HIDDEN: features}, {"broken": []})
        dataset = opened(folder, HIDDEN)
        dataset[0, 0]
        process = psutil.Process()
        before = process.memory_info().rss
        for row in range(32):
            dataset[0, row]
        assert process.memory_info().rss - before < 2**20 * 20


class TestRefused:
    def test_no_cache(self, tmp_path):
        for folder in (tmp_path, tmp_path / "nowhere"):
            with pytest.raises(TrainingError, match=r"There is no cache in.*training/cache\.py"):
                opened(folder)

    def test_of_another_encoder(self, folder):
        manifest = read_manifest(folder)
        opened(folder, EMBEDS, manifest.parts)
        opened(folder, EMBEDS, {"vae": manifest.parts["vae"]})
        other = {**manifest.parts, "image encoder": "other"}
        with pytest.raises(TrainingError) as error:
            opened(folder, EMBEDS, other, {"image encoder": "open_clip:ViT-H-14/laion2b_s32b_b79k"})
        name, value = manifest.names["image encoder"], manifest.parts["image encoder"]
        said = str(error.value)
        assert f"image encoder: the cache's is '{name}' ({value[:8]})" in said
        assert "this run's is 'open_clip:ViT-H-14/laion2b_s32b_b79k' (other)" in said
        assert "vae" not in said

    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"features": (EMBEDS,)}, f"holds image_embeds, but.*--features {HIDDEN}"),
            ({"format": 3}, "format 3, this version reads 1 and 2"),
        ],
    )
    def test_of_another_kind(self, changes, said, folder):
        write_manifest(folder, replace(read_manifest(folder), **changes))
        with pytest.raises(TrainingError, match=said):
            opened(folder, HIDDEN)

    def test_not_complete(self, folder):
        shard_path(folder, 1).unlink()
        with pytest.raises(TrainingError, match=r"1 of 5 shards are missing, number 1.*again"):
            opened(folder)

    @pytest.mark.parametrize("length", [0, 4, 100, -1])
    def test_a_shard_cut_short(self, length, folder):
        path = shard_path(folder, 2)
        path.write_bytes(path.read_bytes()[:length])
        assert not is_whole(path)
        with pytest.raises(TrainingError, match=r"shard-00002.*cannot be read.*again"):
            opened(folder)

    def test_a_shard_cut_short_while_training(self, folder):
        dataset = opened(folder)
        dataset[0, 0]
        path = shard_path(folder, 0)
        path.write_bytes(path.read_bytes()[:1000])
        with pytest.raises(TrainingError, match=r"shard-00000.*cannot be read"):
            [dataset[0, row] for row in range(8)]
        path.unlink()
        with pytest.raises(TrainingError, match="No such file"):
            dataset[0, 0]

    @pytest.mark.parametrize("text", ["", "[]", '{"format": 1}', "{"])
    def test_a_manifest_that_is_none(self, text, tmp_path):
        (tmp_path / MANIFEST).write_text(text)
        with pytest.raises(TrainingError, match="no description of a cache"):
            opened(tmp_path)


class TestFiles:
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
