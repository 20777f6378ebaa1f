"""Embeddings of faces that come with the data: numbers in a row, or a .npy file."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ip_adapter_core.face_projection import WIDTH

from .image import BrokenImageError

MISSING = b""
"""What a row holds that should have an embedding and has none."""


def to_npy(numbers: Any) -> bytes:
    """Return numbers as a .npy file. Raises ValueError or TypeError for what are none."""
    file = io.BytesIO()
    np.save(file, np.asarray(numbers, dtype=np.float32))
    return file.getvalue()


def face_embedding(value: Any) -> Tensor:
    """Return the embedding `(512,)` of numbers, a .npy file's bytes, or its path.

    Raises BrokenImageError for another number of numbers, such as are not finite, and zeros, which
    stand for no face.
    """
    expected = f"expected {WIDTH} finite numbers, as ArcFace gives them"
    if value is None or (isinstance(value, bytes) and not value):
        raise BrokenImageError(f"it has no face embedding; {expected}")
    try:
        if isinstance(value, (bytes, Path)):
            file = io.BytesIO(value) if isinstance(value, bytes) else value
            value = np.load(file, allow_pickle=False)
        found = torch.from_numpy(np.asarray(value, dtype=np.float32).reshape(-1))
    except Exception as error:  # of many kinds, for damaged files
        raise BrokenImageError(
            f"its face embedding cannot be read ({error}); {expected}"
        ) from error
    if len(found) != WIDTH:
        raise BrokenImageError(f"its face embedding has {len(found)} numbers; {expected}")
    if not found.isfinite().all():
        raise BrokenImageError(f"its face embedding holds NaN or infinite values; {expected}")
    if not found.any():
        raise BrokenImageError(
            f"its face embedding is all zeros, which stand for no face; {expected}"
        )
    return found
