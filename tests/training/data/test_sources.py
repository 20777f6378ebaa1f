"""Folders and lists of pictures as records, written to the cache folder once, whole or not at all,
and what is said of bad ones."""

from __future__ import annotations

import csv
import json
import math
import multiprocessing
import os
import pickle
import subprocess
import sys
from functools import partial
from pathlib import Path

import datasets
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from training.data import listings, sources
from training.data.sources import Columns, Record, open_source
from training.errors import TrainingError

ROOT = Path(__file__).resolve().parents[3]


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


def write_metadata(folder, kind="jsonl", rows=ROWS):
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


class TestRead:
    @pytest.mark.parametrize("kind", ["txt", "jsonl", "csv", "parquet", "json"])
    def test_every_kind_gives_the_same(self, kind, folder, opened):
        data = folder
        if kind == "txt":
            write_texts(folder)
        elif kind == "json":
            data = folder / "list.json"
            listed = [{"image_file": row["file_name"], "text": row["text"]} for row in ROWS]
            data.write_text(json.dumps(listed))
        else:
            data = write_metadata(folder, kind)
            assert rows(opened(str(folder))) == rows(opened(data))
        source = opened(data)
        assert rows(source) == list(CAPTIONS.items())
        assert source[2] == Record(
            "deep/er/c.webp", folder / "deep/er/c.webp", CAPTIONS["deep/er/c.webp"], None
        )
        assert not source.sizes().any()
        for row in (3, -4):
            with pytest.raises(IndexError):
                source[row]

    @pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet", "json", "saved"])
    @pytest.mark.parametrize("empty", [math.nan, None, "", "  ", "absent"])
    def test_an_empty_cell_is_no_caption(self, kind, empty, folder, opened, refused):
        listed = [{"file_name": "a.jpg", "text": "a cat"}, {"file_name": "b.PNG"}]
        if empty != "absent":
            listed[1]["text"] = empty
        if kind == "parquet" and empty != empty:  # a column of numbers: no caption at all
            listed[0]["text"] = empty
        if kind == "saved":
            column = pa.array([row.get("text") for row in listed], pa.string(), from_pandas=True)
            images = [str(folder / row["file_name"]) for row in listed]
            table = pa.table({"image": images, "text": column})
            datasets.Dataset(table).save_to_disk(data := folder / "saved")
        elif kind == "json":
            (data := folder / "list.json").write_text(json.dumps(listed))
        else:
            data = write_metadata(folder, kind, listed)
        assert "of 2 pictures have no caption" in refused(data)
        source = opened(data, default_caption="a picture")
        first = "a cat" if listed[0]["text"] == "a cat" else "a picture"
        assert [source[row].text for row in range(2)] == [first, "a picture"]

    def test_names_of_other_systems_are_left_out_and_told(self, folder, opened, caplog):
        write_texts(folder)
        odd = os.fsencode(folder) + b"/caf\xe9.jpg"
        try:
            Path(os.fsdecode(odd)).write_bytes((folder / "a.jpg").read_bytes())
        except OSError:
            pytest.skip("this file system takes UTF-8 names alone")
        assert rows(opened(folder)) == list(CAPTIONS.items())
        assert r"1 pictures are left out, whose names are no UTF-8 (caf\udce9.jpg)" in caplog.text

    def test_names_and_captions_that_are_half_a_character(self, folder, opened, refused):
        write_metadata(folder, rows=[{"file_name": "a.jpg", "text": "cut off \ud83d"}])
        assert rows(opened(folder)) == [("a.jpg", "cut off ?")]
        write_metadata(folder, rows=[{"file_name": "\udce9.jpg", "text": "x"}])
        assert r"row 1: the file name '\udce9.jpg' is no UTF-8" in refused(folder)

    @pytest.mark.parametrize("name", ["text", "caption", "prompt"])
    def test_usual_columns(self, name, folder, opened):
        write_metadata(folder, rows=[{"file_name": "a.jpg", name: "found"}])
        assert rows(opened(folder)) == [("a.jpg", "found")]

    def test_columns_by_name(self, folder, opened):
        row = {"text": "no", "Titel": "yes", "Bild": "a.jpg", "Vorbild": "b.PNG"}
        write_metadata(folder, "csv", [row])
        found = opened(folder, columns=Columns("Bild", "Titel", "Vorbild"))[0]
        assert found == Record("a.jpg", folder / "a.jpg", "yes", folder / "b.PNG")

    def test_reference_pictures(self, folder, opened):
        references = ["b.PNG", None, ""]
        row = {"file_name": "a.jpg", "text": "x"}
        write_metadata(folder, rows=[row | {"reference_file_name": name} for name in references])
        source = opened(folder)
        assert [source[row].reference for row in range(3)] == [folder / "b.PNG", None, None]

    @pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
    def test_sizes_in_columns(self, kind, folder, opened):
        listed = [
            {"file_name": "a.jpg", "text": "x", "height": 30, "width": 20},
            {"file_name": "b.PNG", "text": "y", "height": None, "width": None},
        ]
        write_metadata(folder, kind, listed)
        assert opened(folder).sizes().tolist() == [[30, 20], [0, 0]]

    @pytest.mark.parametrize("options", [{}, {"indent": 2}, {"separators": (",", ":")}])
    def test_json_lists(self, options, folder, opened):
        texts = ["plain", 'brackets ]}[{ and "quotes"', "\\", "ü 狗", "{}"]
        listed = [{"image_file": "a.jpg", "text": text, "more": [1, {"a": []}]} for text in texts]
        (folder / "list.json").write_text("\n " + json.dumps(listed, **options) + "\n")
        assert [text for _, text in rows(opened(folder / "list.json"))] == texts

    def test_image_root(self, folder, opened, tmp_path):
        listing = tmp_path / "list.json"
        listing.write_text(json.dumps([{"image_file": "a.jpg", "text": "x"}]))
        assert opened(listing, image_root=folder)[0].image == folder / "a.jpg"
        listing.write_text(json.dumps([{"image_file": str(folder / "a.jpg"), "text": "x"}]))
        assert opened(listing)[0].image == folder / "a.jpg"

    def test_hidden_files_and_links(self, folder, opened, tmp_path):
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

    def test_captions_with_a_byte_order_mark(self, folder, opened):
        write_texts(folder)
        (folder / "a.txt").write_bytes(b"\xef\xbb\xbfmarked\r\n")
        assert opened(folder)[0].text == "marked"


