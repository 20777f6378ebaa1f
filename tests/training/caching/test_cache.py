"""A cache holds what the encoders give, however it was interrupted and whoever wrote it."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from filelock import FileLock
from tqdm import tqdm

from ip_adapter_core.variants import FEATURE_KINDS
from tests.support import image_folders, small_models
from training import cache
from training.caching import writer as cache_writing
from training.caching.dataset import CachedDataset
from training.caching.format import Manifest, is_whole, open_tensors, shard_path
from training.config import parse
from training.data.buckets import square
from training.data.dataset import RawDataset, collate
from training.data.sources import Record, open_source
from training.errors import TrainingError
from training.models.base import load_encoders
from training.models.frozen import FrozenEncoders, text_states
from training.models.image_encoder import ImageEncoder

resource = pytest.importorskip("resource", reason="limits of a POSIX system")

EMBEDS, HIDDEN = FEATURE_KINDS
ROOT = Path(cache.__file__).parents[1]

pytestmark = pytest.mark.usefixtures("arrow", "accelerate_anew")


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.name != ".lock"}


def encoders_of(settings, kind=EMBEDS):
    encoder = ImageEncoder.from_name(settings.image_encoder_path)
    return FrozenEncoders(load_encoders(settings.pretrained_model_name_or_path), encoder, kind)


def close(found, expected):
    return float((found.float() - expected).norm() / expected.norm()) < 1e-3  # half's precision


class TestContent:
    @pytest.mark.parametrize("family", ["sd15", "sdxl"])
    def test_rows_are_what_the_encoders_give(self, family, settings):
        given = settings(family)
        dataset = cache.make(given)
        assert len(dataset) == 40
        for kind in FEATURE_KINDS:
            encoders = encoders_of(given, kind)
            raw = RawDataset(
                open_source(given.train_data_dir),
                encoders.tokenise,
                encoders.image_encoder.preprocess,
                square(64),
                cache.NO_DRAWS,
            )
            rows = CachedDataset(given.output_dir, kind, cache.NO_DRAWS, encoders.fingerprints)
            for row in (0, 7, 8, 39):
                expected = encoders.encode(collate([raw[5, row]]))
                found = collate([rows[5, row]])
                assert set(found) == set(expected)
                for name in ("mean", "log_variance", "states", "features", "pooled"):
                    if name in expected:
                        assert found[name].dtype == torch.float16
                        assert close(found[name], expected[name]), name
                assert torch.equal(found["time_ids"], expected["time_ids"])
                assert torch.equal(found["noise"], expected["noise"])
            dropped, expected = rows.dropped(), encoders.dropped()
            assert close(dropped.states, expected.states)
            if kind == HIDDEN:
                assert close(dropped.features, expected.features)
            else:
                assert not dropped.features.any()
            assert (dropped.pooled is None) == (family == "sd15")

    def test_of_buckets(self, settings, tmp_path):
        data = tmp_path / "data"
        image_folders.with_metadata(data, 30, sizes=((80, 80), (160, 80), (80, 160)), broken=2)
        dataset = cache.make(
            settings(train_data_dir=str(data), enable_bucket=True, resolution=192, rows_per_shard=7)
        )
        left = range(2, 30)
        assert len(dataset) == len(left)
        encoders = encoders_of(settings())
        shapes = set()
        for place, row in enumerate(left):
            found = dataset[0, place]
            height, width = dataset.buckets.size_of(place)
            shapes.add((height, width))
            assert found["mean"].shape == (4, height // 8, width // 8)
            assert found["time_ids"][4:].tolist() == [height, width]
            tokens = [ids[None] for ids in encoders.tokenise(f"picture number {row}")]
            states, _ = text_states(encoders.text, tokens)
            assert close(found["states"], states[0])
        assert len(shapes) == 3

    def test_one_kind_of_features_only(self, settings):
        cache.make(settings(features=HIDDEN))
        with open_tensors(shard_path(Path(settings().output_dir), 0)) as (file, _):
            assert HIDDEN in file.keys()  # noqa: SIM118
            assert EMBEDS not in file.keys()  # noqa: SIM118

    def test_encoders_of_another_precision_are_the_same_encoders(self, settings):
        given = settings(dtype="bfloat16", cache_dtype="bfloat16")
        cache.make(given)
        rows = CachedDataset(
            given.output_dir, EMBEDS, cache.NO_DRAWS, encoders_of(given).fingerprints
        )
        assert rows[0, 0]["mean"].dtype == torch.bfloat16

    def test_broken_pictures_are_left_out_and_named(self, settings, tmp_path, caplog):
        image_folders.with_metadata(tmp_path / "data", 30, broken=9)
        arguments = ["--train_data_dir", str(tmp_path / "data")]
        with caplog.at_level(logging.INFO):
            cache.main([*small_models.command(settings()), *arguments])
        dataset = CachedDataset(settings().output_dir, EMBEDS, cache.NO_DRAWS)
        assert len(dataset) == 21
        assert "9 images could not be read and are left out: 0000.png: " in caplog.text
        assert "0004.png" in caplog.text
        assert "0005.png" not in caplog.text
        assert "21 rows" in caplog.text

    def test_nothing_but_broken_pictures(self, settings, tmp_path):
        image_folders.with_metadata(tmp_path / "data", 3, broken=3)
        with pytest.raises(TrainingError, match="none of its 3 pictures"):
            cache.make(settings(train_data_dir=str(tmp_path / "data")))

    def test_numbers_that_the_dtype_cannot_hold(self, settings, monkeypatch):
        outputs = FrozenEncoders.outputs

        def overflowing(self, batch, kinds):
            found = outputs(self, batch, kinds)
            if overflowing.calls == 4:  # three batches a shard of eight rows
                found["log_variance"][1, 0, 0, 0] = 70_000.0
            overflowing.calls += 1
            return found

        overflowing.calls = 0
        monkeypatch.setattr(FrozenEncoders, "outputs", overflowing)
        with pytest.raises(
            TrainingError, match=r"log variance of row 12 became.*float16.*bfloat16"
        ):
            cache.make(settings())
        shards = sorted(path.name for path in Path(settings().output_dir).glob("shard-*"))
        assert shards == ["shard-00000.safetensors"]
        overflowing.calls = 0
        cache.make(settings(cache_dtype="bfloat16", output_dir=settings().output_dir + "2"))


class Shaped:
    """Encoders of SD1.5 and ViT-H/14 as far as shapes go."""

    def outputs(self, batch, kinds):
        rows = len(batch["weight"])
        shapes = {
            "mean": (4, 64, 64),
            "log_variance": (4, 64, 64),
            "states": (77, 768),
            EMBEDS: (1024,),
            HIDDEN: (257, 1280),
        }
        return {
            k: torch.zeros(rows, *s)
            for k, s in shapes.items()
            if k not in FEATURE_KINDS or k in kinds
        }


class Rows:
    fingerprint = "x"

    def __init__(self, picture, rows):
        self._picture, self._rows = picture, rows

    def __len__(self):
        return self._rows

    def __getitem__(self, row):
        return Record(str(row), self._picture, "")


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [((EMBEDS,), 65_536 + 118_272 + 2_048), (FEATURE_KINDS, 65_536 + 118_272 + 659_968)],
)
def test_bytes_of_a_sample_of_sd15(kinds, expected, tmp_path, pictures):
    tokens = (torch.zeros(77, dtype=torch.int64),)
    source = Rows(pictures / "00.png", 16)
    dataset = RawDataset(
        source, lambda _: tokens, lambda _: torch.zeros(1), square(512), cache.NO_DRAWS
    )
    manifest = Manifest(16, 16, kinds, "float16", ((512, 512),), {}, {})
    with tqdm(disable=True) as bar:
        cache_writing.write_shards(dataset, Shaped(), tmp_path, manifest, [0], 8, 0, bar)
    found = shard_path(tmp_path, 0).stat().st_size / 16
    assert expected < found < expected + 200


class TestCannotWrite:
    def test_below_a_file(self, settings, tmp_path):
        (tmp_path / "file").touch()
        with pytest.raises(TrainingError, match=r"Nothing can be written to.*--output_dir"):
            cache.make(settings(output_dir=str(tmp_path / "file" / "cache")))

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
    def test_a_folder_of_others(self, settings, tmp_path):
        (tmp_path / "locked").mkdir(mode=0o500)
        with pytest.raises(TrainingError, match=r"Nothing can be written to.*--output_dir"):
            cache.make(settings(output_dir=str(tmp_path / "locked")))

    def test_it_is_told_before_any_model_is_read(self, settings, tmp_path, monkeypatch):
        def never(*_):
            raise AssertionError("a model was read")

        monkeypatch.setattr(cache, "load_encoders", never)
        (tmp_path / "file").touch()
        with pytest.raises(TrainingError, match="Nothing can be written"):
            cache.make(settings(output_dir=str(tmp_path / "file")))

    def test_while_another_writes_there(self, settings):
        Path(settings().output_dir).mkdir()
        said = pytest.raises(TrainingError, match=r"Another cache\.py is writing")
        with FileLock(Path(settings().output_dir) / ".lock"), said:
            cache.make(settings())
        cache.make(settings())

    def test_a_full_disk(self, settings):
        """A limit on a file's size stands for it: the write fails half-way all the same."""
        given = settings()
        out = Path(given.output_dir)
        cache.make(given)
        expected = contents(out)
        for shard in (1, 3):
            shard_path(out, shard).unlink()
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        try:
            with pytest.raises(TrainingError, match=r"shard-00001.*File too large.*same command"):
                cache.make(given)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        left = contents(out)
        assert set(left) == set(expected) - {"shard-00001.safetensors", "shard-00003.safetensors"}
        assert all(is_whole(path) for path in out.glob("shard-*"))
        cache.make(given)
        assert contents(out) == expected

    def test_what_will_not_suffice_is_told_after_the_first_shard(
        self, settings, monkeypatch, caplog
    ):
        usage = SimpleNamespace(free=1000)
        monkeypatch.setattr(cache_writing.shutil, "disk_usage", lambda _: usage)
        cache.make(settings())
        assert "will not suffice" in caplog.text


