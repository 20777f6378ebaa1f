"""Folders that `datasets` wrote, read through its memory map."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset, DatasetDict, Image, load_from_disk

from ..errors import TrainingError
from .image import Picture
from .records import Columns, Record, missing_captions, pick_columns
from .table import FIRST, read_sizes

MARKS = ("state.json", "dataset_dict.json")


def is_dataset(folder: Path) -> bool:
    """Whether `save_to_disk` wrote this folder."""
    return any((folder / mark).is_file() for mark in MARKS)


class DatasetSource:
    """A `Source` of pictures in a column: of `datasets.Image`, encoded bytes, or paths relative
    to `root`. Raises TrainingError for columns of other kinds and missing captions."""

    def __init__(
        self, dataset: Dataset, columns: Columns, default_caption: str | None, root: Path
    ) -> None:
        where = f"'{root}'"
        if not len(dataset):
            raise TrainingError(f"{where} holds no rows. Expected a row for each picture.")
        names = dataset.column_names
        self._columns = pick_columns(columns, names, where, default_caption)
        self._default_caption, self._root = default_caption, root
        state = dataset._fingerprint, self._columns, default_caption
        self.fingerprint = hashlib.blake2b(repr(state).encode(), digest_size=16).hexdigest()
        for column in (self._columns.image, self._columns.reference):
            if column is not None:
                _check_pictures(dataset, column, where)
        if self._columns.text is not None:
            _check_captions(dataset, self._columns.text, default_caption, where)
        self._has_sizes = all(
            "int" in str(getattr(dataset.features.get(name), "dtype", ""))
            for name in ("height", "width")
        )
        used = {*vars(self._columns).values(), *(("height", "width") if self._has_sizes else ())}
        # As Arrow, so that pictures stay encoded bytes.
        kept = [name for name in names if name in used]
        self._rows = dataset.select_columns(kept).with_format("arrow")

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: int) -> Record:
        found: dict[str, Any] = self._rows[int(row)].to_pylist()[0]
        image, text, reference = (
            None if name is None else found[name] for name in vars(self._columns).values()
        )
        name = f"row {row}"
        if isinstance(image, dict) and image["path"]:
            name += f" ({os.path.basename(image['path'])})"
        elif isinstance(image, str):
            name += f" ({image})"
        return Record(
            name=name,
            image=self._picture(image) or b"",
            text=(text or "").strip() or self._default_caption or "",
            reference=self._picture(reference),
        )

    def _picture(self, value: Any) -> Picture | None:
        if isinstance(value, dict):
            value = value["bytes"] or value["path"]
        return self._root / value if isinstance(value, str) else value

    def sizes(self) -> np.ndarray | None:
        """Height and width where the data tells them, (rows, 2) int32; None if it tells none."""
        if not self._has_sizes:
            return None
        return read_sizes(self._rows)


def open_dataset(
    folder: Path,
    image_root: str | os.PathLike[str] | None,
    columns: Columns,
    default_caption: str | None,
) -> DatasetSource:
    """A source of a dataset on the disk; see `records.open_source`."""
    try:
        dataset = load_from_disk(str(folder))
    except IndexError:  # `datasets` 5 fails so for one without rows
        raise TrainingError(f"'{folder}' holds no rows. Expected a row for each picture.") from None
    except Exception as error:  # of many kinds, for damaged files
        raise TrainingError(
            f"'{folder}' looks like a dataset that `save_to_disk` wrote, but cannot be loaded "
            f"({type(error).__name__}: {error}). Save it again."
        ) from error
    if isinstance(dataset, DatasetDict):
        splits = list(dataset)
        chosen = "train" if "train" in splits else splits[0] if len(splits) == 1 else None
        if chosen is None:
            raise TrainingError(
                f"'{folder}' has the splits {', '.join(splits)}, none of them 'train'. Give the "
                f"folder of one: '{folder / splits[0]}'."
            )
        dataset = dataset[chosen]
    root = Path(image_root).expanduser() if image_root else folder
    return DatasetSource(dataset, columns, default_caption, root)


def _check_pictures(dataset: Dataset, column: str, where: str) -> None:
    feature = dataset.features[column]
    if isinstance(feature, Image):
        return
    kind = getattr(feature, "dtype", type(feature).__name__)
    if kind not in ("string", "large_string", "binary", "large_binary"):
        raise TrainingError(
            f"{where}: column '{column}' holds {kind}; expected pictures (`datasets.Image`), "
            "encoded bytes, or paths. Name another column, or cast it with "
            f"dataset.cast_column('{column}', datasets.Image())."
        )


def _check_captions(dataset: Dataset, column: str, default_caption: str | None, where: str) -> None:
    kind = getattr(dataset.features[column], "dtype", None)
    if kind not in ("string", "large_string"):
        raise TrainingError(
            f"{where}: column '{column}' holds {dataset.features[column]}; expected one caption as "
            "a text in each row."
        )
    if default_caption is not None:
        return
    lacking: list[int] = []
    start = 0
    for chunk in dataset.data.column(column).chunks:  # one at a time: memory stays flat
        blank = pc.equal(pc.utf8_trim_whitespace(chunk), "")
        found = pc.indices_nonzero(pc.fill_null(blank, True)).to_numpy()
        lacking += (found + start).tolist()
        start += len(chunk)
    if lacking:
        first = [f"row {row}" for row in lacking[:FIRST]]
        how = f"Fill column '{column}'"
        raise missing_captions(len(lacking), len(dataset), first, how)