class TestMissingCaptions:
    def test_in_texts(self, folder, refused, opened):
        write_texts(folder, {"a.jpg": "a cat", "b.PNG": "  "})
        message = refused(folder)
        assert "2 of 3 pictures have no caption: b.PNG, deep/er/c.webp." in message
        assert "a.txt beside it" in message
        for default in ("", "a photo"):
            captions = [text for _, text in rows(opened(folder, default_caption=default))]
            assert captions == ["a cat", default, default]
        assert "2 of 3" in refused(folder)  # not what was kept for the default

    def test_in_metadata(self, folder, refused, opened):
        listed = [{"file_name": f"{n}.jpg", "text": "x" if n < 3 else None} for n in range(20)]
        listed[1]["file_name"] = "a.jpg"
        write_metadata(folder, rows=listed)
        message = refused(folder)
        assert "17 of 20 pictures have no caption: 3.jpg, 4.jpg, 5.jpg, 6.jpg, 7.jpg, …" in message
        assert "metadata.jsonl" in message
        assert len(opened(folder, default_caption="")) == 20
        assert "17 of 20" in refused(folder)
        write_metadata(folder, rows=[{"file_name": "a.jpg"}])
        assert rows(opened(folder, default_caption="x")) == [("a.jpg", "x")]


class TestRefused:
    def test_wrong_paths(self, folder, refused):
        message = refused(folder / "nothing" / "here")
        assert f"There is no '{folder / 'nothing' / 'here'}'" in message
        assert f"In '{folder}' lies: a.jpg, b.PNG, deep." in message
        assert "WebDataset" in message

    def test_folders_without_pictures(self, tmp_path, refused):
        empty = tmp_path / "empty"
        empty.mkdir()
        message = refused(empty)
        assert "no picture" in message
        assert "It holds no files" in message
        (empty / "list.txt").write_text("")
        assert "Other files are there: list.txt" in refused(empty)

    def test_files_that_are_not_there(self, folder, refused, opened):
        write_metadata(folder, rows=[{"file_name": f"{n}.jpg", "text": "x"} for n in range(100)])
        message = refused(folder)
        assert f"looked for '{folder / '0.jpg'}'" in message
        assert "data_root_path" in message
        Image.new("RGB", (8, 8)).save(folder / "99.jpg")
        assert len(opened(folder)) == 100  # single ones are broken pictures, named when they come

    def test_metadata_in_several_places(self, folder, refused):
        for name in ("train", "test"):
            (folder / name).mkdir()
            write_metadata(folder / name)
        assert "test/metadata.jsonl, train/metadata.jsonl" in refused(folder)
        write_metadata(folder)
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
            ("metadata.jsonl", "", ["lists no pictures"]),
            (
                "metadata.jsonl",
                '{"file_name": "a.jpg", "titel": "x"}',
                [
                    "no column for the captions (looked for text, caption, prompt)",
                    "its columns are file_name, titel",
                ],
            ),
            ("metadata.jsonl", '{"file_name": 7, "text": "x"}', ["row 1", "'file_name' is 7"]),
            (
                "metadata.jsonl",
                '{"file_name": "a.jpg", "text": {"en": "x"}}',
                ["row 1", "expected a caption as a text, or a list of them"],
            ),
            ("metadata.jsonl", '{"file_name": "a.jpg", "text": [["x"]]}', ["row 1", "a list of"]),
            (
                "metadata.jsonl",
                '{"file_name": "a.jpg", "text": "x", "reference": 7}',
                ["row 1", "'reference' is 7"],
            ),
            ("metadata.jsonl", b"\xff\xfe\x00", ["cannot be read", "utf-8"]),
            ("metadata.csv", "", ["lists no pictures"]),
            ("metadata.csv", "picture,text\na.jpg,x\n", ["no column for the pictures"]),
            ("metadata.csv", "file_name,text\n,x\n", ["row 1", "'file_name' is ''"]),
            ("list.csv", "file_name,titel\na.jpg,x,y\n", ["columns are file_name, titel, None"]),
            ("metadata.parquet", "no parquet", ["cannot be read"]),
            ("list.json", "[]", ["lists no pictures"]),
            ("list.json", '{"image_file": "a.jpg"}', ["begins with", "expected a list"]),
            ("list.json", '[{"image_file": "a.jpg", "text": "x"}', ["no complete JSON"]),
            ("list.json", '[{"image_file": "a.jpg", "text": "x"}, {bad}]', ["{bad}"]),
            ("list.json", "[1, 2]", ["found '1'", "expected an object"]),
            ("list.json", "", ["no complete JSON"]),
            ("list.yaml", "- a.jpg", ["no kind that lists pictures", ".jsonl"]),
            ("a.txt", b"caf\xe9", ["a.txt", "no UTF-8"]),
        ],
    )
    def test_damaged_lists(self, name, content, said, folder, refused):
        write_texts(folder)
        path = folder / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        message = refused(folder if name in ("a.txt", "metadata.jsonl") else path)
        assert all(words in message for words in [name, *said]), message

    def test_a_column_that_there_is_not(self, folder, refused):
        write_metadata(folder)
        message = refused(folder, columns=Columns(text="alt"))
        assert "no column 'alt' for the captions" in message

    def test_unreadable_folders(self, folder, refused, monkeypatch):
        def denied(path):
            raise PermissionError(13, "Permission denied", str(path))

        write_texts(folder)
        monkeypatch.setattr(os, "scandir", denied)
        assert "cannot be read: Permission denied" in refused(folder)


