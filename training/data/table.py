"""Rows of files in an Arrow table on the disk: memory does not grow with their number."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, config
from filelock import FileLock

from ..errors import TrainingError
from .records import Record, missing_captions

logger = logging.getLogger(__name__)

VERSION = 1  # of the table's layout: another number makes new tables
BLOCK = 4096  # rows that are in memory at a time while a table is written
FIRST = 5  # names in a message

_SCHEMA = pa.schema(
    [
        ("image", pa.string()),
        ("text", pa.string()),
        ("reference", pa.string()),
        ("height", pa.int32()),
        ("width", pa.int32()),
    ]
)


class Row(NamedTuple):
    """What a table holds: paths as the data has them; sizes in pixels, 0 where not told."""

    image: str
    text: str | None
    reference: str | None = None
    height: int = 0
    width: int = 0


class TableSource:
    """A `Source` of pictures in files. Paths are relative to `root`."""

    def __init__(self, path: Path, fingerprint: str, root: Path) -> None:
        self._rows = Dataset.from_file(str(path))
        self.fingerprint = fingerprint
        self.root = root

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: int) -> Record:
        found: dict[str, Any] = self._rows[int(row)]
        reference = found["reference"]
        return Record(
            name=found["image"],
            image=self.root / found["image"],
            text=found["text"],
            reference=self.root / reference if reference else None,
        )

    def sizes(self) -> np.ndarray | None:
        """Height and width where the data tells them, (rows, 2) int32; None if it tells none."""
        found = read_sizes(self._rows)
        return found if found.any() else None


def read_sizes(rows: Dataset) -> np.ndarray:
    """The columns `height` and `width`, (rows, 2) int32; 0 where there is none."""
    found = np.zeros((len(rows), 2), np.int32)
    for place, name in enumerate(("height", "width")):
        start = 0
        for chunk in rows.data.column(name).chunks:  # one at a time: copies stay small
            found[start : start + len(chunk), place] = pc.fill_null(chunk, 0).to_numpy().clip(0)
            start += len(chunk)
    return found


def cache_folder(cache_dir: str | os.PathLike[str] | None) -> Path:
    """Where tables and picture sizes are kept, made if it is not there.

    Raises TrainingError if it cannot be written.
    """
    folder = Path(cache_dir or Path(config.HF_DATASETS_CACHE) / "ip_adapter_training")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise TrainingError(
            f"The list of pictures cannot be kept in '{folder}': {error.strerror}. Name a folder "
            "that can be written in the environment variable HF_DATASETS_CACHE."
        ) from error
    return folder


def table(key: str, read: Iterable[Row], how: str, folder: Path) -> tuple[Path, str]:
    """The table of `read`'s rows and their fingerprint; read and written if it is not there.

    `key` stands for the state of the files that are read. One process writes, others wait. `how`
    says how to give captions. Raises TrainingError for no rows, missing captions, a full disk.
    """
    path = folder / f"{hashlib.blake2b(f'{VERSION} {key}'.encode(), digest_size=16).hexdigest()}"
    rows, identity = path.with_suffix(".arrow"), path.with_suffix(".json")
    with FileLock(path.with_suffix(".lock")):
        if not identity.exists():  # written last
            temporary = path.with_suffix(f".{os.getpid()}.tmp")
            try:
                fingerprint = _write(temporary, read, how)
                os.replace(temporary, rows)
                temporary.write_text(json.dumps({"fingerprint": fingerprint}))
                os.replace(temporary, identity)
            except OSError as error:
                raise TrainingError(
                    f"The list of pictures could not be written to '{folder}': {error.strerror}. "
                    "Make room there, or name another folder in the environment variable "
                    "HF_DATASETS_CACHE."
                ) from error
            finally:
                temporary.unlink(missing_ok=True)
    return rows, json.loads(identity.read_text())["fingerprint"]


def _write(path: Path, rows: Iterable[Row], how: str) -> str:
    digest = hashlib.blake2b(digest_size=16)
    count, lacking = 0, 0
    first: list[str] = []
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, _SCHEMA) as writer:
        for block in _blocks(rows):
            for row in block:
                if row.text is None:
                    lacking += 1
                    first += [row.image] if len(first) < FIRST else []
                digest.update(json.dumps(row[:3]).encode())
            count += len(block)
            columns = zip(*block, strict=True)
            arrays = [pa.array(c, f.type) for c, f in zip(columns, _SCHEMA, strict=True)]
            writer.write_batch(pa.record_batch(arrays, schema=_SCHEMA))
    if lacking:
        raise missing_captions(lacking, count, first, how)
    logger.info("%d pictures listed in '%s'", count, path.parent)
    return digest.hexdigest()


def _blocks(rows: Iterable[Row]) -> Iterable[list[Row]]:
    block: list[Row] = []
    for row in rows:
        block.append(row)
        if len(block) == BLOCK:
            yield block
            block = []
    if block:
        yield block
