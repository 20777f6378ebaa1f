"""Folders that `datasets` wrote."""

from __future__ import annotations

import pickle

import datasets
import numpy as np
import pytest
from PIL import Image

from tests.support import image_folders
from training.data.image import open_image
from training.data.sources import Columns, open_source
from training.errors import TrainingError


def picture(colour):
    return Image.new("RGB", (8, 8), colour)


def encoded(colour):
    return image_folders.encoded(picture(colour))


COLOURS = ["red", "lime", "blue", "white"]
TEXTS = [f"a {colour} square" for colour in COLOURS]


@pytest.fixture
def saved(tmp_path):
    def saved(rows, split=None, features=None):
        dataset = datasets.Dataset.from_dict(rows, features=features)
        whole = datasets.DatasetDict({split: dataset}) if split else dataset
        whole.save_to_disk(str(tmp_path / "saved"))
        return tmp_path / "saved"

    return saved


def refused(path, **options):
    with pytest.raises(TrainingError) as error:
        open_source(path, **options)
    return str(error.value)


def colours(source):
    return [
        open_image(source[row].image).getpixel((0, 0))
        == open_image(picture(colour)).getpixel((0, 0))
        for row, colour in enumerate(COLOURS)
    ]


FEATURES = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})


def test_image_features(saved):
    path = saved({"image": list(map(picture, COLOURS)), "text": TEXTS}, features=FEATURES)
    source = open_source(path)
    assert len(source) == 4
    assert [source[row].text for row in range(4)] == TEXTS
    assert isinstance(source[0].image, bytes)  # nothing is decoded here
    assert source[0].name == "row 0"
    assert all(colours(source))
    assert source[1].reference is None
    assert not source.sizes().any()


def test_broken_bytes_are_not_looked_at(saved):
    rows = {"image": [{"bytes": b"broken", "path": "some/where.jpg"}], "text": ["x"]}
    source = open_source(saved(rows, features=FEATURES))
    assert source[0].image == b"broken"
    assert source[0].name == "row 0 (where.jpg)"


def test_encoded_bytes_and_paths(saved, tmp_path):
    path = saved({"image": list(map(encoded, COLOURS)), "text": TEXTS})
    assert all(colours(open_source(path)))
    for colour in COLOURS:
        picture(colour).save(tmp_path / f"{colour}.png")
    paths = {"file": [f"{colour}.png" for colour in COLOURS], "caption": TEXTS}
    path = saved(paths)
    assert all(colours(open_source(path, image_root=tmp_path)))
    assert open_source(path)[0].image == path / "red.png"
    assert open_source(path)[0].name == "red.png"


def test_references_sizes_and_names(saved):
    features = datasets.Features(
        {
            "height": datasets.Value("int64"),
            "Bild": datasets.Image(),
            "Vorbild": datasets.Image(),
            "Titel": datasets.Value("string"),
            "width": datasets.Value("int64"),
        }
    )
    rows = {
        "Bild": list(map(picture, COLOURS)),
        "Vorbild": [picture("black"), None, picture("black"), None],
        "Titel": TEXTS,
        "height": [8, 16, None, -1],
        "width": [9, 17, 8, 25],
    }
    source = open_source(
        saved(rows, features=features), columns=Columns("Bild", "Titel", "Vorbild")
    )
    assert open_image(source[0].reference).getpixel((0, 0)) == (0, 0, 0)
    assert source[1].reference is None
    assert source[3].text == TEXTS[3]
    assert source.sizes().tolist() == [[8, 9], [16, 17], [0, 8], [0, 25]]
    assert source.sizes().dtype == np.int32


def test_sizes_that_are_no_numbers(saved):
    rows = {"image": [b"x"], "text": ["x"], "height": ["8"], "width": [8.5]}
    assert not open_source(saved(rows)).sizes().any()


