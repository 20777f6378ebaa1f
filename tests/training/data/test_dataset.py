"""Examples and batches: right values, broken pictures of no weight, the same for any workers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torch.utils.data import Dataset
from torchvision.transforms.functional import pil_to_tensor

from tests.support import image_folders
from training.data.buckets import Buckets, square
from training.data.dataset import RawDataset, collate, loader
from training.data.image import fit, open_image
from training.data.randomness import NoiseSettings, sample_noise
from training.data.sampler import BucketBatchSampler, RankBatchSampler
from training.data.sources import Record

ROOT = Path(__file__).resolve().parents[3]
SETTINGS = NoiseSettings(
    seed=1, drop_image=0.3, drop_text=0.3, drop_both=0.1, timesteps=1000, noise_offset=0.1
)


def encoded(height, width, shade=128, **options):
    image = Image.linear_gradient("L").resize((width, height))
    return image_folders.encoded(ImageOps.colorize(image, "black", (shade, 50, 99)), **options)


def tokenise(text):
    return torch.full((77,), len(text)), torch.full((77,), 7)


def preprocess(image):
    assert image.mode == "RGB"
    return pil_to_tensor(image.resize((6, 6))).float() / 255


def dataset(*records, buckets=None):
    return RawDataset(records, tokenise, preprocess, buckets or square(64), SETTINGS)


def test_an_example():
    exif = Image.Exif()
    exif[0x0112] = 6  # turned: 200 high, 100 wide
    data = encoded(100, 200, exif=exif)
    example = dataset(Record("a", data, "four"))[99, 0]
    picture = open_image(data)
    assert torch.equal(example["pixels"], fit(picture, (64, 64)).pixels)
    assert torch.equal(example["reference"], preprocess(picture))
    assert [int(tokens[0]) for tokens in example["tokens"]] == [4, 7]
    assert example["time_ids"].tolist() == [200, 100, 32, 0, 64, 64]
    assert example["time_ids"].dtype == torch.float32
    assert (example["weight"], example["broken"]) == (1.0, "")
    expected = sample_noise(SETTINGS, 99, (8, 8))
    torch.testing.assert_close(example["draws"], expected, rtol=0, atol=0)


def test_buckets_decide_the_size():
    wide = Record("b", encoded(90, 190), "x")
    buckets = Buckets(((64, 64), (64, 128)), np.array([0, 1]))
    rows = dataset(Record("a", encoded(90, 90), "x"), wide, buckets=buckets)
    assert rows[0, 0]["pixels"].shape == (3, 64, 64)
    assert rows[0, 1]["pixels"].shape == (3, 64, 128)
    assert rows[0, 1]["draws"].noise.shape == (4, 8, 16)
    assert rows[0, 1]["time_ids"].tolist() == [90, 190, 0, 4, 64, 128]


def test_another_reference_picture():
    data, other = encoded(90, 90), encoded(40, 80, 255)
    example = dataset(Record("a", data, "x", other))[0, 0]
    assert torch.equal(example["reference"], preprocess(open_image(other)))
    assert torch.equal(example["pixels"], fit(open_image(data), (64, 64)).pixels)


@pytest.mark.parametrize(
    "record, said",
    [
        (Record("dir/a.jpg", b"damaged", "x"), "dir/a.jpg: cannot identify image file"),
        (Record("a.jpg", Path("/nowhere/a.jpg"), "x"), "a.jpg: there is no such file"),
        (
            Record("a.jpg", encoded(9, 9), "x", b"damaged"),
            "a.jpg: its reference picture: cannot identify image file",
        ),
        (Record("shard", b"", "", broken="cut short"), "shard: cut short"),
    ],
)
def test_broken_pictures_have_no_weight(record, said):
    rows = dataset(record, Record("good", encoded(90, 90), "x"))
    broken, good = rows[3, 0], rows[3, 1]
    assert broken["broken"] == said
    assert broken["weight"] == 0
    assert not broken["pixels"].any()
    assert not broken["reference"].any()
    assert broken.keys() == good.keys()
    batch = collate([broken, good])
    assert batch["weight"].tolist() == [0, 1]
    assert batch["broken"] == [said]
    assert torch.equal(broken["draws"].noise, good["draws"].noise)


def test_collate():
    rows = dataset(*(Record(str(n), encoded(80, 90 + n), "x" * n) for n in range(5)))
    batch = collate([rows[n + 10, n] for n in range(5)])
    shapes = {key: tuple(v.shape) for key, v in batch.items() if isinstance(v, torch.Tensor)}
    assert shapes == {
        "pixels": (5, 3, 64, 64),
        "reference": (5, 3, 6, 6),
        "time_ids": (5, 6),
        "weight": (5,),
        "timestep": (5,),
        "noise": (5, 4, 8, 8),
        "latent_noise": (5, 4, 8, 8),
        "drop_image": (5,),
        "drop_text": (5,),
    }
    assert [tokens.shape for tokens in batch["tokens"]] == [(5, 77), (5, 77)]
    assert batch["tokens"][0][:, 0].tolist() == [0, 1, 2, 3, 4]
    assert batch["timestep"].dtype == torch.int64
    assert batch["drop_image"].dtype == batch["drop_text"].dtype == torch.bool
    assert batch["weight"].dtype == torch.float32
    assert batch["broken"] == []
    drawn = [sample_noise(SETTINGS, n + 10, (8, 8)) for n in range(5)]
    assert batch["timestep"].tolist() == [one.timestep for one in drawn]
    assert batch["drop_text"].tolist() == [one.drop_text for one in drawn]


TEN = [Record(f"p{n}", encoded(70 + n, 90 - n, 20 * n), f"text {n}" * n) for n in range(10)]


def batches(workers, count=8, first_step=0):
    order = RankBatchSampler(BucketBatchSampler(None, 10, 4, seed=2), first_step=first_step)
    return list(islice(loader(dataset(*TEN), order, workers), count))


@pytest.fixture(scope="module")
def straight():
    return batches(workers=0)


@pytest.mark.parametrize(
    "workers, first_step",
    [(0, 3), (2, 0), (2, 3), *(pytest.param(n, 0, marks=pytest.mark.nightly) for n in (1, 3))],
)
def test_workers_and_where_it_begins_change_nothing(workers, first_step, straight):
    found = batches(workers, 8 - first_step, first_step)
    torch.testing.assert_close(found, straight[first_step:], rtol=0, atol=0)


class Inside(Dataset):
    """What a worker sees of itself."""

    def __getitem__(self, index):
        return {"pid": os.getpid(), "threads": torch.get_num_threads()}


@pytest.fixture
def interruptible():
    # A shell that starts tests in its background has SIGINT ignored by all of them.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_workers_use_one_thread_and_outlive_signals(interruptible):
    found = iter(loader(Inside(), RankBatchSampler(BucketBatchSampler(None, 10, 1, 0)), 2))
    first = [next(found) for _ in range(2)]
    assert [int(one["threads"]) for one in first] == [1, 1]
    workers = {int(one["pid"]) for one in first}
    assert len(workers) == 2
    for worker in workers:
        os.kill(worker, signal.SIGTERM)
        os.kill(worker, signal.SIGINT)
    time.sleep(0.2)
    assert {int(next(found)["pid"]) for _ in range(10)} == workers


@pytest.mark.parametrize("end", ["pass", pytest.param("sys.exit(0)", marks=pytest.mark.nightly)])
def test_the_end_of_training_waits_for_no_worker(end):
    code = f"""
import sys, torch
from training.data.dataset import loader
from training.data.sampler import BucketBatchSampler, RankBatchSampler
class Ones(torch.utils.data.Dataset):
    def __getitem__(self, index):
        return {{"one": 1}}
found = iter(loader(Ones(), RankBatchSampler(BucketBatchSampler(None, 10, 1, 0)), 2))
next(found)
{end}
"""
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=50
    )
    assert (result.returncode, result.stderr) == (0, "")


def test_memory_is_pinned_for_cuda(monkeypatch):
    for there in (True, False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert loader(Inside(), None, 0).pin_memory is there


def test_errors_of_others_are_no_broken_pictures():
    def fails(text):
        raise RuntimeError("no such vocabulary")

    rows = RawDataset(TEN, fails, preprocess, square(64), SETTINGS)
    with pytest.raises(RuntimeError, match="no such vocabulary"):
        rows[0, 0]
