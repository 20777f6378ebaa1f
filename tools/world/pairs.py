"""References that go together."""

from __future__ import annotations

import torch
from torch import Tensor

from tools.world.scenes import Scenes


def partners(rows: Scenes) -> Tensor:
    """For each scene the next one that differs in colour and in background, `(N,)`."""
    count = len(rows)
    found = []
    for number in range(count):
        others = [(number + step) % count for step in range(1, count)]
        unlike = (
            other
            for other in others
            if rows.colour[other] != rows.colour[number]
            and rows.background[other] != rows.background[number]
        )
        found.append(next(unlike))
    return torch.tensor(found)
