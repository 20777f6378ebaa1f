"""Folders and lists of pictures as records, and what is said of bad ones."""

from __future__ import annotations

import csv
import json
import os

import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from training.data.sources import Columns, Record, open_source
from training.errors import TrainingError


@pytest.fixture
def folder(tmp_path):
    """Three pictures, one of them in a folder of its own."""
    place = tmp_path / "pictures"
    (place / "deep" / "er").mkdir(parents=True)
    for name in ("a.jpg", "b.PNG", "deep/er/c.webp"):
        Image.new("RGB", (8, 8)).save(place / name)
    return place


@pytest.fixture
def opened(tmp_path):
    def opened(path, **options):
        return open_source(path, cache_dir=tmp_path / "cache", **options)

    return opened


@pytest.fixture
def refused(opened):
    def refused(path, **options):
        with pytest.raises(TrainingError) as error:
            opened(path, **options)
        return str(error.value)

    return refused


def rows(source):
    return [(r.name, r.text) for r in map(source.__getitem__, range(len(source)))]


CAPTIONS = {"a.jpg": "a cat", "b.PNG": "a dog, 狗", "deep/er/c.webp": "two\nlines"}
ROWS = [{"file_name": name, "text": text} for name, text in CAPTIONS.items()]


def write_texts(folder, captions=CAPTIONS):
    for name, text in captions.items():
        (folder / name).with_suffix(".txt").write_text(text + "\n", encoding="utf-8")


def write_metadata(folder, kind, rows=ROWS):
    path = folder / f"metadata.{kind}"
    if kind == "jsonl":
        path.write_text("\n".join(map(json.dumps, rows)) + "\n\n", encoding="utf-8")
    elif kind == "csv":
        with path.open("w", newline="", encoding="utf-8-sig") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        parquet.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize("kind", ["txt", "jsonl", "csv", "parquet", "json"])
def test_every_kind_gives_the_same(kind, folder, opened):
    data = folder
    if kind == "txt":
        write_texts(folder)
    elif kind == "json":
        data = folder / "list.json"
        listed = [{"image_file": row["file_name"], "text": row["text"]} for row in ROWS]
        data.write_text(json.dumps(listed))
    else:
        write_metadata(folder, kind)
    source = opened(data)
    assert rows(source) == list(CAPTIONS.items())
    assert source[2] == Record(
        "deep/er/c.webp", folder / "deep/er/c.webp", CAPTIONS["deep/er/c.webp"], None
    )
    assert not source.sizes().any()
    for row in (3, -4):
        with pytest.raises(IndexError):
            source[row]


def test_a_metadata_file_itself(folder, opened):
    path = write_metadata(folder, "jsonl")
    assert rows(opened(path)) == rows(opened(str(folder)))


@pytest.mark.parametrize("name", ["text", "caption", "prompt"])
def test_usual_columns(name, folder, opened):
    write_metadata(folder, "jsonl", [{"file_name": "a.jpg", name: "found"}])
    assert rows(opened(folder)) == [("a.jpg", "found")]


def test_columns_by_name(folder, opened):
    write_metadata(
        folder, "csv", [{"text": "no", "Titel": "yes", "Bild": "a.jpg", "Vorbild": "b.PNG"}]
    )
    found = opened(folder, columns=Columns("Bild", "Titel", "Vorbild"))[0]
    assert found == Record("a.jpg", folder / "a.jpg", "yes", folder / "b.PNG")


def test_reference_pictures(folder, opened):
    write_metadata(
        folder,
        "jsonl",
        [
            {"file_name": "a.jpg", "text": "x", "reference_file_name": "b.PNG"},
            {"file_name": "b.PNG", "text": "y", "reference_file_name": None},
            {"file_name": "b.PNG", "text": "y", "reference_file_name": ""},
        ],
    )
    source = opened(folder)
    assert [source[row].reference for row in range(3)] == [folder / "b.PNG", None, None]


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_sizes_in_columns(kind, folder, opened):
    listed = [
        {"file_name": "a.jpg", "text": "x", "height": 30, "width": 20},
        {"file_name": "b.PNG", "text": "y", "height": None, "width": None},
    ]
    write_metadata(folder, kind, listed)
    assert opened(folder).sizes().tolist() == [[30, 20], [0, 0]]


