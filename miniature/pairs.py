"""References that go together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from miniature.scenes import Scenes


def partners(rows: Scenes) -> Tensor:
    """For each scene the next one that differs in colour and in background, `(N,)`. Raises
    ValueError where there is none: too few scenes."""
    return unlike(rows, [[number] for number in range(len(rows))])


def unlike(rows: Scenes, given: Sequence[Sequence[int]]) -> Tensor:
    """For each of the given groups of scenes the next one after its first that differs from all of
    them in colour and in background, `(N,)`. Raises ValueError where there is none."""
    count = len(rows)
    found = []
    for group in given:
        others = ((group[0] + step) % count for step in range(1, count))
        fits = (
            other
            for other in others
            if not any(
                rows.colour[other] == rows.colour[one]
                or rows.background[other] == rows.background[one]
                for one in group
            )
        )
        chosen = next(fits, None)
        if chosen is None:
            raise ValueError(
                f"None of {count} scenes differs in colour and background from those numbered "
                f"{', '.join(map(str, group))}; take more references, 16 or so."
            )
        found.append(chosen)
    return torch.tensor(found)
