"""A folder of pictures, folders in it included, with a `.txt` beside each."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from ..errors import TrainingError
from .table import Row

PICTURES = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif")


def from_texts(folder: Path, default_caption: str | None) -> Iterator[Row]:
    """A row a picture, in the order of their names.

    Raises TrainingError if there is no picture, or a caption is not UTF-8.
    """
    none = True
    others: list[str] = []
    for place, names in _walk(folder):
        there = set(names)
        for name in names:
            stem, extension = os.path.splitext(name)
            if extension.lower() in PICTURES:
                none = False
                beside = Path(folder, place, stem + ".txt")
                text = _caption(beside) if beside.name in there else ""
                yield Row(os.path.join(place, name), text or default_caption)
            elif len(others) < 5:
                others.append(os.path.join(place, name))
    if none:
        found = f"Other files are there: {', '.join(others)}." if others else "It holds no files."
        raise TrainingError(
            f"There is no picture in '{folder}' or the folders in it (looked for "
            f"{', '.join(PICTURES)}), nor a metadata.jsonl, .csv or .parquet. {found}"
        )


def state_of(folder: Path) -> str:
    """Changes when a picture comes, goes or is renamed, or a caption is written."""
    digest = hashlib.blake2b(digest_size=16)
    for place, names in _walk(folder):
        digest.update(f"\0{place}".encode())
        for name in names:
            extension = os.path.splitext(name)[1].lower()
            if extension == ".txt":
                stat = os.stat(Path(folder, place, name))
                digest.update(f"\0{name}\0{stat.st_size}\0{stat.st_mtime_ns}".encode())
            elif extension in PICTURES:
                digest.update(f"\0{name}".encode())
    return digest.hexdigest()


def _walk(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Each folder, relative, with the sorted names of its files; hidden ones left out."""
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


def _caption(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise TrainingError(
            f"'{path}' is no UTF-8 text ({error.reason} at byte {error.start}). Save it as UTF-8."
        ) from error
    except OSError as error:
        raise TrainingError(f"'{path}' cannot be read: {error.strerror}.") from error