@pytest.mark.parametrize("options", [{}, {"indent": 2}, {"separators": (",", ":")}])
def test_json_lists(options, folder, opened):
    texts = ["plain", 'brackets ]}[{ and "quotes"', "\\", "ü 狗", "{}"]
    listed = [{"image_file": "a.jpg", "text": text, "more": [1, {"a": []}]} for text in texts]
    (folder / "list.json").write_text("\n " + json.dumps(listed, **options) + "\n")
    assert [text for _, text in rows(opened(folder / "list.json"))] == texts


def test_image_root(folder, opened, tmp_path):
    listing = tmp_path / "elsewhere" / "list.json"
    listing.parent.mkdir()
    listing.write_text(json.dumps([{"image_file": "a.jpg", "text": "x"}]))
    assert opened(listing, image_root=folder)[0].image == folder / "a.jpg"
    absolute = [{"image_file": str(folder / "a.jpg"), "text": "x"}]
    listing.write_text(json.dumps(absolute))
    assert opened(listing)[0].image == folder / "a.jpg"


def test_hidden_files_and_links(folder, opened, tmp_path):
    write_texts(folder)
    (folder / "._a.jpg").write_bytes(b"resource fork")
    (folder / ".thumbs").mkdir()
    Image.new("RGB", (8, 8)).save(folder / ".thumbs" / "a.jpg")
    (folder / "notes.md").write_text("no caption")
    assert len(opened(folder)) == 3
    outside = tmp_path / "outside"
    outside.mkdir()
    Image.new("RGB", (8, 8)).save(outside / "d.jpg")
    (outside / "d.txt").write_text("linked")
    os.symlink(outside, folder / "link")
    os.symlink(folder, outside / "back")  # a circle
    assert ("link/d.jpg", "linked") in rows(opened(folder))
    assert len(opened(folder)) == 4


def test_captions_with_a_byte_order_mark(folder, opened):
    write_texts(folder)
    (folder / "a.txt").write_bytes(b"\xef\xbb\xbfmarked\r\n")
    assert opened(folder)[0].text == "marked"


def test_changes_are_seen(folder, opened):
    write_texts(folder)
    first = opened(folder)
    assert opened(folder).fingerprint == first.fingerprint
    (folder / "a.txt").write_text("another caption")
    changed = opened(folder)
    assert changed[0].text == "another caption"
    assert changed.fingerprint != first.fingerprint
    write_texts(folder)
    assert opened(folder).fingerprint == first.fingerprint
    (folder / "deep/er/c.webp").rename(folder / "c.webp")
    (folder / "deep/er/c.txt").rename(folder / "c.txt")
    assert opened(folder)[2].name == "c.webp"
    (folder / "c.webp").unlink()
    assert len(opened(folder)) == 2
    path = write_metadata(folder, "jsonl")
    assert rows(opened(folder)) == list(CAPTIONS.items())
    write_metadata(folder, "jsonl", ROWS[:1])
    os.utime(path, ns=(1, 1))
    assert len(opened(folder)) == 1


def test_a_folder_that_moved_is_the_same(folder, opened, tmp_path):
    write_metadata(folder, "jsonl")
    first = opened(folder).fingerprint
    folder.rename(tmp_path / "moved")
    assert opened(tmp_path / "moved").fingerprint == first


def test_missing_captions(folder, refused, opened):
    write_texts(folder, {"a.jpg": "a cat", "b.PNG": "  "})
    message = refused(folder)
    assert "2 of 3 pictures have no caption: b.PNG, deep/er/c.webp." in message
    assert "a.txt beside it" in message
    assert rows(opened(folder, default_caption=""))[1] == ("b.PNG", "")
    assert rows(opened(folder, default_caption="a photo"))[1:] == [
        ("b.PNG", "a photo"),
        ("deep/er/c.webp", "a photo"),
    ]
    assert "2 of 3" in refused(folder)  # not what was kept for the default


def test_missing_captions_in_metadata(folder, refused, opened):
    listed = [{"file_name": f"{n}.jpg", "text": "x" if n < 3 else None} for n in range(20)]
    listed[1]["file_name"] = "a.jpg"
    write_metadata(folder, "jsonl", listed)
    message = refused(folder)
    assert "17 of 20 pictures have no caption: 3.jpg, 4.jpg, 5.jpg, 6.jpg, 7.jpg, …" in message
    assert "metadata.jsonl" in message
    assert len(opened(folder, default_caption="")) == 20
    assert "17 of 20" in refused(folder)  # not what was kept for the default
    listed = [{"file_name": "a.jpg"}]
    write_metadata(folder, "jsonl", listed)
    assert rows(opened(folder, default_caption="x")) == [("a.jpg", "x")]


