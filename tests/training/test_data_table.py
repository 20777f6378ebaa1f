"""The table of rows: written once, whole or not at all, and never in memory."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor, TimeoutError
from pathlib import Path

import pyarrow as pa
import pytest
from PIL import Image

from training.data import table as module
from training.data.table import Row, TableSource, cache_folder, table
from training.errors import TrainingError

ROOT = Path(__file__).resolve().parents[2]
ROWS = [Row("a.jpg", "x"), Row("b.jpg", "y", "r.jpg", 3, 4)]


class Reading:
    """Rows that say whether they were read."""

    def __init__(self, rows=ROWS):
        self.rows, self.times = rows, 0

    def __iter__(self):
        self.times += 1
        return iter(self.rows)


def test_read_once(tmp_path):
    first, again, changed = Reading(), Reading(), Reading()
    found = table("key", first, "how", tmp_path)
    assert table("key", again, "how", tmp_path) == found
    assert table("other key", changed, "how", tmp_path) != found
    assert (first.times, again.times, changed.times) == (1, 0, 1)
    source = TableSource(*found, root=Path("/root"))
    assert source[1].image == Path("/root/b.jpg")
    assert source[1].reference == Path("/root/r.jpg")
    assert source.sizes().tolist() == [[0, 0], [3, 4]]


def test_one_writes_and_others_wait(tmp_path):
    begun, may_end = threading.Event(), threading.Event()

    def slow():
        begun.set()
        yield ROWS[0]
        assert may_end.wait(30)

    second = Reading()
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(table, "key", slow(), "how", tmp_path)
        assert begun.wait(30)
        waiting = pool.submit(table, "key", second, "how", tmp_path)
        with pytest.raises(TimeoutError):
            waiting.result(0.3)
        may_end.set()
        assert waiting.result(30) == first.result(30)
    assert second.times == 0


def test_workers_get_no_copy_of_the_rows(tmp_path):
    rows = [Row(f"{n}.jpg", "caption " * 100) for n in range(100)]
    data = pickle.dumps(TableSource(*table("key", rows, "how", tmp_path), root=tmp_path))
    assert len(data) < 5000
    assert pickle.loads(data)[99].name == "99.jpg"


def test_fingerprint_is_of_the_rows(tmp_path):
    def fingerprint(key, rows):
        return table(key, rows, "how", tmp_path)[1]

    plain = fingerprint("a", ROWS)
    assert fingerprint("b", ROWS) == plain
    assert fingerprint("c", [ROWS[0], ROWS[1]._replace(text="z")]) != plain
    assert fingerprint("d", ROWS[::-1]) != plain
    assert fingerprint("e", [ROWS[0]._replace(reference="r.jpg"), ROWS[1]]) != plain


def test_more_than_a_block(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 7)
    rows = [Row(f"{n}.jpg", f"text {n}") for n in range(50)]
    source = TableSource(*table("key", rows, "how", tmp_path), root=tmp_path)
    assert [source[n].text for n in range(50)] == [row.text for row in rows]


def test_interrupted_while_writing(tmp_path):
    def cut():
        yield ROWS[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        table("key", cut(), "how", tmp_path)
    assert not [p for p in tmp_path.iterdir() if p.suffix != ".lock"]
    assert len(TableSource(*table("key", ROWS, "how", tmp_path), root=tmp_path)) == 2


def test_full_disk(tmp_path, monkeypatch):
    def full(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pa, "OSFile", full)
    with pytest.raises(TrainingError, match=r"No space left on device.*HF_DATASETS_CACHE"):
        table("key", ROWS, "how", tmp_path)


def test_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(TrainingError, match=r"'.*file/cache': .*HF_DATASETS_CACHE"):
        cache_folder(tmp_path / "file" / "cache")


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
from training.data.records import open_source
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
from training.data.records import open_source
source = open_source(sys.argv[1], cache_dir=sys.argv[2])
print(source.fingerprint, len(source), source[2999].text)
"""
    command = [sys.executable, "-c", code, str(tmp_path), str(tmp_path / "cache")]
    processes = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) for _ in range(3)]
    found = {process.communicate()[0] for process in processes}
    assert len(found) == 1
    assert b"3000 text 2999" in found.pop()


MEMORY = """
import gc, sys
from itertools import islice
from pathlib import Path
from training.data import buckets
from training.data.sampler import ProcessBatches
from training.data.records import open_source

def resident():
    gc.collect()
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0])

first = open_source(sys.argv[2], cache_dir=sys.argv[3])  # imports and pools count for both
buckets.by_aspect(first, 512, Path(sys.argv[3])).order(len(first), 4, seed=0)
before = resident()
source = open_source(sys.argv[1], cache_dir=sys.argv[3])
found = buckets.by_aspect(source, 512, Path(sys.argv[3]))
order = found.order(len(source), 4, seed=0)
for batch in islice(ProcessBatches(order), 500):
    for number, row in batch:
        source[row]
print(resident() - before)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs /proc")
def test_memory_does_not_grow_with_rows(tmp_path):
    def listing(rows):
        folder = tmp_path / str(rows)
        folder.mkdir()
        Image.new("RGB", (8, 8)).save(folder / "0.jpg")
        with (folder / "metadata.jsonl").open("w") as file:
            for n in range(rows):
                row = {"file_name": f"{n}.jpg", "text": f"caption {n} " * 8}
                file.write(json.dumps(row | {"height": 600 + n % 300, "width": 700}) + "\n")
        return folder

    small, large = listing(1_000), listing(300_000)
    cache = tmp_path / "cache"
    grown = {path.name: int(run(MEMORY, path, small, cache)) for path in (small, large)}
    # kB, of 50 MB of rows (200 as Python's objects): the order's 10 bytes a row, the block that
    # was written last, and the allocator's slack.
    assert grown["300000"] - grown["1000"] < 15_000, grown
