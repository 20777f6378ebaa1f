"""What model files are, told by their headers: adapters, image encoders, and everything else.

A search looks at every file of a folder, so that none may cost more than its header, none may
stop it, and none is looked at twice unless it changed.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..adapter import AdapterSpec
from . import adapter_file as checkpoint
from .encoder_header import EncoderSizes, encoder_sizes
from .header import HeaderError, read_safetensors, shapes
from .tower_config import ImageEncoderError, configurations

Stamp = tuple[str, int, int]  # path, time of change in nanoseconds, bytes


@dataclass(frozen=True)
class File:
    """A file of a models folder, under the name that the host lists."""

    name: str
    path: str


@dataclass(frozen=True)
class Folder:
    """A kind of models folder: where the host looks for it, and the files that it lists."""

    paths: tuple[str, ...]
    files: tuple[File, ...]


@dataclass(frozen=True)
class AdapterFile(File):
    """`trained_with`: the image encoder's name, where this repository's training noted it."""

    spec: AdapterSpec
    trained_with: str | None = None


@dataclass(frozen=True)
class EncoderFile(File):
    sizes: EncoderSizes


@dataclass(frozen=True)
class Unusable(File):
    """Neither, or not whole; `reason` is a sentence that names the file."""

    reason: str


def stamps(path: str) -> tuple[Stamp, ...] | None:
    """Changes when the file does, or a configuration beside it. None where there is no file."""
    try:
        files = (path, *map(str, configurations(path)))
        return tuple((file, (s := os.stat(file)).st_mtime_ns, s.st_size) for file in files)
    except OSError:  # a link that leads nowhere, or a file that went meanwhile
        return None


def digest(stamped: Iterable[tuple[Stamp, ...] | None]) -> str:
    """Changes when a stamp does. The host writes what a node's fingerprint is into every saved
    picture, and where somebody's models lie is nobody else's business."""
    return hashlib.sha256(repr([*stamped]).encode()).hexdigest()


def adapters(files: Iterable[File]) -> list[AdapterFile | Unusable]:
    """Every file as an adapter, or why it is none. Raises nothing but MemoryError."""
    return [_known(_adapter, file) for file in files]


def encoders(files: Iterable[File]) -> list[EncoderFile | Unusable]:
    """Every file as an image encoder, or why it is none. Raises nothing but MemoryError."""
    return [_known(_encoder, file) for file in files]


def _known(look: Callable[[File], File], file: File) -> Any:
    stamp = stamps(file.path)
    if stamp is None or not os.access(file.path, os.R_OK):
        return Unusable(file.name, file.path, f"'{file.name}' cannot be read.")
    try:
        return _looked_at(look, file, stamp)
    except MemoryError:
        raise
    except Exception as error:
        return _unusable(file, error)


@functools.lru_cache(maxsize=4096)
def _looked_at(look: Callable[[File], File], file: File, stamp: tuple[Stamp, ...]) -> File:
    """`stamp` tells the cache of changes. Raises, and so forgets, what another try may mend."""
    try:
        return look(file)
    except Exception as error:  # of any file that lies there; torch raises a dozen kinds
        if _passing(error):
            raise
        return _unusable(file, error)


def _passing(error: BaseException | None) -> bool:
    """Whether it is of the machine and not of the file: a share that is away, a full memory."""
    while error is not None:
        if isinstance(error, OSError | MemoryError):
            return True
        error = error.__cause__
    return False


def _unusable(file: File, error: Exception) -> Unusable:
    if isinstance(error, checkpoint.CheckpointError):
        reason = str(error)
    elif isinstance(error, HeaderError | ImageEncoderError):
        reason = f"'{file.name}': {error}."
    else:
        first = next(iter(str(error).splitlines()), "")
        reason = f"'{file.name}' cannot be read ({type(error).__name__}: {first})."
    return Unusable(file.name, file.path, reason)


def _adapter(file: File) -> AdapterFile:
    metadata: Mapping[str, str] = {}
    found_format = checkpoint.file_format(file.path)
    if found_format == "pickle":
        raise HeaderError(checkpoint.OLD_FORMAT)
    if found_format == "safetensors":
        found, metadata = read_safetensors(file.path)
    else:
        found = shapes(checkpoint.read_pickle(file.path, mmap=True))
    spec = checkpoint.recognise(found, file.name)
    return AdapterFile(file.name, file.path, spec, checkpoint.trained_with(metadata))


def _encoder(file: File) -> EncoderFile:
    return EncoderFile(file.name, file.path, encoder_sizes(Path(file.path)))
