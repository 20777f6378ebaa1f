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


COLOURS = ["red", "lime", "blue", "white"]
TEXTS = [f"a {colour} square" for colour in COLOURS]
PICTURES = [picture(colour) for colour in COLOURS]
ENCODED = [image_folders.encoded(one) for one in PICTURES]
ROWS = {"image": ENCODED, "text": TEXTS}
DATASET = datasets.Dataset.from_dict(ROWS)


@pytest.fixture
def saved(tmp_path):
    def saved(rows, **features):
        """Save a dataset, or columns of features that are given or guessed; return its folder."""
        if not isinstance(rows, (datasets.Dataset, datasets.DatasetDict)):
            given = datasets.Features(features) if features else None
            rows = datasets.Dataset.from_dict(rows, features=given)
        rows.save_to_disk(str(tmp_path / "saved"))
        return tmp_path / "saved"

    return saved


def refused(path):
    with pytest.raises(TrainingError) as error:
        open_source(path)
    return str(error.value)


def check_colours(source):
    found = [open_image(source[row].image) for row in range(len(COLOURS))]
    assert [one.getpixel((0, 0)) for one in found] == [one.getpixel((0, 0)) for one in PICTURES]


TEXT = datasets.Value("string")


def test_image_features(saved):
    rows = {"image": PICTURES, "text": TEXTS}
    source = open_source(saved(rows, image=datasets.Image(), text=TEXT))
    assert len(source) == 4
    assert [source[row].text for row in range(4)] == TEXTS
    assert isinstance(source[0].image, bytes)  # nothing is decoded here
    assert source[0].name == "row 0"
    check_colours(source)
    assert source[1].reference is None
    assert not source.sizes().any()


def test_broken_bytes_are_not_looked_at(saved):
    rows = {"image": [{"bytes": b"broken", "path": "some/where.jpg"}], "text": ["x"]}
    source = open_source(saved(rows, image=datasets.Image(), text=TEXT))
    assert source[0].image == b"broken"
    assert source[0].name == "row 0 (where.jpg)"


def test_encoded_bytes(saved):
    source = open_source(saved(ROWS))
    check_colours(source)
    sent = pickle.dumps(source)
    assert ENCODED[0] not in sent
    assert pickle.loads(sent)[1].text == TEXTS[1]


def test_paths(saved, tmp_path):
    for colour in COLOURS:
        picture(colour).save(tmp_path / f"{colour}.png")
    path = saved({"file": [f"{colour}.png" for colour in COLOURS], "caption": TEXTS})
    check_colours(open_source(path, image_root=tmp_path))
    assert open_source(path)[0].image == path / "red.png"
    assert open_source(path)[0].name == "red.png"


def test_references_sizes_and_names(saved):
    rows = {
        "Bild": PICTURES,
        "Vorbild": [picture("black"), None, picture("black"), None],
        "Titel": TEXTS,
        "height": [8, 16, None, -1],
        "width": [9, 17, 8, 25],
    }
    size = datasets.Value("int64")
    features = {"height": size, "Bild": datasets.Image(), "Vorbild": datasets.Image()}
    path = saved(rows, **features, Titel=TEXT, width=size)
    source = open_source(path, columns=Columns("Bild", "Titel", "Vorbild"))
    assert open_image(source[0].reference).getpixel((0, 0)) == (0, 0, 0)
    assert source[1].reference is None
    assert source[3].text == TEXTS[3]
    assert source.sizes().tolist() == [[8, 9], [16, 17], [0, 8], [0, 25]]
    assert source.sizes().dtype == np.int32


def test_sizes_that_are_no_numbers(saved):
    rows = {"image": [b"x"], "text": ["x"], "height": ["8"], "width": [8.5]}
    assert not open_source(saved(rows)).sizes().any()


@pytest.mark.parametrize("splits", [{"train": 4}, {"test": 1, "train": 4}, {"all": 4}])
def test_splits(splits, saved):
    parts = {name: DATASET.select(range(rows)) for name, rows in splits.items()}
    assert len(open_source(saved(datasets.DatasetDict(parts)))) == 4


def test_splits_without_one_to_train_on(saved):
    path = saved(datasets.DatasetDict({"a": DATASET, "b": DATASET}))
    message = refused(path)
    assert "splits a, b, none of them 'train'" in message
    assert str(path / "a") in message
    assert len(open_source(path / "a")) == 4


def test_filtered_before_saving(saved):
    source = open_source(saved(DATASET.select([2, 0])))
    assert [source[row].text for row in range(2)] == [TEXTS[2], TEXTS[0]]


def test_fingerprint(saved):
    path = saved(ROWS | {"caption": TEXTS})
    first = open_source(path).fingerprint
    assert open_source(path).fingerprint == first
    assert open_source(path, columns=Columns(text="caption")).fingerprint != first
    assert open_source(path, default_caption="x").fingerprint != first
    path.rename(path.parent / "moved")
    assert open_source(path.parent / "moved").fingerprint == first
    assert open_source(saved(ROWS | {"text": TEXTS[::-1]})).fingerprint != first


def test_missing_captions(saved):
    path = saved({"image": ENCODED, "text": ["x", " ", None, ""]})
    message = refused(path)
    assert "3 of 4 pictures have no caption: row 1, row 2, row 3. Fill column 'text'" in message
    source = open_source(path, default_caption="y")
    assert [source[row].text for row in range(4)] == ["x", "y", "y", "y"]


def test_missing_captions_in_later_chunks(saved):
    parts = [
        datasets.Dataset.from_dict({"image": [b"x"] * 3, "text": list(texts)})
        for texts in ("abc", ["d", "e", ""])
    ]
    path = saved(datasets.concatenate_datasets(parts))
    assert "1 of 6 pictures have no caption: row 5" in refused(path)


@pytest.mark.parametrize(
    "rows, said",
    [
        ({"image": [b"x"], "titel": ["x"]}, ["no column for the captions", "image, titel"]),
        ({"pixels": [[1, 2]], "text": ["x"]}, ["no column for the pictures", "pixels, text"]),
        ({"image": [[1, 2]], "text": ["x"]}, ["column 'image' holds", "datasets.Image"]),
        ({"image": [b"x"], "text": [[1, 2]]}, ["column 'text' holds", "or a list of them"]),
        ({"image": [b"x"], "text": [[["x"]]]}, ["column 'text' holds", "or a list of them"]),
        ({"image": [b"x"], "text": [7]}, ["column 'text' holds", "or a list of them"]),
    ],
)
def test_columns_that_cannot_be_used(rows, said, saved):
    message = refused(saved(rows))
    assert all(words in message for words in said), message


def test_empty(saved):
    path = saved({"image": [], "text": []}, image=datasets.Value("binary"), text=TEXT)
    assert "holds no rows" in refused(path)


def test_damaged(saved):
    path = saved(ROWS)
    for file in path.glob("*.arrow"):
        file.write_bytes(b"damaged")
    message = refused(path)
    assert "cannot be loaded" in message
    assert "Save it again" in message
