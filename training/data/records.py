"""Rows of pictures and captions, whatever they lie in; nothing is decoded here."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from ..errors import TrainingError
from .image import Picture


@dataclass(frozen=True)
class Record:
    """One row. `name` is for messages; `reference` a reference picture other than the target.

    `broken` says what is known to be wrong with it before anything is decoded, or is empty.
    """

    name: str
    image: Picture
    text: str
    reference: Picture | None = None
    broken: str = ""


@dataclass(frozen=True)
class Columns:
    """Names of columns, or None: the first of the usual names that is there."""

    image: str | None = None
    text: str | None = None
    reference: str | None = None


USUAL = Columns(
    image="file_name image_file image file path",
    text="text caption prompt",
    reference="reference_file_name reference_file reference_image reference",
)


def pick_columns(
    columns: Columns, found: list[str], where: str, default_caption: str | None
) -> Columns:
    """The columns to read, of those found. None for references, if there are none, and for
    captions, if there are none and a default caption is given.

    Raises TrainingError, naming the columns that are there, if a column was asked for that is
    not, or if no usual name of the pictures or the captions is.
    """
    picked = {}
    for role in ("image", "text", "reference"):
        asked, usual = getattr(columns, role), getattr(USUAL, role).split()
        if asked is not None and asked not in found:
            raise TrainingError(
                f"{where} has no column '{asked}' for the {_ROLES[role]}; its columns are "
                f"{', '.join(found) or 'none'}. Name one of these."
            )
        picked[role] = asked or next((name for name in usual if name in found), None)
        optional = role == "reference" or (role == "text" and default_caption is not None)
        if picked[role] is None and not optional:
            raise TrainingError(
                f"{where} has no column for the {_ROLES[role]} (looked for {', '.join(usual)}); "
                f"its columns are {', '.join(found) or 'none'}. Rename one, or name it in the "
                "settings."
            )
    return Columns(**picked)


_ROLES = {"image": "pictures", "text": "captions", "reference": "reference pictures"}


class Source(Protocol):
    """Rows by number. `fingerprint` identifies them all, for a cache and for resuming."""

    fingerprint: str

    def __len__(self) -> int: ...

    def __getitem__(self, row: int) -> Record: ...

    def sizes(self) -> np.ndarray | None:
        """(rows, 2) int32, height and width as the data tells them, 0 where it does not; None if
        it tells none."""


def open_source(
    data: str | os.PathLike[str],
    *,
    image_root: str | os.PathLike[str] | None = None,
    columns: Columns = Columns(),
    default_caption: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> Source:
    """Rows of `data`: of which kind it is follows from what lies there.

    - a folder with `metadata.jsonl`, `.csv` or `.parquet` (Hugging Face's imagefolder), or such a
      file itself: `file_name` is relative to it, or to `image_root`;
    - a folder of pictures, folders in it included, with a `.txt` beside each;
    - a JSON file of the reference scripts: `[{"image_file": …, "text": …}]`;
    - a folder that `datasets.Dataset.save_to_disk` wrote (of a DatasetDict: `train`).

    Rows lie in an Arrow file and are read through a memory map. For a dataset that is its own; for
    the others one is written to `cache_dir` (default: Hugging Face's cache folder) once, and
    again when the files change. `default_caption` is the caption of pictures that have none.
    Raises TrainingError if nothing usable lies there, or captions are missing.
    """
    from . import disk, files  # here: they import `datasets`, which a stream does without

    path = Path(data).expanduser()
    if not path.exists():
        raise TrainingError(_not_found(path))
    if path.is_dir() and disk.is_dataset(path):
        return disk.open_dataset(path, image_root, columns, default_caption)
    return files.open_files(path, image_root, columns, default_caption, cache_dir)


def missing_captions(count: int, rows: int, first: list[str], how: str) -> TrainingError:
    """The error for pictures without captions."""
    more = ", …" if count > len(first) else ""
    return TrainingError(
        f"{count} of {rows} pictures have no caption: {', '.join(first)}{more}. {how}, leave "
        "these pictures out, or set a default caption (an empty one trains without text)."
    )


def _not_found(path: Path) -> str:
    path = path.absolute()
    parent = next(p for p in path.parents if p.is_dir())
    try:
        there = sorted(entry.name for entry in os.scandir(parent))
    except OSError:
        there = []
    listing = ", ".join(there[:8]) + (", …" if len(there) > 8 else "") if there else "nothing"
    return (
        f"There is no '{path}'. Expected a folder of pictures and captions, a JSON of the "
        "reference scripts, a `datasets` folder, or WebDataset shards (.tar). In "
        f"'{parent}' lies: {listing}."
    )
