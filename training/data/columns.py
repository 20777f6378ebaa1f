"""Columns that say which rows are trained on, and how often: a split, a class, a hand."""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any

import numpy as np
from datasets import ClassLabel

from ..errors import TrainingError
from .listings import Values, find_metadata, missing, read_listing
from .sources import BLOCK, is_saved, load_saved

Scalar = str | bool | int | float | None

HELD_OUT = ("validation", "val", "test", "held_out")
TRUE = "true"  # as a boolean is written where there are texts only, as in a CSV
TOLD = 8  # values in a message


@dataclass(frozen=True, eq=False)
class Column:
    """What a column says of each row: `values[of_row[row]]`, None for an empty cell.

    `values` are different from one another; `of_row` (rows,) int32.
    """

    name: str
    values: tuple[Scalar, ...]
    of_row: np.ndarray

    def told(self, rows: np.ndarray | None = None) -> str:
        """Return the values and how many rows have each, of all rows or of `rows` (rows,) bool."""
        of_row = self.of_row if rows is None else self.of_row[rows]
        counts = np.bincount(of_row, minlength=len(self.values))
        found = [f"{self.values[place]!r}: {counts[place]}" for place in np.flatnonzero(counts)]
        return ", ".join(found[:TOLD]) + (", …" if len(found) > TOLD else "")


def read_column(data: str | os.PathLike[str], name: str) -> Column:
    """Read a column of the rows that `sources.open_source` opens, in their order.

    Raises TrainingError if there is none of that name, naming those that there are, or if it holds
    anything but texts, numbers and booleans.
    """
    path = Path(data).expanduser()
    places: dict[tuple[type, Scalar], int] = {}  # True, 1 and 1.0 are equal, but not the same
    of_row, known = array("i"), dict[str, None]()
    for number, values in enumerate(_rows(path, name), 1):
        known.update(dict.fromkeys(map(str, values)))
        value = values.get(name)
        value = value.strip() if isinstance(value, str) else value
        value = None if missing(value) else value
        if not isinstance(value, (str, bool, int, float, NoneType)):
            raise TrainingError(
                f"'{path}', row {number}: '{name}' is {str(value)[:60]!r} "
                f"({type(value).__name__}); expected a text, a number or a boolean."
            )
        of_row.append(places.setdefault((type(value), value), len(places)))
    if name not in known:
        raise TrainingError(
            f"'{path}' has no column '{name}'; its columns are {', '.join(known) or 'none'}. Name "
            "one of these."
        )
    values_of = tuple(value for _, value in places)
    return Column(name, values_of, np.array(of_row, dtype=np.int32))


def _rows(path: Path, name: str) -> Iterable[Values]:
    if is_saved(path):
        return _saved_rows(path, name)
    listing = find_metadata(path) if path.is_dir() else path
    if listing is None:
        raise TrainingError(
            f"'{path}' is a folder of pictures without a list, so it has no column '{name}'. List "
            "them in a metadata.jsonl, .csv or .parquet with that column."
        )
    return read_listing(listing)


def _saved_rows(path: Path, name: str) -> Iterator[Values]:
    dataset = load_saved(path)
    if name not in dataset.column_names:
        yield dict.fromkeys(dataset.column_names)
        return
    feature = dataset.features[name]
    names: list[str] = (feature.names or []) if isinstance(feature, ClassLabel) else []
    for block in dataset.select_columns([name]).with_format("arrow").iter(BLOCK):
        for value in block.column(0).to_pylist():
            # A class is its name; -1 and none are no class.
            yield {name: names[value] if names and value is not None and value >= 0 else value}


def held_out_rows(column: Column) -> np.ndarray:
    """Return which rows a column keeps from training, (rows,) bool.

    Those where it is true, or a text out of HELD_OUT. Raises TrainingError if it holds anything but
    booleans and texts, or holds out no row, or all.
    """
    held_out = np.array([_is_held_out(value, column.name) for value in column.values])
    rows: np.ndarray = held_out[column.of_row]
    if rows.all() or not rows.any():
        raise TrainingError(
            f"validation_split_column '{column.name}' holds out {'all' if rows.any() else 'none'} "
            f"of {len(rows)} rows: its values are {column.told()}. Expected booleans, or texts of "
            f"which {', '.join(HELD_OUT)} mean held out and all others are trained on."
        )
    return rows


def _is_held_out(value: Any, name: str) -> bool:
    if not isinstance(value, (bool, str, NoneType)):
        raise TrainingError(
            f"validation_split_column '{name}' holds {value!r} ({type(value).__name__}); expected "
            f"booleans, or texts of which {', '.join(HELD_OUT)} mean held out."
        )
    return value is True or (isinstance(value, str) and value.lower() in (*HELD_OUT, TRUE))
