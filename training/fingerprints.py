"""What a frozen model or a list of data is, in 32 characters."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor, nn


def of_weights(module: nn.Module) -> str:
    """Hash every parameter of `module`, in the order in which they were registered.

    Values are hashed as float32, to which float16 and bfloat16 widen without loss: a model
    gives the same hash from a file of either width that holds the same values. Take it before the
    model is cast to fewer bits. Names are left out, for libraries rename them; so are buffers,
    which follow from the settings.
    """
    digest = xxhash.xxh3_128()
    for parameter in module.parameters():
        digest.update(repr(tuple(parameter.shape)).encode())
        digest.update(_bytes(parameter))
    return digest.hexdigest()


def of_files(paths: Iterable[Path]) -> str:
    """Hash what files hold, one after the other."""
    digest = xxhash.xxh3_128()
    for path in paths:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def of_settings(*settings: Any) -> str:
    """Hash plain values: numbers, texts, lists and dicts (whose order does not count)."""
    text = json.dumps(settings, sort_keys=True, default=str)
    return xxhash.xxh3_128(text.encode()).hexdigest()


def of_repr(values: Any) -> str:
    """Hash plain values by what `repr` tells of them."""
    return hashlib.blake2b(repr(values).encode(), digest_size=16).hexdigest()


def _bytes(tensor: Tensor) -> memoryview:
    flat = tensor.detach().to("cpu", torch.float32).contiguous().flatten()
    return flat.view(torch.uint8).numpy().data
