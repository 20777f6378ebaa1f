"""WebDataset shards as records: tar files on a disk or behind a URL."""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import braceexpand
from webdataset.gopen import gopen
from webdataset.tariterators import group_by_keys, tar_file_expander

from ..errors import TrainingError
from .records import USUAL, Columns, Record

ENDINGS = (".tar", ".tar.gz", ".tgz")
PICTURES = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "avif")
PEEKED = 3  # unreadable shards in a row that are taken for a wrong address


def is_stream(data: str | os.PathLike[str]) -> bool:
    """Whether `data` names WebDataset shards: `….tar`, a pattern of such, a URL or a folder of
    them."""
    text = os.fspath(data)
    path = Path(text).expanduser()
    if path.is_dir():
        return any(path.glob("*.tar")) and not any(path.glob("metadata.*"))
    return "://" in text or text.startswith("pipe:") or text.endswith(ENDINGS)


def expand_shards(data: str | os.PathLike[str]) -> tuple[str, ...]:
    """Every shard that `data` names: braces (`{000..099}`), `*` and folders are expanded.

    Raises TrainingError if it names none, or local ones that do not exist.
    """
    text = os.fspath(data)
    if "://" in text or text.startswith("pipe:"):
        return tuple(braceexpand.braceexpand(text))
    if Path(text).expanduser().is_dir():
        text = os.path.join(glob.escape(text), "*.tar")
    found: list[str] = []
    missing: list[str] = []
    for pattern in braceexpand.braceexpand(os.path.expanduser(text)):
        there = [pattern] if os.path.isfile(pattern) else sorted(glob.glob(pattern))
        found += there
        missing += [] if there else [pattern]
    if missing:
        more = ", …" if len(missing) > 5 else ""
        raise TrainingError(
            f"{len(missing)} of {len(found) + len(missing)} shards of '{data}' do not exist: "
            f"{', '.join(missing[:5])}{more}. Correct the pattern."
        )
    return tuple(found)


@dataclass(frozen=True)
class ShardReader:
    """Reads shards. `columns.text` names the key of captions in `.json` files;
    `default_caption` is the caption of pictures without."""

    columns: Columns = field(default_factory=Columns)
    default_caption: str | None = None

    def records(self, shard: str) -> Generator[Record]:
        """The samples of a shard, in its order.

        A shard that cannot be read to its end gives what could be, then a record that is broken
        and says so.
        """
        try:
            with gopen(shard) as stream:
                source = [{"url": shard, "stream": stream}]
                for sample in group_by_keys(tar_file_expander(source)):
                    yield self._record(sample, shard)
        except Exception as error:  # of tarfile, zlib, the network …
            # webdataset appends the stream to an error's message and arguments.
            found = getattr(error, "strerror", None) or next(iter(error.args), type(error).__name__)
            reason = str(found).partition(" @ ")[0]
            yield Record(shard, b"", "", broken=f"the rest of this shard is lost ({reason})")

    def check(self, shards: Sequence[str]) -> None:
        """Raise TrainingError unless the first shards can be read and hold pictures and
        captions."""
        broken = []
        for shard in shards[:PEEKED]:
            with closing(self.records(shard)) as records:
                first = next(records, None)
            if first is not None and first.name != shard:
                if not first.broken:
                    return
                raise TrainingError(
                    f"'{shard}' cannot be trained on: its first sample {first.name} is without "
                    f"what is needed ({first.broken})."
                )
            broken.append(f"'{shard}': {first.broken if first else 'it is empty'}")
        raise TrainingError(
            f"None of the first {len(broken)} of {len(shards)} shards can be read: "
            f"{'; '.join(broken)}. Expected tar files of a picture and a .txt or .json a sample."
        )

    def _record(self, sample: dict[str, Any], shard: str) -> Record:
        files = {key: value for key, value in sample.items() if not key.startswith("__")}
        references = [key for key in files if key.startswith("reference.") and _is_picture(key)]
        pictures = [key for key in files if _is_picture(key) and key not in references]
        name = f"{sample['__key__']} in {os.path.basename(shard)}"
        caption, wrong = self._caption(files)
        if not pictures:
            wrong = f"no picture among its files {', '.join(files)}"
        return Record(
            name=name,
            image=files[pictures[0]] if pictures else b"",
            text=caption,
            reference=files[references[0]] if references else None,
            broken=wrong,
        )

    def _caption(self, files: dict[str, bytes]) -> tuple[str, str]:
        """The caption, and what is wrong with it."""
        try:
            caption = self._found_caption(files) or self.default_caption
        except ValueError as error:
            return "", f"its caption cannot be read: {error}"
        if caption is None:
            return "", f"no caption (.txt or .json) among its files {', '.join(files)}"
        return caption, ""

    def _found_caption(self, files: dict[str, bytes]) -> str:
        asked = self.columns.text
        if "txt" in files and asked is None:
            return files["txt"].decode("utf-8-sig").strip()
        if "json" in files:
            found = json.loads(files["json"])
            for name in [asked] if asked else str(USUAL.text).split():
                if isinstance(found, dict) and isinstance(found.get(name), str):
                    return found[name].strip()
        return ""


def _is_picture(key: str) -> bool:
    return key.rpartition(".")[2] in PICTURES
