"""Pictures in files with a list of their captions: imagefolder's metadata, the reference's JSON."""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import NoneType
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from ..errors import TrainingError
from .beside import from_texts, state_of
from .records import Columns, pick_columns
from .table import BLOCK, Row, TableSource, cache_folder, table

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
PROBED = 16  # rows whose files are looked for before anything else

_CHUNK = 1 << 20  # characters of a JSON list read at a time
_BETWEEN = re.compile(r"[\s,]*")


def open_files(
    path: Path,
    image_root: str | os.PathLike[str] | None,
    columns: Columns,
    default_caption: str | None,
    cache_dir: str | os.PathLike[str] | None,
) -> TableSource:
    """A source of what lies at `path`; see `records.open_source`."""
    listing = _metadata_in(path) if path.is_dir() else path
    if listing is None:
        key = repr((str(path.absolute()), state_of(path), default_caption))
        rows, root = from_texts(path, default_caption), path
        how = "Write the caption of a.jpg to a.txt beside it, or all to a metadata.jsonl"
    else:
        stat = listing.stat()
        state = str(listing.absolute()), stat.st_size, stat.st_mtime_ns
        key = repr((state, columns, default_caption))
        rows = _from_listing(listing, columns, default_caption)
        root = Path(image_root).expanduser() if image_root else listing.parent
        how = f"Write captions to '{listing}'"
    source = TableSource(*table(key, rows, how, cache_folder(cache_dir)), root=root)
    _probe(source, path)
    return source


def _metadata_in(folder: Path) -> Path | None:
    present = [folder / name for name in METADATA if (folder / name).is_file()]
    if len(present) > 1:
        raise TrainingError(
            f"'{folder}' has {' and '.join(path.name for path in present)}; expected one of them. "
            "Give the path of the one to use."
        )
    if present:
        return present[0]
    below = sorted(path for name in METADATA for path in folder.glob(f"*/{name}"))
    if below:
        raise TrainingError(
            f"'{folder}' has no metadata of its own, but folders in it have: "
            f"{', '.join(str(path.relative_to(folder)) for path in below[:5])}. Give the path of "
            "the one to use."
        )
    return None


def _from_listing(path: Path, columns: Columns, default_caption: str | None) -> Iterator[Row]:
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise TrainingError(
            f"'{path}' is of no kind that lists pictures; expected {', '.join(_READERS)}, or a "
            "folder."
        )
    picked = None
    try:
        for number, found in enumerate(reader(path), 1):
            picked = picked or pick_columns(
                columns, list(map(str, found)), f"'{path}'", default_caption
            )
            yield _row(found, picked, default_caption, f"'{path}', row {number}")
    except (OSError, UnicodeDecodeError, csv.Error, pa.ArrowException) as error:
        raise TrainingError(f"'{path}' cannot be read: {error}.") from error
    if picked is None:
        raise TrainingError(f"'{path}' lists no pictures. Expected a row for each picture.")


def _row(found: dict[str, Any], columns: Columns, default_caption: str | None, where: str) -> Row:
    image, text = found.get(str(columns.image)), found.get(str(columns.text))
    reference = found.get(columns.reference) if columns.reference else None
    if not isinstance(image, str) or not image:
        raise TrainingError(
            f"{where}: '{columns.image}' is {image!r}; expected the file name of a picture."
        )
    if not isinstance(reference, (str, NoneType)):
        raise TrainingError(
            f"{where}: '{columns.reference}' is {reference!r}; expected the file name of a "
            "picture, or nothing."
        )
    if isinstance(text, (list, dict)):
        raise TrainingError(
            f"{where}: '{columns.text}' is {text!r}; expected one caption as a text."
        )
    caption = "" if text is None else str(text).strip()
    height, width = _pixels(found.get("height")), _pixels(found.get("width"))
    return Row(image, caption or default_caption, reference, height, width)


def _pixels(value: Any) -> int:
    try:
        return max(0, int(value))
    except (TypeError, ValueError):
        return 0  # not told: the picture's header is read


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                found = json.loads(line)
            except ValueError as error:
                raise TrainingError(
                    f"'{path}', line {number} is no JSON ({error}): {line[:60]!r}. Correct this "
                    "line."
                ) from error
            yield _object(found, f"'{path}', line {number}")


def _comma_separated(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        yield from csv.DictReader(file)


def _parquet(path: Path) -> Iterator[dict[str, Any]]:
    with parquet.ParquetFile(path) as file:
        for block in file.iter_batches(BLOCK):
            yield from block.to_pylist()


def _list(path: Path) -> Iterator[dict[str, Any]]:
    """A JSON list, object by object: a list of millions need not fit in memory."""
    decoder, size = json.JSONDecoder(), _CHUNK
    with path.open(encoding="utf-8-sig") as file:
        buffer = file.read(size).lstrip()
        if buffer[:1] != "[":
            raise TrainingError(
                f"'{path}' begins with {buffer[:20]!r}; expected a list as the reference scripts "
                'read it: [{"image_file": "a.jpg", "text": "…"}, …].'
            )
        place = 1
        while True:
            place = _BETWEEN.match(buffer, place).end()  # type: ignore[union-attr]
            if buffer[place : place + 1] == "]":
                return
            try:
                found, place = decoder.raw_decode(buffer, place)
                size = _CHUNK
            except ValueError as error:  # cut by the end of the buffer, or damaged
                more = file.read(size)
                if not more:
                    raise TrainingError(
                        f"'{path}' is no complete JSON list ({error}). It was cut short or edited "
                        f"by hand; near the end of what could be read: {buffer[place:][:60]!r}."
                    ) from error
                buffer, place = buffer[place:] + more, 0
                size *= 2  # so that a damaged file is not tried again too often
            else:
                yield _object(found, f"'{path}'")


def _object(found: Any, where: str) -> dict[str, Any]:
    if not isinstance(found, dict):
        raise TrainingError(
            f"{where}: found {str(found)[:60]!r}; expected an object with the file name and the "
            "caption of a picture."
        )
    return found


_READERS: dict[str, Callable[[Path], Iterator[dict[str, Any]]]] = {
    ".jsonl": _lines,
    ".csv": _comma_separated,
    ".parquet": _parquet,
    ".json": _list,
}


def _probe(source: TableSource, path: Path) -> None:
    rows = np.unique(np.linspace(0, len(source) - 1, PROBED).astype(int))
    tried = [source[row].image for row in rows]
    if not any(isinstance(image, Path) and image.is_file() for image in tried):
        raise TrainingError(
            f"None of {len(tried)} pictures that '{path}' lists, tried from its first to its last "
            f"row, is there: looked for '{source.root / source[0].name}'. File names are relative "
            f"to '{source.root}'; set image_root to the folder that they are relative to."
        )
