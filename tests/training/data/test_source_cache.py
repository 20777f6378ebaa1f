"""Rows are written to the cache folder once, whole or not at all, and never in memory."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
from PIL import Image

from training.data import listings, sources
from training.data.sources import open_source
from training.errors import TrainingError

ROOT = Path(__file__).resolve().parents[3]
ROWS = [{"file_name": "a.jpg", "text": "x"}, {"file_name": "a.jpg", "text": "y", "height": 3}]


@pytest.fixture
def listed(tmp_path):
    """Write rows to a list of their own and open it."""
    Image.new("RGB", (8, 8)).save(tmp_path / "a.jpg")

    def listed(rows=ROWS, name="list.jsonl"):
        (tmp_path / name).write_text("\n".join(map(json.dumps, rows)))
        return open_source(tmp_path / name, cache_dir=tmp_path / "cache")

    return listed


def test_read_once(listed, tmp_path, monkeypatch):
    expected = listed().fingerprint
    assert open_source(tmp_path / "list.jsonl", cache_dir=tmp_path / "cache").sizes().any()
    times = []
    row = sources._row
    monkeypatch.setattr(sources, "_row", lambda *given: times.append(1) or row(*given))
    again = open_source(tmp_path / "list.jsonl", cache_dir=tmp_path / "cache")
    assert (again.fingerprint, times) == (expected, [])
    listed([*ROWS, ROWS[0]])
    assert len(times) == 3


def test_workers_get_no_copy_of_the_rows(listed):
    rows = [{"file_name": "a.jpg", "text": f"caption {n}" * 100} for n in range(1000)]
    data = pickle.dumps(listed(rows))
    assert len(data) < 20_000
    assert pickle.loads(data)[999].text == "caption 999" * 100


def test_fingerprint_is_of_the_rows(listed):
    plain = listed().fingerprint
    assert listed(name="other.jsonl").fingerprint == plain
    assert listed([ROWS[0], ROWS[1] | {"text": "z"}]).fingerprint != plain
    assert listed(ROWS[::-1]).fingerprint != plain
    assert listed([ROWS[0] | {"reference": "r.jpg"}, ROWS[1]]).fingerprint != plain


def test_more_than_a_block(listed, monkeypatch):
    rows = [{"file_name": "a.jpg", "text": f"text {n}"} for n in range(50)]
    expected = listed(rows).fingerprint
    monkeypatch.setattr(datasets.config, "DEFAULT_MAX_BATCH_SIZE", 7)
    source = listed(rows, "other.jsonl")
    assert len(source._rows.data.column("text").chunks) > 1
    assert [source[n].text for n in range(50)] == [row["text"] for row in rows]
    assert source.fingerprint == expected


def test_interrupted_while_writing(listed, tmp_path, monkeypatch):
    def cut(path):
        yield ROWS[0]
        yield ROWS[0]
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setitem(listings._READERS, ".jsonl", cut)
        with pytest.raises(KeyboardInterrupt):
            listed()
    assert not list((tmp_path / "cache").rglob("*.arrow"))
    assert len(listed()) == 2


def test_full_disk(listed, monkeypatch):
    def full(*given, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(datasets.arrow_writer.ArrowWriter, "finalize", full)
    with pytest.raises(TrainingError, match=r"No space left on device.*HF_DATASETS_CACHE"):
        listed()


def test_folder_that_cannot_be_written(listed, tmp_path):
    listed()
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(TrainingError, match=r"'.*file/cache': .*HF_DATASETS_CACHE"):
        open_source(tmp_path / "list.jsonl", cache_dir=tmp_path / "file" / "cache")


def run(code, *arguments, **environment):
    result = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | environment,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_default_folder_is_hugging_faces_and_nothing_needs_a_network(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.jpg")
    (tmp_path / "a.txt").write_text("x")
    code = """
import socket, sys
def refuse(*arguments, **options): raise SystemExit("a network was asked for")
socket.socket.connect = socket.getaddrinfo = refuse
from training.data.sources import open_source
print(open_source(sys.argv[1])[0].text)
"""
    assert run(code, tmp_path, HF_DATASETS_CACHE=str(tmp_path / "hf")) == "x"
    assert list((tmp_path / "hf").rglob("*.arrow"))


def test_processes_at_once(tmp_path):
    listed = [json.dumps({"file_name": "a.jpg", "text": f"text {n}"}) for n in range(3000)]
    Image.new("RGB", (8, 8)).save(tmp_path / "a.jpg")
    (tmp_path / "metadata.jsonl").write_text("\n".join(listed))
    code = """
import sys
from training.data.sources import open_source
source = open_source(sys.argv[1], cache_dir=sys.argv[2])
print(source.fingerprint, len(source), source[2999].text)
"""
    command = [sys.executable, "-c", code, str(tmp_path), str(tmp_path / "cache")]
    processes = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) for _ in range(2)]
    found = {process.communicate()[0] for process in processes}
    assert len(found) == 1
    assert b"3000 text 2999" in found.pop()


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


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs /proc")
@pytest.mark.parametrize(
    "rows, limit", [(60_000, 8_000), pytest.param(300_000, 16_000, marks=pytest.mark.nightly)]
)
def test_memory_does_not_grow_with_rows(rows, limit, tmp_path):
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
    grown = int(run(MEMORY, large, small, tmp_path / "cache"))
    # kB, of 50 MB of 300,000 rows (200 as Python's objects): the order's 10 bytes a row, the
    # block that was written last, and the allocator's slack.
    assert grown < limit, grown
