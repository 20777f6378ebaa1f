"""Columns that say which rows are trained on: read from everything that has columns."""

from __future__ import annotations

import csv
import json

import datasets
import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from training.data.columns import Column, held_out_rows, read_column
from training.errors import TrainingError

KINDS = ("jsonl", "csv", "parquet", "json", "saved")
ROWS = [
    {"file_name": "a.png", "hand": "left", "split": True},
    {"file_name": "b.png", "hand": " ", "split": False},
    {"file_name": "c.png", "hand": "right", "split": None},
    {"file_name": "d.png", "hand": "left", "split": True},
]


@pytest.fixture
def written(tmp_path):
    def written(rows, kind="jsonl"):
        """Write rows as one kind of data, and return its path."""
        if kind == "saved":
            datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "saved"))
            return tmp_path / "saved"
        path = tmp_path / f"metadata.{kind}"
        if kind == "csv":
            with path.open("w", newline="") as file:
                writer = csv.DictWriter(file, list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)
        elif kind == "parquet":
            parquet.write_table(pa.Table.from_pylist(rows), path)
        else:
            lines = [json.dumps(row) for row in rows]
            path.write_text("\n".join(lines) if kind == "jsonl" else f"[{', '.join(lines)}]")
        return path if kind == "json" else tmp_path

    return written


def refused(function, *given):
    with pytest.raises(TrainingError) as error:
        function(*given)
    return str(error.value)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_gives_the_same(kind, written):
    path = written(ROWS, kind)
    hand = read_column(path, "hand")
    assert hand.values == ("left", None, "right")
    assert hand.of_row.tolist() == [0, 1, 2, 0]
    assert hand.of_row.dtype == np.int32
    assert hand.told() == "'left': 2, None: 1, 'right': 1"
    assert hand.told(np.array([True, False, False, True])) == "'left': 2"
    split = read_column(path, "split")
    assert split.values == (("True", "False", None) if kind == "csv" else (True, False, None))
    assert held_out_rows(split).tolist() == [True, False, False, True]


@pytest.mark.parametrize("kind", KINDS)
def test_a_column_that_there_is_not(kind, written):
    message = refused(read_column, written(ROWS, kind), "foot")
    assert "has no column 'foot'; its columns are file_name, hand, split" in message


def test_a_folder_of_pictures_has_none(pictures):
    assert "List them in a metadata.jsonl" in refused(read_column, pictures, "hand")


def test_a_column_that_the_first_row_lacks(written):
    path = written([{"file_name": "a.png"}, {"file_name": "b.png", "split": "test"}])
    assert held_out_rows(read_column(path, "split")).tolist() == [False, True]


def test_equal_numbers_of_other_kinds_are_other_values(written):
    path = written([{"x": value} for value in (1, True, "1", 1.0, 1)])
    assert read_column(path, "x").of_row.tolist() == [0, 1, 2, 3, 0]


def test_classes_are_their_names(tmp_path):
    split = datasets.ClassLabel(names=["train", "test"])
    features = datasets.Features(split=split)
    rows = datasets.Dataset.from_dict({"split": [1, 0, None, -1]}, features=features)
    rows.save_to_disk(str(tmp_path / "saved"))
    assert read_column(tmp_path / "saved", "split").values == ("test", "train", None, -1)


def test_what_is_no_value(written):
    path = written([{"hand": "left"}, {"hand": ["left", "right"]}])
    message = refused(read_column, path, "hand")
    assert "row 2: 'hand' is \"['left', 'right']\" (list); expected a text" in message


def split(*values):
    return Column("split", values, np.arange(len(values), dtype=np.int32))


def test_words_that_hold_out():
    words = ("validation", "val", "test", "held_out", "Test", "true", True)
    assert held_out_rows(split(*words, "train")).tolist() == [True] * 7 + [False]
    others = ("train", "dev", "false", False, None)
    assert held_out_rows(split(*others, "val")).tolist() == [False] * 5 + [True]


@pytest.mark.parametrize(
    "values, said",
    [
        (("test", 3), r"'split' holds 3 \(int\); expected booleans, or texts of which validation"),
        (("test", 0.5), r"holds 0.5 \(float\)"),
        (("train", "dev"), "holds out none of 2 rows: its values are 'train': 1, 'dev': 1"),
        ((True,), "holds out all of 1 rows: its values are True: 1"),
    ],
)
def test_a_split_that_cannot_be(values, said):
    with pytest.raises(TrainingError, match=said):
        held_out_rows(split(*values))