MEMORY = """
import gc, sys
from itertools import islice
from pathlib import Path
from training.data import buckets
from training.data.sampler import RankBatchSampler
from training.data.sources import open_source

def resident():
    gc.collect()
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0])

first = open_source(sys.argv[2], cache_dir=sys.argv[3])  # imports and pools count for both
buckets.by_aspect(first, 512, Path(sys.argv[3])).sampler(len(first), 4, seed=0)
before = resident()
source = open_source(sys.argv[1], cache_dir=sys.argv[3])
found = buckets.by_aspect(source, 512, Path(sys.argv[3]))
order = found.sampler(len(source), 4, seed=0)
for batch in islice(RankBatchSampler(order), 500):
    for number, row in batch:
        source[row]
print(resident() - before)
"""


class TestKept:
    def test_rows_are_read_once(self, folder, opened, monkeypatch):
        path = write_metadata(folder)
        expected = opened(path).fingerprint
        times = []
        row = sources._row
        monkeypatch.setattr(sources, "_row", lambda *given: times.append(1) or row(*given))
        assert (opened(path).fingerprint, times) == (expected, [])
        write_metadata(folder, rows=[*ROWS, ROWS[0]])
        opened(path)
        assert len(times) == 4

    def test_changes_are_seen(self, folder, opened):
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
        path = write_metadata(folder)
        assert rows(opened(folder)) == list(CAPTIONS.items())
        write_metadata(folder, rows=ROWS[:1])
        os.utime(path, ns=(1, 1))
        assert len(opened(folder)) == 1

    def test_fingerprint_is_of_the_rows(self, folder, opened, tmp_path):
        def fingerprint(rows, kind="jsonl"):
            path = write_metadata(folder, kind, rows)
            return opened(path).fingerprint

        plain = fingerprint(ROWS)
        assert fingerprint(ROWS, "csv") == plain
        assert fingerprint([*ROWS[:2], ROWS[2] | {"text": "z"}]) != plain
        assert fingerprint(ROWS[::-1]) != plain
        assert fingerprint([ROWS[0] | {"reference": "r.jpg"}, *ROWS[1:]]) != plain
        write_metadata(folder)
        (folder / "metadata.csv").unlink()
        folder.rename(tmp_path / "moved")
        assert opened(tmp_path / "moved").fingerprint == plain

    def test_workers_get_no_copy_of_the_rows(self, folder, opened):
        listed = [{"file_name": "a.jpg", "text": f"caption {n}" * 100} for n in range(1000)]
        data = pickle.dumps(opened(write_metadata(folder, rows=listed)))
        assert len(data) < 20_000
        assert pickle.loads(data)[999].text == "caption 999" * 100

    def test_more_than_a_block(self, folder, opened, monkeypatch, tmp_path):
        listed = [{"file_name": "a.jpg", "text": f"text {n}"} for n in range(50)]
        path = write_metadata(folder, rows=listed)
        expected = opened(path).fingerprint
        monkeypatch.setattr(datasets.config, "DEFAULT_MAX_BATCH_SIZE", 7)
        source = open_source(path, cache_dir=tmp_path / "other")
        assert len(source._rows.data.column("text").chunks) > 1
        assert [source[n].text for n in range(50)] == [row["text"] for row in listed]
        assert source.fingerprint == expected

    def test_interrupted_while_writing(self, folder, opened, tmp_path, monkeypatch):
        def cut(path):
            yield from ROWS[:2]
            raise KeyboardInterrupt

        path = write_metadata(folder)
        with monkeypatch.context() as patch:
            patch.setitem(listings._READERS, ".jsonl", cut)
            with pytest.raises(KeyboardInterrupt):
                opened(path)
        assert not list((tmp_path / "cache").rglob("*.arrow"))
        assert len(opened(path)) == 3

    def test_full_disk(self, folder, refused, monkeypatch):
        def full(*given, **options):
            raise OSError(28, "No space left on device")

        write_texts(folder)
        monkeypatch.setattr(datasets.arrow_writer.ArrowWriter, "finalize", full)
        message = refused(folder)
        assert "No space left on device" in message
        assert "HF_DATASETS_CACHE" in message

    def test_a_cache_that_cannot_be_written(self, folder, tmp_path):
        write_texts(folder)
        (tmp_path / "file").write_text("in the way")
        with pytest.raises(TrainingError, match=r"'.*file/cache': .*HF_DATASETS_CACHE"):
            open_source(folder, cache_dir=tmp_path / "file" / "cache")

    def test_default_folder_is_hugging_faces_and_nothing_needs_a_network(
        self, folder, tmp_path, monkeypatch
    ):
        def refuse(*arguments, **options):
            raise OSError("no network in this test")

        monkeypatch.setattr("socket.socket.connect", refuse)
        monkeypatch.setattr("socket.getaddrinfo", refuse)
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
        write_texts(folder)
        assert open_source(folder)[0].text == "a cat"
        assert list((tmp_path / "hf").rglob("*.arrow"))

    def test_processes_at_once(self, folder, tmp_path):
        write_metadata(folder, rows=[{"file_name": "a.jpg", "text": f"{n}"} for n in range(3000)])
        reading = partial(open_source, cache_dir=tmp_path / "cache")
        with multiprocessing.get_context("fork").Pool(2) as pool:
            found = pool.map(reading, [folder] * 2, chunksize=1)
        assert found[0].fingerprint == found[1].fingerprint
        assert [(len(source), source[2999].text) for source in found] == [(3000, "2999")] * 2

    @pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs /proc")
    @pytest.mark.parametrize(
        "rows, limit", [(60_000, 8_000), pytest.param(300_000, 16_000, marks=pytest.mark.nightly)]
    )
    def test_memory_does_not_grow_with_rows(self, rows, limit, tmp_path):
        def listing(rows):
            folder = tmp_path / str(rows)
            folder.mkdir()
            Image.new("RGB", (8, 8)).save(folder / "0.jpg")
            with (folder / "metadata.jsonl").open("w") as file:
                for n in range(rows):
                    row = {"file_name": f"{n}.jpg", "text": f"caption {n} " * 8}
                    file.write(json.dumps(row | {"height": 600 + n % 300, "width": 700}) + "\n")
            return folder

        small, large = listing(1_000), listing(rows)
        command = [sys.executable, "-c", MEMORY, large, small, tmp_path / "cache"]
        grown = int(subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout)
        # kB, of 50 MB of 300,000 rows (200 as Python's objects): the order's 10 bytes a row, the
        # block that was written last, and the allocator's slack.
        assert grown < limit, grown
