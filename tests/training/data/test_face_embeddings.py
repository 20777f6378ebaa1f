"""Embeddings of faces that come with the data, in every form that it may have."""

from __future__ import annotations

import io
import json

import numpy as np
import pyarrow as pa
import pytest
import torch
from datasets import Dataset
from pyarrow import parquet

from tests.support import image_folders
from training.data.buckets import square
from training.data.dataset import RawDataset
from training.data.face_embedding import face_embedding
from training.data.image import BrokenImageError
from training.data.randomness import NoiseSettings
from training.data.sources import Columns, open_source
from training.data.webdataset import ShardReader
from training.errors import TrainingError

COUNT = 5
FACES = np.random.default_rng(0).normal(size=(COUNT, 512)).astype(np.float32)
COLUMNS = Columns(face="id")
pytestmark = pytest.mark.usefixtures("arrow")


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def listed(folder, faces, write=None):
    """A folder of pictures whose list has a column of faces."""
    image_folders.with_metadata(folder, len(faces))
    metadata = folder / "metadata.jsonl"
    rows = [json.loads(line) for line in metadata.read_text().splitlines()]
    rows = [row | {"id": face} for row, face in zip(rows, faces, strict=True)]
    if write is None:
        metadata.write_text("\n".join(map(json.dumps, rows)))
    else:
        metadata.unlink()
        write(rows)
    return folder


def in_lines(folder):
    return listed(folder, [face.tolist() for face in FACES])


def in_files(folder):
    listed(folder, [f"faces/{n}.npy" for n in range(COUNT)])
    (folder / "faces").mkdir()
    for n, face in enumerate(FACES):
        np.save(folder / "faces" / f"{n}.npy", face[None].astype(np.float64))
    return folder


def in_parquet(folder):
    def write(rows):
        parquet.write_table(pa.Table.from_pylist(rows), folder / "metadata.parquet")

    return listed(folder, [face.tolist() for face in FACES], write)


def saved(folder):
    pictures = [image_folders.encoded(image_folders.image(n)) for n in range(COUNT)]
    content = {"image": pictures, "text": ["a"] * COUNT, "id": FACES.tolist()}
    Dataset.from_dict(content).save_to_disk(folder)
    return folder


def references(source):
    """What the encoders are given of every row, and what is wrong with it."""
    settings = NoiseSettings(0, 0.0, 0.0, 0.0, 1000, 0.0)
    refuses = type("", (), {"shape": (512,)})()  # there is no encoder
    rows = RawDataset(source, lambda text: (torch.zeros(1),), refuses, square(64), settings)
    return [rows[n, n] for n in range(len(rows))]


@pytest.mark.parametrize("write", [in_lines, in_files, in_parquet, saved])
def test_every_form_gives_the_same(tmp_path, write):
    source = open_source(write(tmp_path / "data"), columns=COLUMNS)
    found = references(source)
    assert not any(example["broken"] for example in found)
    assert torch.equal(torch.stack([x["reference"] for x in found]), torch.from_numpy(FACES))
    without = open_source(tmp_path / "data")
    assert all(without[row].face is None for row in range(COUNT))


def test_in_shards(tmp_path):
    files = {}
    for n, face in enumerate(FACES):
        files[f"{n}.png"] = image_folders.encoded(image_folders.image(n))
        caption = {"text": "a"} if n % 2 else {"text": "a", "id": face.tolist()}
        files[f"{n}.json"] = json.dumps(caption).encode()
        if n % 2:
            files[f"{n}.ID.npy"] = npy(face)
    files["9.png"], files["9.txt"] = files["0.png"], b"nobody"
    shard = image_folders.shard(tmp_path / "a.tar", files)
    *records, last = ShardReader(COLUMNS).records(shard)
    found = torch.stack([x["reference"] for x in references(records)])
    assert torch.equal(found, torch.from_numpy(FACES))
    assert last.broken.startswith("it has no face embedding; expected 512")
    assert last.broken.endswith("in id.npy or as id in the .json, among png, txt")
    assert all(record.face is None for record in ShardReader().records(shard))


