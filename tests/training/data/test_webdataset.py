"""WebDataset shards: where they lie, what a sample is, and what is said of bad ones."""

from __future__ import annotations

import gzip
import http.server
import json
import shutil
import threading
from functools import partial

import pytest
from PIL import Image

from tests.support.image_folders import encoded, shard
from training.data.sources import Columns, Record
from training.data.webdataset import ShardReader, expand_shards, is_stream
from training.errors import TrainingError


def png(shade=0):
    return encoded(Image.new("L", (8, 8), shade))


PAIRS = {"000.png": png(), "000.txt": b"zero\n", "001.png": png(1), "001.txt": "eins ü".encode()}


def records(path, **options):
    return list(ShardReader(**options).records(path))


@pytest.mark.parametrize(
    "data",
    ["a/{000..009}.tar", "x.tar", "x.tar.gz", "https://host/x.tar", "pipe:cat x", "s3://b/x"],
)
def test_what_is_a_stream(data):
    assert is_stream(data)


def test_what_is_none(tmp_path):
    assert not any(map(is_stream, (tmp_path, "list.json", "metadata.jsonl", "pictures")))
    shard(tmp_path / "a.tar", PAIRS)
    assert is_stream(tmp_path)
    (tmp_path / "metadata.jsonl").write_text("")
    assert not is_stream(tmp_path)


def test_patterns(tmp_path):
    paths = [shard(tmp_path / f"{n:03d}.tar", PAIRS) for n in range(12)]
    assert expand_shards(f"{tmp_path}/{{000..011}}.tar") == tuple(paths)
    assert expand_shards(f"{tmp_path}/{{000,003}}.tar") == (paths[0], paths[3])
    assert expand_shards(tmp_path / "*.tar") == expand_shards(tmp_path) == tuple(paths)
    assert expand_shards("https://h/{0..2}.tar") == tuple(f"https://h/{n}.tar" for n in range(3))
    with pytest.raises(TrainingError, match=r"2 of 14 shards.*012\.tar, .*013\.tar\. Correct"):
        expand_shards(f"{tmp_path}/{{000..013}}.tar")
    with pytest.raises(TrainingError, match="do not exist"):
        expand_shards(f"{tmp_path}/none-*.tar")


def test_pairs(tmp_path):
    path = shard(tmp_path / "a.tar", PAIRS)
    assert records(path) == [
        Record("000 in a.tar", png(), "zero"),
        Record("001 in a.tar", png(1), "eins ü"),
    ]


@pytest.mark.parametrize(
    "files, options, expected",
    [
        ({"a.JPG": b"x", "a.TXT": b"t"}, {}, ("t", b"x", None)),
        ({"a.webp": b"x", "a.json": b'{"caption": "c", "n": 1}'}, {}, ("c", b"x", None)),
        (
            {"a.jpg": b"x", "a.txt": b"t", "a.json": b'{"alt": "from json"}'},
            {"columns": Columns(text="alt")},
            ("from json", b"x", None),
        ),
        (
            {"a.reference.png": b"r", "a.jpg": b"x", "a.txt": b"t"},
            {},
            ("t", b"x", b"r"),
        ),
        ({"dir/a.jpg": b"x", "dir/a.txt": b"t"}, {}, ("t", b"x", None)),
        ({"a.v2.jpg": b"x", "a.txt": b"t"}, {}, ("t", b"x", None)),
        ({"a.jpg": b"x"}, {"default_caption": ""}, ("", b"x", None)),
        ({"a.jpg": b"x", "a.txt": b" "}, {"default_caption": "d"}, ("d", b"x", None)),
        ({"a.jpg": b"x", "a.json": b"[1]"}, {"default_caption": "d"}, ("d", b"x", None)),
    ],
)
def test_samples(files, options, expected, tmp_path):
    (found,) = records(shard(tmp_path / "a.tar", files), **options)
    assert (found.text, found.image, found.reference) == expected
    assert not found.broken


@pytest.mark.parametrize(
    "files, said",
    [
        ({"a.jpg": b"x", "a.cls": b"1"}, "no caption (.txt or .json) among its files jpg, cls"),
        ({"a.jpg": b"x", "a.txt": b"  "}, "no caption"),
        ({"a.txt": b"t", "a.mp4": b"x"}, "no picture among its files txt, mp4"),
        ({"a.jpg": b"x", "a.json": b"{bad"}, "its caption cannot be read"),
        ({"a.jpg": b"x", "a.txt": b"\xff"}, "its caption cannot be read"),
        ({"a.reference.jpg": b"x", "a.txt": b"t"}, "no picture"),
    ],
)
def test_samples_that_lack_something(files, said, tmp_path):
    path = shard(tmp_path / "a.tar", files)
    (found,) = records(path)
    assert said in found.broken
    with pytest.raises(TrainingError, match=r"a\.tar.*first sample a in a\.tar") as error:
        ShardReader().check([path])
    assert said in str(error.value)


def test_compressed_and_piped(tmp_path):
    path = shard(tmp_path / "a.tar", PAIRS)
    with open(path, "rb") as plain, gzip.open(tmp_path / "a.tar.gz", "wb") as packed:
        shutil.copyfileobj(plain, packed)
    for other in (tmp_path / "a.tar.gz", f"pipe:cat '{path}'", f"file:{path}"):
        assert [record.text for record in records(str(other))] == ["zero", "eins ü"]


def test_a_shard_cut_short_gives_what_it_has(tmp_path):
    files = {f"{n:02d}.{ending}": b"t" * 3000 for n in range(10) for ending in ("png", "txt")}
    path = tmp_path / "a.tar"
    shard(path, files)
    path.write_bytes(path.read_bytes()[:45_000])
    found = records(str(path))
    assert [record.name for record in found[:-1]] == [f"{n:02d} in a.tar" for n in range(5)]
    assert found[-1].name == str(path)
    assert "rest of this shard is lost (unexpected end of data)" in found[-1].broken


@pytest.mark.parametrize(
    "content, said",
    [(None, "No such file"), (b"", "empty file"), (b"no tar" * 500, "invalid header")],
    ids=["missing", "empty", "something else"],
)
def test_shards_that_are_none(content, said, tmp_path):
    path = tmp_path / "a.tar"
    if content is not None:
        path.write_bytes(content)
    (found,) = records(str(path))
    assert said in found.broken
    with pytest.raises(TrainingError, match="None of the first 3 of 5 shards can be read") as error:
        ShardReader().check([str(path)] * 5)
    assert str(path) in str(error.value)
    good = shard(tmp_path / "good.tar", PAIRS)
    ShardReader().check([str(path), good])


def test_an_empty_tar_is_no_error_by_itself(tmp_path):
    path = shard(tmp_path / "a.tar", {})
    assert records(path) == []
    with pytest.raises(TrainingError, match="it is empty"):
        ShardReader().check([path])


@pytest.mark.skipif(shutil.which("curl") is None, reason="webdataset reads URLs with curl")
def test_urls(tmp_path):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments):
            pass

    shard(tmp_path / "a.tar", PAIRS | {"meta.json": json.dumps({}).encode()})
    handler = partial(Quiet, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        assert [r.text for r in records(f"{address}/a.tar")][:2] == ["zero", "eins ü"]
        (missing,) = records(f"{address}/b.tar")
        assert "lost" in missing.broken
        assert missing.name == f"{address}/b.tar"
        server.shutdown()
