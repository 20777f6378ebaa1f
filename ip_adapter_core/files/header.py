"""What a file's tensors are called and shaped like, without their data."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import torch

MAX_HEADER = 100_000_000  # bytes; safetensors' own limit
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class HeaderError(ValueError):
    """A file whose header cannot be read. The message names the finding, not the file."""


class Shaped(Protocol):
    """What a tensor tells without its data; tensors themselves are of this kind."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def ndim(self) -> int: ...
    @property
    def dtype(self) -> Any: ...


class Shape(NamedTuple):
    """A tensor's shape and precision. `dtype` is safetensors' name for it where it is none of
    the three that adapters come in."""

    shape: tuple[int, ...]
    dtype: torch.dtype | str

    @property
    def ndim(self) -> int:
        return len(self.shape)


def shapes(weights: Mapping[str, Shaped]) -> dict[str, Shaped]:
    """The same without the tensors, which would keep their file open."""
    return {str(key): Shape(tuple(x.shape), x.dtype) for key, x in weights.items()}


def read_safetensors(path: str | os.PathLike[str]) -> tuple[dict[str, Shaped], dict[str, str]]:
    """Shapes and metadata of a .safetensors file; of its bytes only the header is read.

    Raises HeaderError for a file that is none, or of another length than the header says, and
    OSError where it cannot be read.
    """
    with open(path, "rb", buffering=0) as file:  # a buffer would reach into the tensors
        size = os.fstat(file.fileno()).st_size
        start = file.read(9)
        length = int.from_bytes(start[:8], "little")
        if start[8:] != b"{" or not 1 < length <= MAX_HEADER:
            raise HeaderError("it is no safetensors file")
        if 8 + length > size:
            raise HeaderError("it is cut short inside its header")
        text = start[8:] + file.read(length - 1)
    try:
        entries: dict[str, Any] = json.loads(text)
        metadata: Any = entries.pop("__metadata__", None) or {}
        end = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
        found: dict[str, Shaped] = {
            name: Shape(tuple(entry["shape"]), _DTYPES.get(entry["dtype"], entry["dtype"]))
            for name, entry in entries.items()
        }
        metadata = {str(key): str(value) for key, value in metadata.items()}
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise HeaderError(f"its header is damaged ({type(error).__name__}: {error})") from error
    if 8 + length + end != size:
        raise HeaderError(f"it is {size} bytes long, where its header tells of {8 + length + end}")
    return found, metadata
