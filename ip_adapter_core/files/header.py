"""What a file of weights is and holds: its format, its tensors' names and shapes, its pickle."""

from __future__ import annotations

import os
import pickle
import re
import stat
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple, Protocol

import torch
from safetensors import SafetensorError, safe_open

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_DTYPES = dict(zip(("F32", "F16", "BF16"), DTYPES, strict=True))
_MAX_HEADER = 100_000_000  # bytes; safetensors' own limit
OLD_FORMAT = (  # its tensors lie between the pickles
    "it is of torch's format before 1.6, which cannot be recognised without reading all of it: "
    "choose it in a loader of its own, or save it as .safetensors"
)


class CheckpointError(ValueError):
    """A file of no usable weights. The message names file, finding and remedy."""


class Shaped(Protocol):
    """What a tensor tells without its data; tensors themselves are of this kind."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def ndim(self) -> int: ...
    @property
    def dtype(self) -> Any: ...


class Shape(NamedTuple):
    """A tensor's shape and precision.

    `dtype` is safetensors' name for it where it is none of the three that adapters come in.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype | str

    @property
    def ndim(self) -> int:
        return len(self.shape)


def shapes(weights: Mapping[str, Shaped]) -> dict[str, Shaped]:
    """Return the same without the tensors, which would keep their file open."""
    return {str(key): Shape(tuple(x.shape), x.dtype) for key, x in weights.items()}


def file_format(path: str | os.PathLike[str]) -> Literal["safetensors", "zip", "pickle"]:
    """Return what a file's first bytes tell: `zip` is torch's format, `pickle` the one before 1.6.

    Raises:
        CheckpointError: The file is none of these; the message says what it is.
    """
    name = os.path.basename(path)
    try:
        mode = os.stat(path).st_mode
        if not stat.S_ISREG(mode):  # reading a pipe would wait for ever
            kind = "a directory" if stat.S_ISDIR(mode) else "a pipe or a device"
            raise CheckpointError(f"'{name}' is {kind} and no file. Choose another.")
        with open(path, "rb", buffering=0) as file:
            head = file.read(64)
    except OSError as error:
        raise CheckpointError(f"'{path}' cannot be read: {error.strerror}.") from error
    if not head:
        raise CheckpointError(f"'{name}' is empty (0 bytes). Download it again.")
    if head.startswith(b"version https://git-lfs"):
        raise CheckpointError(
            f"'{name}' is a git-lfs pointer, not the weights. Fetch the file itself "
            "('git lfs pull', or the download button of the model's page)."
        )
    # Before anything that looks at the first byte: there stands a length, any byte can.
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= _MAX_HEADER:
        return "safetensors"
    if head.lstrip()[:1] == b"<":
        raise CheckpointError(
            f"'{name}' is a web page, not weights: the download saved an error or login page. "
            "Download it again."
        )
    if not head.startswith((b"PK", b"\x80")):
        raise CheckpointError(
            f"'{name}' is neither a safetensors file nor one that torch wrote; it begins with "
            f"{head[:24]!r}. Download it again."
        )
    return "zip" if head.startswith(b"PK") else "pickle"


def read_header(path: str | os.PathLike[str]) -> tuple[dict[str, Shaped], dict[str, str]]:
    """Return shapes and metadata of a .safetensors file, without reading its tensors.

    Raises:
        CheckpointError: The file is none, or cut short.
    """
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            layout: dict[str, Shaped] = {
                name: Shape(tuple(x.get_shape()), _DTYPES.get(dtype := str(x.get_dtype()), dtype))
                for name, x in slices.items()
            }
            return layout, file.metadata() or {}
    except (SafetensorError, ValueError) as error:
        raise damaged(path, error) from error


def damaged(path: str | os.PathLike[str], error: Exception) -> CheckpointError:
    """Return what to raise for a .safetensors file that cannot be read."""
    return CheckpointError(
        f"'{os.path.basename(path)}' is a damaged safetensors file, probably cut short while "
        f"downloading ({error}). Download it again."
    )


def read_pickle(path: str | os.PathLike[str], *, mapped: bool = False, device: str = "cpu") -> Any:
    """Return what torch wrote into a file, without running code that it may hold.

    Args:
        path: The file.
        mapped: Map the tensors instead of reading them, where the file's format allows it.
        device: Where the tensors go; "meta" for their shapes alone.

    Returns:
        The content, or its `state_dict`, as runs of training save it.

    Raises:
        CheckpointError: The file is damaged, or asks for more than tensors.
        MemoryError: It does not fit.
    """
    name = os.path.basename(path)
    how: dict[str, Any] = {"map_location": device, "weights_only": True}
    try:
        if os.path.splitext(path)[1].lower() in (
            ".safetensors",
            ".sft",
        ):  # torch goes by the ending
            with open(path, "rb") as file:
                content = torch.load(file, **how)
        else:
            mapped = mapped and file_format(path) == "zip"
            content = torch.load(path, mmap=mapped or None, **how)
    except pickle.UnpicklingError as error:
        wanted = re.search(r"GLOBAL (\S+)", str(error))
        if wanted is None:
            raise CheckpointError(
                f"'{name}' is no list of tensors that torch can read: it is damaged, or holds "
                "other objects. Download it again, or use a .safetensors version."
            ) from None
        raise CheckpointError(
            f"'{name}' was refused and not opened: expected a file of tensors only, but it holds "
            f"an object of {wanted[1]} besides, and whatever makes objects could run code on this "
            "machine. Take the .safetensors version that most such models have, or convert this "
            "one where nothing can be harmed: save its tensors with safetensors.torch.save_file."
        ) from None  # torch's text explains how to load it all the same
    except MemoryError:
        raise
    except Exception as error:  # torch raises a dozen kinds for damaged archives
        finding = next(iter(str(error).splitlines()), "")
        raise CheckpointError(
            f"'{name}' cannot be read as a torch file; it is damaged, cut short, or something "
            f"else ({type(error).__name__}: {finding}). Download it again."
        ) from error
    while isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    return content


def few(names: Iterable[Any], limit: int = 4) -> str:
    """List the first of many names for a message."""
    listed = [str(name) for name in names]
    rest = len(listed) - limit
    return ", ".join(listed[:limit]) + (f" … and {rest} more" if rest > 0 else "")
