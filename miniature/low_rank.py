"""Fine-tuning by a change of low rank in every weight (LoRA, arXiv 2106.09685).

A weight W, seen as a matrix of output channels by all else, becomes W + up · down.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

_DOWN, _UP = ".down", ".up"


class Change(nn.Module):
    """Begins as no change: `up` is zeros."""

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        rows, columns = weight.flatten(1).shape
        self.down = nn.Parameter(torch.randn(rank, columns) * columns**-0.5)
        self.up = nn.Parameter(torch.zeros(rows, rank))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + (self.up @ self.down).reshape(weight.shape)


def add(model: nn.Module, rank: int, inside: tuple[str, ...]) -> dict[str, Change]:
    """Give every matrix and convolution in the parts `inside` of a frozen model a change that
    trains, in place. Returns them by their weights' names."""
    found = {}
    for name, module in [*model.named_modules()]:
        weight: Any = getattr(module, "weight", None)
        if name.startswith(inside) and isinstance(weight, nn.Parameter) and weight.ndim > 1:
            change = Change(weight, rank)
            parametrize.register_parametrization(module, "weight", change)
            found[f"{name}.weight"] = change
    return found


def factors(changes: Mapping[str, Change]) -> dict[str, Tensor]:
    """As they are kept in a file: two matrices a weight."""
    return {
        name + suffix: matrix.detach()
        for name, change in changes.items()
        for suffix, matrix in ((_DOWN, change.down), (_UP, change.up))
    }


def merged(state: Mapping[str, Tensor], kept: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights with the changes that `factors` gave, in the weights' own precision. Raises KeyError
    where there is a change without its weight or its other half."""
    found = dict(state)
    for key in kept:
        if key.endswith(_UP):
            name = key.removesuffix(_UP)
            weight, up, down = found[name], kept[key].float(), kept[name + _DOWN].float()
            changed = weight.float() + (up @ down).reshape(weight.shape)
            found[name] = changed.to(weight.dtype)
        elif key.removesuffix(_DOWN) + _UP not in kept:
            raise KeyError(key.removesuffix(_DOWN) + _UP)
    return found
