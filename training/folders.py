"""Folders that results go to."""

from __future__ import annotations

import os
from pathlib import Path

from .errors import TrainingError


def make_writable(folder: Path) -> None:
    """Make `folder`. Raises TrainingError if nothing can be written there: at the start of a run,
    not when its first result is due."""
    probe = folder / f".probe.{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise TrainingError(
            f"Nothing can be written to '{folder}': {error.strerror}. Give --out a folder that "
            "this user may write to."
        ) from error
