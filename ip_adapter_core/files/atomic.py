"""Write a file whole or not at all."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def atomic(path: str | os.PathLike[str], *, durable: bool = False) -> Iterator[Path]:
    """Give a temporary path beside `path`, which takes the name of `path` if the block succeeds.

    Whoever reads `path` meanwhile sees the old file or the new one, never a part, and a block that
    raises leaves nothing behind. Several processes may write the same file: the last one wins. The
    file gets the permissions that `open` gives, however the block creates it.

    Args:
        path: The file to write; its folder exists.
        durable: Return only when the disk holds the file and its name (fsync).

    Raises:
        OSError: The file cannot be created, synchronized or renamed.
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        temporary.touch(exist_ok=False)
        mode = temporary.stat().st_mode
        yield temporary
        os.chmod(temporary, mode)
        if durable:
            sync(temporary)
        os.replace(temporary, path)
        if durable:
            sync(path.parent)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def sync(path: str | os.PathLike[str]) -> None:
    """Wait until the disk holds a file's data, or the names in a folder."""
    if os.name == "nt" and os.path.isdir(path):
        return  # Windows opens no folders
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
