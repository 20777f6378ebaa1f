"""Which image encoder it is, by its weights and settings."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

SAMPLE = 1024  # values of each tensor: one page of the file, and enough of every layer


def fingerprint(encoder: nn.Module, **settings: Any) -> str:
    """Return a SHA-256, in hexadecimal, of an encoder's weights and settings.

    Of the weights it takes names, shapes and a sample of the signs; `settings` are what else
    decides what the encoder makes of an image, as JSON takes it.

    Signs survive rounding, so that the same weights have the same fingerprint in float32,
    float16, bfloat16 and float8, on any device and machine. Other weights have another one;
    what it cannot see is a tensor multiplied by a positive number, or a change beyond the first
    1024 values of every tensor that it touches. It reads some hundred kilobytes, so that nothing
    is kept between calls.
    """
    state = {k: v for k, v in sorted(encoder.state_dict().items()) if v.is_floating_point()}
    shapes = [(key, list(value.shape)) for key, value in state.items()]
    digest = hashlib.sha256(json.dumps([shapes, settings], sort_keys=True).encode())
    digest.update(np.packbits(_signs(list(state.values())).numpy()).tobytes())
    return digest.hexdigest()


def _signs(tensors: list[Tensor]) -> Tensor:
    """Tell of each sampled value, in order, if it is negative. Minus zero is: so was its origin."""
    # Tensors of one kind together: each copy from a GPU waits for it.
    kinds: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for index, tensor in enumerate(tensors):
        kinds.setdefault((tensor.device, tensor.dtype), []).append(index)
    by_index: dict[int, Tensor] = {}
    for indices in kinds.values():
        samples = [tensors[index].detach().reshape(-1)[:SAMPLE] for index in indices]
        signs = torch.cat(samples).float().signbit().cpu()
        by_index.update(zip(indices, signs.split([len(x) for x in samples]), strict=True))
    return torch.cat([by_index[index] for index in range(len(tensors))])
