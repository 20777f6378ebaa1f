"""The cache on the disk: what its files hold, writing opening one.

    cache.json                  whose outputs these are, and of which rows (`Manifest`)
    dropped.safetensors         what stands in for a dropped text or image
    columns.safetensors         `Column`s of all rows of the source, if any were asked for
    shard-00000.safetensors     rows 0 … S-1 of the source, shard-00001 the next S, …

A shard holds, for its n rows whose images could be read: `row` (n,) and `bucket` (n,), in the
source's order; and sorted by bucket, rows of one in the source's order, `states`, `pooled`,
`time_ids` and each kind of features (n, …), and for each bucket of m rows `mean.HxW` and
`log_variance.HxW` (m, 4, H, W). Its metadata names the images that could not be read.

Format 2, where a row of the source has several captions: a shard holds besides, sorted by bucket,
how many `captions` (n,) each row has, and `states` and `pooled` are those of all captions.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ip_adapter_core.files.atomic import atomic

from ..data.columns import Column
from ..errors import TrainingError

MANIFEST, DROPPED = "cache.json", "dropped.safetensors"
COLUMNS = "columns.safetensors"
ONE_CAPTION, SEVERAL_CAPTIONS = FORMATS = 1, 2  # another when files change their meaning
TEXTS = ("states", "pooled")


@dataclass(frozen=True)
class Manifest:
    """What a cache was made of.

    `parts`: a fingerprint (or a plain word) for everything that shapes the tensors, by a name that
    a user understands; `names`: where each part came from, for messages. `sizes`: height and
    width in pixels, by number of the bucket.
    """

    rows: int
    shard_rows: int
    features: tuple[str, ...]
    dtype: str
    sizes: tuple[tuple[int, int], ...]
    parts: Mapping[str, str]
    names: Mapping[str, str]
    format: int = ONE_CAPTION

    @property
    def shards(self) -> int:
        return -(-self.rows // self.shard_rows)

    def rows_of(self, shard: int) -> range:
        """Rows of the source that belong into a shard."""
        return range(shard * self.shard_rows, min((shard + 1) * self.shard_rows, self.rows))

    def differing(self, other: Manifest) -> list[str]:
        """Return what differs from another, but for the names: one phrase each."""
        mine, theirs = asdict(self), asdict(other)
        mine |= mine.pop("parts")
        theirs |= theirs.pop("parts")
        found = []
        for part in mine | theirs:
            if part != "names" and mine.get(part) != theirs.get(part):
                names = self.names.get(part), other.names.get(part)
                told = names if any(names) else (mine.get(part), theirs.get(part))
                found.append(f"{part} (there {told[0]}, now {told[1]})")
        return found


def read_manifest(folder: Path) -> Manifest | None:
    """Read a folder's manifest, if any. Raises TrainingError for one of another format."""
    path = folder / MANIFEST
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["format"] not in FORMATS:
            raise TrainingError(
                f"'{path}' is of format {found['format']}, this version reads "
                f"{' and '.join(map(str, FORMATS))}. Make the cache anew, or use the version that "
                "wrote it."
            )
        for key in ("sizes", "features"):
            found[key] = tuple(tuple(x) if isinstance(x, list) else x for x in found[key])
        return Manifest(**found)
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, TrainingError):
            raise
        raise TrainingError(
            f"'{path}' is no description of a cache ({error}). Delete the folder and run "
            "training/cache.py again."
        ) from error


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `cache.json`, whole or not at all."""
    with atomic(folder / MANIFEST) as temporary:
        temporary.write_text(json.dumps(asdict(manifest), indent=1), encoding="utf-8")


def shard_path(folder: Path, shard: int) -> Path:
    """Return where a shard lies."""
    return folder / f"shard-{shard:05}.safetensors"


def write_tensors(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Write equal tensors as equal bytes, whole or not at all, else raise TrainingError."""
    # One key only: safetensors writes several in no certain order.
    metadata = {"cache": json.dumps(about, ensure_ascii=False, sort_keys=True)}
    try:
        with atomic(path, durable=True) as temporary:
            save_file(dict(tensors), temporary, metadata)
    except (OSError, SafetensorError) as error:
        needed = sum(tensor.nbytes for tensor in tensors.values()) / 2**20
        free = shutil.disk_usage(path.parent).free / 2**20
        raise TrainingError(
            f"'{path}' could not be written: {error}. It takes {needed:.0f} MiB; {free:.0f} MiB "
            "are free there. What was written before is whole: make room and run the same command "
            "again."
        ) from error


def write_columns(folder: Path, columns: Iterable[Column]) -> None:
    """Keep columns of the source's rows, beside those that are kept already."""
    kept = read_columns(folder) | {column.name: column for column in columns}
    tensors = {name: torch.from_numpy(column.of_row) for name, column in kept.items()}
    values = {name: column.values for name, column in kept.items()}
    write_tensors(folder / COLUMNS, tensors, values)


def read_columns(folder: Path) -> dict[str, Column]:
    """Return the columns that were kept, by their names. Raises TrainingError for a cut file."""
    path = folder / COLUMNS
    if not path.exists():
        return {}
    try:
        with open_tensors(path) as (file, values):
            return {
                name: Column(name, tuple(of), file.get_tensor(name).numpy())
                for name, of in values.items()
            }
    except OSError as error:
        raise TrainingError(
            f"'{path}' cannot be read: {error}. Delete it and run the training/cache.py command "
            "that made the cache again."
        ) from error


@contextmanager
def open_tensors(path: Path) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Open what `write_tensors` wrote, and its `about`. Raises OSError for what is none, or cut."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file, json.loads(file.metadata()["cache"])
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise OSError(f"it is no file of tensors of this cache, or cut short ({error})") from error


def is_whole(path: Path) -> bool:
    """Return whether a file is there and complete."""
    try:
        with open_tensors(path):
            return True
    except OSError:
        return False
