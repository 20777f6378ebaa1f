"""Files that list images, and folders of images with texts beside them, row by row."""

from __future__ import annotations

import csv
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from ..errors import TrainingError

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
IMAGES = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif")
BLOCK = 4096  # rows of a Parquet file in memory at a time
FIRST = 5  # names in a message

EMPTY = {"nan", "NaN", "NAN", "None", "none", "null", "NULL", "NA", "N/A", "n/a", "#N/A", "<NA>"}
"""What tables that know no empty cell hold in its place: as pandas reads a CSV."""

Values = dict[str, Any]
"""What a row says, by its columns."""

logger = logging.getLogger(__name__)


def find_metadata(folder: Path) -> Path | None:
    """Return the file that lists a folder's images, if any. Raises TrainingError for several."""
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


def read_listing(path: Path) -> Iterator[Values]:
    """Yield the rows of a JSON list, JSON lines, CSV or Parquet. Raises TrainingError."""
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise TrainingError(
            f"'{path}' is of no kind that lists pictures; expected {', '.join(_READERS)}, or a "
            "folder."
        )
    try:
        yield from reader(path)
    except (OSError, UnicodeDecodeError, csv.Error, pa.ArrowException) as error:
        raise TrainingError(f"'{path}' cannot be read: {error}.") from error


def _read_lines(path: Path) -> Iterator[Values]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                where = f"'{path}', line {number}"
                yield _object(_parsed(line, where), where)


def _read_list(path: Path) -> Iterator[Values]:
    values = _parsed(path.read_text(encoding="utf-8-sig"), f"'{path}'")
    if not isinstance(values, list):
        raise TrainingError(
            f"'{path}' begins with {str(values)[:20]!r}; expected a list as the reference scripts "
            'read it: [{"image_file": "a.jpg", "text": "…"}, …].'
        )
    for value in values:
        yield _object(value, f"'{path}'")


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise TrainingError(
            f"{where} is no complete JSON ({error}), near "
            f"{text[max(0, error.pos - 20) :][:60]!r}. It was cut short or edited by hand: correct "
            "it."
        ) from error


def _object(value: Any, where: str) -> Values:
    if not isinstance(value, dict):
        raise TrainingError(
            f"{where}: found {str(value)[:60]!r}; expected an object with the file name and the "
            "caption of a picture."
        )
    return value


def _read_csv(path: Path) -> Iterator[Values]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        for row in csv.DictReader(file):
            texts = {name: value for name, value in row.items() if isinstance(value, str)}
            yield row | {name: None for name, value in texts.items() if value in EMPTY}


def _read_parquet(path: Path) -> Iterator[Values]:
    with parquet.ParquetFile(path) as file:
        for block in file.iter_batches(BLOCK):
            yield from block.to_pylist()


_READERS: dict[str, Callable[[Path], Iterator[Values]]] = {
    ".jsonl": _read_lines,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".json": _read_list,
}


def read_folder(path: Path) -> Iterator[Values]:
    """Yield a row for each image, in the order of their names; captions lie in `.txt` files."""
    others: list[str] = []
    unnamed: list[str] = []
    any_image = False
    for place, names in _walk(path):
        present = set(names)
        for name in names:
            stem, extension = os.path.splitext(name)
            if extension.lower() in IMAGES:
                any_image = True
                if printable(os.path.join(place, name)) != os.path.join(place, name):
                    unnamed.append(printable(os.path.join(place, name)))
                    continue
                beside = f"{stem}.txt"
                text = _read_caption(path / place / beside) if beside in present else ""
                yield {"image": os.path.join(place, name), "text": text}
            elif len(others) < FIRST:
                others.append(os.path.join(place, name))
    if unnamed:
        logger.warning(
            "%d pictures are left out, whose names are no UTF-8 (%s%s): rename them.",
            len(unnamed),
            ", ".join(unnamed[:FIRST]),
            ", …" if len(unnamed) > FIRST else "",
        )
    if not any_image:
        there = f"Other files are there: {', '.join(others)}." if others else "It holds no files."
        raise TrainingError(
            f"There is no picture in '{path}' or the folders in it (looked for "
            f"{', '.join(IMAGES)}), nor a metadata.jsonl, .csv or .parquet. {there}"
        )


def folder_state(folder: Path) -> str:
    """Return a hash that changes when an image comes, goes or is renamed, or a text is written."""
    digest = hashlib.blake2b(digest_size=16)
    for place, names in _walk(folder):
        digest.update(b"\0" + os.fsencode(place))
        for name in names:
            extension = os.path.splitext(name)[1].lower()
            if extension == ".txt":
                stat = os.stat(folder / place / name)
                digest.update(b"\0" + os.fsencode(name))
                digest.update(f"\0{stat.st_size}\0{stat.st_mtime_ns}".encode())
            elif extension in IMAGES:
                digest.update(b"\0" + os.fsencode(name))
    return digest.hexdigest()


def _walk(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield each folder, relative, with the sorted names of its files; hidden ones left out."""
    seen = set()

    def unreadable(error: OSError) -> None:
        raise TrainingError(f"'{error.filename}' cannot be read: {error.strerror}.") from error

    for place, folders, names in os.walk(folder, onerror=unreadable, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:  # a link back into what was read already
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        relative = os.path.relpath(place, folder)
        visible = sorted(name for name in names if not name.startswith("."))
        yield ("" if relative == "." else relative), visible


def printable(name: str) -> str:
    """Return a name as text: bytes of it that are no UTF-8 are written out."""
    return name.encode("utf-8", "backslashreplace").decode()


def missing(value: Any) -> bool:
    """Return whether a cell is empty: nothing, NaN as tables hold it, or no letters."""
    return value is None or value != value or (isinstance(value, str) and not value.strip())


def _read_caption(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise TrainingError(
            f"'{path}' is no UTF-8 text ({error.reason} at byte {error.start}). Save it as UTF-8."
        ) from error
    except OSError as error:
        raise TrainingError(f"'{path}' cannot be read: {error.strerror}.") from error