def test_splits(saved, tmp_path):
    rows = {"image": list(map(encoded, COLOURS)), "text": TEXTS}
    assert len(open_source(saved(rows, split="train"))) == 4
    splits = {name: datasets.Dataset.from_dict(rows) for name in ("test", "train")}
    splits["test"] = splits["test"].select([0])
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "splits"))
    assert len(open_source(tmp_path / "splits")) == 4
    path = saved(rows, split="all")
    assert len(open_source(path)) == 4
    both = datasets.DatasetDict({name: datasets.Dataset.from_dict(rows) for name in ("a", "b")})
    both.save_to_disk(str(path.parent / "both"))
    message = refused(path.parent / "both")
    assert "splits a, b, none of them 'train'" in message
    assert str(path.parent / "both" / "a") in message
    assert len(open_source(path.parent / "both" / "a")) == 4


def test_filtered_before_saving(tmp_path):
    rows = {"image": list(map(encoded, COLOURS)), "text": TEXTS}
    dataset = datasets.Dataset.from_dict(rows).select([2, 0])
    dataset.save_to_disk(str(tmp_path / "saved"))
    source = open_source(tmp_path / "saved")
    assert [source[row].text for row in range(2)] == [TEXTS[2], TEXTS[0]]


def test_fingerprint(saved):
    path = saved({"image": list(map(encoded, COLOURS)), "text": TEXTS, "caption": TEXTS})
    first = open_source(path).fingerprint
    assert open_source(path).fingerprint == first
    assert open_source(path, columns=Columns(text="caption")).fingerprint != first
    assert open_source(path, default_caption="x").fingerprint != first
    path.rename(path.parent / "moved")
    assert open_source(path.parent / "moved").fingerprint == first
    other = saved({"image": list(map(encoded, COLOURS)), "text": TEXTS[::-1]})
    assert open_source(other).fingerprint != first


def test_survives_pickling_for_workers(saved):
    source = open_source(saved({"image": list(map(encoded, COLOURS)), "text": TEXTS}))
    data = pickle.dumps(source)
    assert encoded("red") not in data
    assert pickle.loads(data)[1].text == TEXTS[1]


def test_missing_captions(saved):
    rows = {"image": list(map(encoded, COLOURS)), "text": ["x", " ", None, ""]}
    path = saved(rows)
    message = refused(path)
    assert "3 of 4 pictures have no caption: row 1, row 2, row 3. Fill column 'text'" in message
    source = open_source(path, default_caption="y")
    assert [source[row].text for row in range(4)] == ["x", "y", "y", "y"]


def test_missing_captions_in_later_chunks(tmp_path):
    parts = [
        datasets.Dataset.from_dict({"image": [b"x"] * 3, "text": texts})
        for texts in (["a", "b", "c"], ["d", "e", ""])
    ]
    datasets.concatenate_datasets(parts).save_to_disk(str(tmp_path / "saved"), num_shards=2)
    assert "1 of 6 pictures have no caption: row 5" in refused(tmp_path / "saved")


@pytest.mark.parametrize(
    "rows, said",
    [
        ({"image": [b"x"], "titel": ["x"]}, ["no column for the captions", "image, titel"]),
        ({"pixels": [[1, 2]], "text": ["x"]}, ["no column for the pictures", "pixels, text"]),
        ({"image": [[1, 2]], "text": ["x"]}, ["column 'image' holds", "datasets.Image"]),
        ({"image": [b"x"], "text": [["x", "y"]]}, ["column 'text' holds", "one caption"]),
        ({"image": [b"x"], "text": [7]}, ["column 'text' holds", "one caption"]),
    ],
)
def test_columns_that_cannot_be_used(rows, said, saved):
    message = refused(saved(rows))
    assert all(words in message for words in said), message


def test_empty(tmp_path):
    features = datasets.Features(
        {"image": datasets.Value("binary"), "text": datasets.Value("string")}
    )
    datasets.Dataset.from_dict({"image": [], "text": []}, features=features).save_to_disk(
        str(tmp_path / "empty")
    )
    assert "holds no rows" in refused(tmp_path / "empty")


def test_damaged(saved):
    path = saved({"image": list(map(encoded, COLOURS)), "text": TEXTS})
    for file in path.glob("*.arrow"):
        file.write_bytes(b"damaged")
    message = refused(path)
    assert "cannot be loaded" in message
    assert "Save it again" in message