def test_shards_may_begin_with_nobody(tmp_path):
    nobody = {"0.png": image_folders.encoded(image_folders.image(0)), "0.txt": b"a"}
    shard = image_folders.shard(tmp_path / "a.tar", nobody)
    said = r"its first sample 0 in a\.tar is without what is needed \(it has no face embedding"
    with pytest.raises(TrainingError, match=said):
        ShardReader(COLUMNS).check([shard])
    person = {name.replace("0", "1"): data for name, data in nobody.items()}
    image_folders.shard(tmp_path / "a.tar", nobody | person | {"1.id.npy": npy(FACES[0])})
    ShardReader(COLUMNS).check([shard])
    image_folders.shard(tmp_path / "a.tar", nobody | person | {"1.id.npy": npy(FACES[0][:9])})
    with pytest.raises(TrainingError, match="it has no face embedding"):
        ShardReader(COLUMNS).check([shard])


WRONG = {
    "it has no face embedding": None,
    "its face embedding has 3 numbers; expected 512 finite": [1.0, 2.0, 3.0],
    "its face embedding holds NaN": [float("nan")] * 512,
    "its face embedding is all zeros": [0.0] * 512,
    "its face embedding cannot be read (": "nowhere.npy",
}


def test_a_row_without_a_face_is_left_out_and_named(tmp_path):
    rows = [*WRONG.values(), FACES[0].tolist()]
    source = open_source(listed(tmp_path / "data", rows), columns=COLUMNS)
    *wrong, right = references(source)
    assert right["weight"] == 1
    for n, (said, example) in enumerate(zip(WRONG, wrong, strict=True)):
        assert example["broken"].startswith(f"{n:04}.png: {said}")
        assert example["weight"] == 0 and example["reference"].shape == (512,)


@pytest.mark.parametrize("data", [npy(FACES[0])[:90], b"PK\x03\x04cut", b"text", [None, "a"]])
def test_a_damaged_one(data):
    with pytest.raises(BrokenImageError, match="its face embedding cannot be read"):
        face_embedding(data)


@pytest.mark.parametrize("said", WRONG)
def test_none_in_all_rows_is_an_error(tmp_path, said):
    folder = listed(tmp_path / "data", [WRONG[said]] * 3)
    with pytest.raises(TrainingError) as error:
        open_source(folder, columns=COLUMNS)
    assert f"None of the 3 rows of '{folder}'" in str(error.value) and said in str(error.value)


def test_one_row_of_many_is_enough(tmp_path):
    """Wherever it lies among those that are left out."""
    rows = [None] * 40
    rows[17] = FACES[0].tolist()
    source = open_source(listed(tmp_path / "data", rows), columns=COLUMNS)
    assert [example["weight"] for example in references(source)].count(1) == 1


@pytest.mark.parametrize("value", [["a"], [[1.0], [2.0, 3.0]], {"a": 1}])
def test_what_is_no_embedding(tmp_path, value):
    folder = listed(tmp_path / "data", [FACES[0].tolist(), value])
    with pytest.raises(TrainingError, match=r"row 2: 'id' is .*expected 512 numbers"):
        open_source(folder, columns=COLUMNS)


def test_a_column_that_is_not_there(tmp_path):
    image_folders.with_metadata(tmp_path / "listed", 2)
    with pytest.raises(TrainingError, match="no column 'id' for the face embeddings; its columns"):
        open_source(tmp_path / "listed", columns=COLUMNS)
    (tmp_path / "plain").mkdir()
    image_folders.image(0).save(tmp_path / "plain" / "a.png")
    with pytest.raises(TrainingError, match=r"has no column 'id'. List them in a metadata\.jsonl"):
        open_source(tmp_path / "plain", columns=COLUMNS)


def test_the_rows_are_others_when_an_embedding_is(tmp_path):
    first = open_source(in_lines(tmp_path / "a"), columns=COLUMNS)
    same = open_source(in_lines(tmp_path / "b"), columns=COLUMNS)
    other = open_source(listed(tmp_path / "c", FACES[::-1].tolist()), columns=COLUMNS)
    assert repr(COLUMNS) == "Columns(image=None, text=None, reference=None)", "runs of 0.1 go on"
    assert first.fingerprint == same.fingerprint != other.fingerprint
    assert open_source(tmp_path / "a").fingerprint == open_source(tmp_path / "c").fingerprint