def test_wrong_paths(folder, refused):
    message = refused(folder / "nothing" / "here")
    assert f"There is no '{folder / 'nothing' / 'here'}'" in message
    assert f"In '{folder}' lies: a.jpg, b.PNG, deep." in message
    assert "WebDataset" in message


def test_empty_sets(tmp_path, refused):
    empty = tmp_path / "empty"
    empty.mkdir()
    message = refused(empty)
    assert "no picture" in message
    assert "It holds no files" in message
    (empty / "list.json").write_text("[]")
    assert "Other files are there: list.json" in refused(empty)
    assert "lists no pictures" in refused(empty / "list.json")
    for name in ("metadata.jsonl", "metadata.csv"):
        (empty / name).write_text("")
        assert f"{name}' lists no pictures" in refused(empty / name)


def test_columns_that_are_missing(folder, refused):
    write_metadata(folder, "jsonl", [{"file_name": "a.jpg", "titel": "x"}])
    message = refused(folder)
    assert "no column for the captions (looked for text, caption, prompt)" in message
    assert "its columns are file_name, titel" in message
    assert "no column 'alt' for the captions" in refused(folder, columns=Columns(text="alt"))
    write_metadata(folder, "csv", [{"picture": "a.jpg", "text": "x"}])
    (folder / "metadata.jsonl").unlink()
    assert "no column for the pictures" in refused(folder)


def test_files_that_are_not_there(folder, refused, opened):
    listed = [{"file_name": f"{n}.jpg", "text": "x"} for n in range(100)]
    write_metadata(folder, "jsonl", listed)
    message = refused(folder)
    assert f"looked for '{folder / '0.jpg'}'" in message
    assert "data_root_path" in message
    Image.new("RGB", (8, 8)).save(folder / "99.jpg")
    assert len(opened(folder)) == 100  # single ones are broken pictures, named when they come


def test_metadata_in_several_places(folder, refused):
    for name in ("train", "test"):
        (folder / name).mkdir()
        write_metadata(folder / name, "jsonl")
    assert "test/metadata.jsonl, train/metadata.jsonl" in refused(folder)
    write_metadata(folder, "jsonl")
    write_metadata(folder, "csv")
    assert "metadata.jsonl and metadata.csv; expected one" in refused(folder)


@pytest.mark.parametrize(
    "name, content, said",
    [
        (
            "metadata.jsonl",
            '{"file_name": "a.jpg", "text": "x"}\n{"file',
            ["line 2", "no complete JSON", '{"file'],
        ),
        ("metadata.jsonl", "[1]\n", ["line 1", "found '[1]'"]),
        ("metadata.jsonl", '{"file_name": 7, "text": "x"}', ["row 1", "'file_name' is 7"]),
        ("metadata.jsonl", '{"file_name": "a.jpg", "text": ["x"]}', ["row 1", "one caption"]),
        (
            "metadata.jsonl",
            '{"file_name": "a.jpg", "text": "x", "reference": 7}',
            ["row 1", "'reference' is 7"],
        ),
        ("metadata.jsonl", b"\xff\xfe\x00", ["cannot be read", "utf-8"]),
        ("metadata.csv", "file_name,text\n,x\n", ["row 1", "'file_name' is ''"]),
        ("list.csv", "file_name,titel\na.jpg,x,y\n", ["columns are file_name, titel, None"]),
        ("metadata.parquet", "no parquet", ["cannot be read"]),
        ("list.json", '{"image_file": "a.jpg"}', ["begins with", "expected a list"]),
        ("list.json", '[{"image_file": "a.jpg", "text": "x"}', ["no complete JSON"]),
        ("list.json", '[{"image_file": "a.jpg", "text": "x"}, {bad}]', ["{bad}"]),
        ("list.json", "[1, 2]", ["found '1'", "expected an object"]),
        ("list.json", "", ["no complete JSON"]),
        ("list.yaml", "- a.jpg", ["no kind that lists pictures", ".jsonl"]),
        ("a.txt", b"caf\xe9", ["a.txt", "no UTF-8"]),
    ],
)
def test_damaged_lists(name, content, said, folder, refused):
    write_texts(folder)
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    message = refused(folder if name in ("a.txt", "metadata.jsonl") else path)
    assert all(words in message for words in [name, *said]), message


def test_unreadable_folders(folder, refused, monkeypatch):
    def denied(path):
        raise PermissionError(13, "Permission denied", str(path))

    write_texts(folder)
    monkeypatch.setattr(os, "scandir", denied)
    assert "cannot be read: Permission denied" in refused(folder)
