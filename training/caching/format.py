"""The cache on the disk: what its files hold, writing one whole or not at all, reading a header.

    cache.json                  whose outputs these are, and of which rows (`Manifest`)
    dropped.safetensors         what stands in for a dropped text or image
    shard-00000.safetensors     rows 0 … S-1 of the source, shard-00001 the next S, …

A shard holds, for its n rows whose pictures could be read: `row` (n,) and `bucket` (n,), in the
source's order; and sorted by bucket, rows of one in the source's order, `states`, `pooled`,
`time_ids` and each kind of features (n, …), and for each bucket of m rows `mean.HxW` and
`log_variance.HxW` (m, 4, H, W). Its metadata names the pictures that could not be read.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ..errors import TrainingError

MANIFEST, DROPPED = "cache.json", "dropped.safetensors"
FORMAT = 1  # to be raised when files change their meaning
TEMPORARY = ".tmp"
DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
DTYPES |= {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16}


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
    format: int = FORMAT

    @property
    def shards(self) -> int:
        return -(-self.rows // self.shard_rows)

    def rows_of(self, shard: int) -> range:
        """Rows of the source that belong into a shard."""
        return range(shard * self.shard_rows, min((shard + 1) * self.shard_rows, self.rows))

    def differing(self, other: Manifest) -> list[str]:
        """What differs from another, but for the names: one phrase each."""
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
    """None if there is none. Raises TrainingError for one that is no manifest, or too new."""
    path = folder / MANIFEST
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["format"] != FORMAT:
            raise TrainingError(
                f"'{path}' is of format {found['format']}, this version reads {FORMAT}. Make the "
                "cache anew, or use the version that wrote it."
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
    """Whole or not at all."""
    temporary = folder / (MANIFEST + TEMPORARY)
    temporary.write_text(json.dumps(asdict(manifest), indent=1), encoding="utf-8")
    os.replace(temporary, folder / MANIFEST)


def shard_path(folder: Path, shard: int) -> Path:
    return folder / f"shard-{shard:05}.safetensors"


def write_tensors(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Whole or not at all. Equal tensors give equal bytes.

    `about` goes into the metadata. Raises TrainingError if it cannot be written, and then leaves
    nothing behind.
    """
    temporary = path.with_name(path.name + TEMPORARY)
    # One key only: safetensors writes several in no certain order.
    metadata = {"cache": json.dumps(about, ensure_ascii=False, sort_keys=True)}
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        save_file(dict(tensors), temporary, metadata)
        os.chmod(temporary, mode)  # safetensors lets nobody but the user read it
        _to_disk(temporary)
        os.replace(temporary, path)
        _to_disk(path.parent)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        needed = sum(tensor.nbytes for tensor in tensors.values()) / 2**20
        free = shutil.disk_usage(path.parent).free / 2**20
        raise TrainingError(
            f"'{path}' could not be written: {error}. It takes {needed:.0f} MiB; {free:.0f} MiB "
            "are free there. What was written before is whole: make room and run the same command "
            "again."
        ) from error


def _to_disk(path: Path) -> None:
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@dataclass(frozen=True)
class Where:
    """A tensor in a file: its type, its shape, and the byte where it begins."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int


@dataclass(frozen=True)
class Header:
    """What a file of tensors holds. `about` is what `write_tensors` was given."""

    tensors: Mapping[str, Where]
    about: Mapping[str, Any]


def read_header(path: Path) -> Header:
    """Of a safetensors file, no tensor being read.

    Raises OSError if it cannot be opened, ValueError if it is cut short or none of ours.
    """
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8).ljust(8, b"\0"))
        size = os.fstat(file.fileno()).st_size
        if not 0 < length <= size - 8:
            raise ValueError("it is no safetensors file, or cut short")
        entries = json.loads(file.read(length))
    about = json.loads(entries.pop("__metadata__")["cache"])
    ends = [entry["data_offsets"][1] for entry in entries.values()]
    if 8 + length + max(ends, default=0) != size:
        raise ValueError("it is cut short")
    tensors = {
        name: Where(DTYPES[e["dtype"]], tuple(e["shape"]), 8 + length + e["data_offsets"][0])
        for name, e in entries.items()
    }
    return Header(tensors, about)


def is_whole(path: Path) -> bool:
    """Whether a file is there and complete."""
    try:
        read_header(path)
    except (OSError, ValueError, KeyError):
        return False
    return True