def parsed(arguments):
    return parse(cache.CacheConfig, "cache.py", arguments)


class TestCommandLine:
    def test_a_file_of_settings_and_the_command_line_over_it(self, settings, tmp_path):
        config = tmp_path / "cache.yaml"
        config.write_text(json.dumps({**vars(settings()), "rows_per_shard": 5}))
        found = parsed(["--config", str(config), "--batch_size", "2"])
        assert (found.rows_per_shard, found.batch_size) == (5, 2)
        assert found.pretrained_model_name_or_path == settings().pretrained_model_name_or_path
        assert parsed(small_models.command(settings())) == settings()

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (["--rows_per_shard", "0"], "rows_per_shard is 0; expected at least 1"),
            (["--features", "hidden"], "features"),
            (["--nonsense", "1"], "nonsense"),
        ],
    )
    def test_a_value_that_cannot_be(self, arguments, said, settings, capsys):
        with pytest.raises(SystemExit) as error:
            parsed([*small_models.command(settings()), *arguments])
        assert error.value.code == 2
        assert said in capsys.readouterr().err

    def test_errors_are_messages(self, settings):
        with pytest.raises(SystemExit, match=r"cache\.py: There is no '/nowhere'"):
            cache.main([*small_models.command(settings()), "--train_data_dir", "/nowhere"])

    def test_shards_to_stream_are_refused(self, settings):
        with pytest.raises(TrainingError, match="WebDataset shards"):
            cache.make(settings(train_data_dir="shards/{000..009}.tar"))


def test_batches_stay_in_their_shard_and_bucket():
    of_row = np.array([0, 1, 0, 1, 1, 0, 0, 0, 1], np.int16)
    shards = range(5, 9), range(5)
    batches = (x for rows in shards for x in cache_writing._batches(np.array(rows), of_row, 2))
    found = [batch.tolist() for batch in batches]
    assert found == [[5, 6], [7], [8], [0, 2], [1, 3], [4]]
