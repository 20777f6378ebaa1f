"""Rows with several captions: one is drawn for each sample."""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise

import datasets
import pyarrow as pa
import pytest
import torch
from pyarrow import parquet

from tests.support import image_folders
from training.data.buckets import square
from training.data.dataset import EveryCaption, RawDataset, collate
from training.data.randomness import NoiseSettings, sample_caption
from training.data.sources import Columns, open_source
from training.data.webdataset import ShardReader
from training.errors import TrainingError

KINDS = ("jsonl", "parquet", "json", "saved")
CAPTIONS = [["a cat", " a tabby\n", ""], ["a dog"], [], None, ["  ", None]]
EXPECTED = [("a cat", "a tabby"), ("a dog",), *[("none",)] * 3]
SETTINGS = NoiseSettings(3, 0.0, 0.0, 0.0, 1000, 0.0)


@pytest.fixture
def opened(tmp_path, arrow):
    def opened(captions, kind="jsonl", **options):
        """Write rows of these captions as one kind of data, and open them."""
        names = [f"{number}.png" for number in range(len(captions))]
        for number, name in enumerate(names):
            image_folders.image(number).save(tmp_path / name)
        rows = [
            {"file_name": name, "caption": text} for name, text in zip(names, captions, strict=True)
        ]
        path = tmp_path / f"metadata.{kind}"
        if kind == "saved":
            path = tmp_path / "saved"
            datasets.Dataset.from_list(rows).save_to_disk(str(path))
            options["image_root"] = tmp_path
        elif kind == "parquet":
            parquet.write_table(pa.Table.from_pylist(rows), path)
        else:
            lines = [json.dumps(row) for row in rows]
            path.write_text("\n".join(lines) if kind == "jsonl" else f"[{', '.join(lines)}]")
        return open_source(path, **options)

    return opened


def tokenise(text):
    return (torch.full((77,), len(text)),)


def preprocess(image):
    return torch.zeros(3, 4, 4)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_gives_the_same(kind, opened):
    source = opened(CAPTIONS, kind, default_caption="none")
    assert [source[row].texts for row in range(5)] == EXPECTED
    assert source[0].text == "a cat"
    assert source.several_captions
    with pytest.raises(TrainingError, match=r"3 of 5 pictures have no caption: 2\.png, 3\.png"):
        opened(CAPTIONS, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_lists_of_one_are_one(kind, opened):
    source = opened([["a cat"], ["a dog"]], kind)
    assert [source[row].texts for row in range(2)] == [("a cat",), ("a dog",)]
    assert not source.several_captions


def test_texts_and_lists_in_one_list(opened):
    source = opened(["a cat", ["a dog", 7]])
    assert [source[row].texts for row in range(2)] == [("a cat",), ("a dog", "7")]


def test_other_captions_are_other_data(opened):
    found = [opened([texts]) for texts in (["a"], ["a", "b"], ["b", "a"], ["ab"])]
    assert len({source.fingerprint for source in found}) == 4
    assert opened(["a"]).fingerprint == found[0].fingerprint  # a list of one says the same


def test_in_shards(tmp_path):
    png = image_folders.encoded(image_folders.image(0))

    def read(given, **options):
        files = {"0.png": png, "0.json": json.dumps({"text": given}).encode()}
        (record,) = ShardReader(**options).records(image_folders.shard(tmp_path / "a.tar", files))
        return record.broken or record.texts

    assert read(["a cat", " a tabby "]) == ("a cat", "a tabby")
    assert read("a cat") == ("a cat",)
    assert "no caption" in read([])
    assert "no caption" in read([""])
    assert read([], default_caption="none") == ("none",)
    assert read(["x", "y"], columns=Columns(text="text")) == ("x", "y")


def test_all_are_drawn_alike_and_anew_in_each_pass():
    samples = 9000
    drawn = [sample_caption(7, number, 3) for number in range(samples)]
    assert drawn == [sample_caption(7, number, 3) for number in range(samples)]
    assert drawn != [sample_caption(8, number, 3) for number in range(samples)]
    assert [sample_caption(7, n, 5) for n in range(8)] == [1, 3, 3, 4, 2, 2, 3, 2]  # for good
    counts = Counter(drawn)
    expected, deviation = samples / 3, (samples * 2 / 9) ** 0.5
    assert all(abs(counts[caption] - expected) < 4 * deviation for caption in range(3))
    # One row, pass after pass: what it was given says nothing of what it is given next.
    one_row = drawn[::40]
    assert len({*pairwise(one_row)}) == 9


def test_a_sample_has_the_tokens_of_its_caption(opened):
    source = opened([["a", "bb", "ccc"], ["dddd"]])
    rows = RawDataset(source, tokenise, preprocess, square(64), SETTINGS)
    found = [int(rows[number, 0]["tokens"][0][0]) for number in range(30)]
    assert found == [1 + sample_caption(SETTINGS.seed, number, 3) for number in range(30)]
    assert {*found} == {1, 2, 3}
    assert {int(rows[number, 1]["tokens"][0][0]) for number in range(30)} == {4}


def test_every_caption_for_a_cache(opened):
    source = opened([["a", "bb"], ["dddd"]])
    rows = EveryCaption(source, tokenise, preprocess, square(64), SETTINGS)
    batch = collate([rows[5, 1], rows[5, 0]])
    assert batch["tokens"][0][:, 0].tolist() == [4, 1, 2]
    assert batch["tokens"][0].shape == (3, 77)
    assert batch["captions"].tolist() == [1, 2]
    assert batch["pixels"].shape == (2, 3, 64, 64)
