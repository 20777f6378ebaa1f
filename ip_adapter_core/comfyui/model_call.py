"""What the layers of one model call share: rows, masks, and how images join the text's part."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

import torch
from comfy.utils import repeat_to_batch_size
from torch import Tensor

from ..attention import add
from .layers import Layer
from .masks import MaskRows, Size, layer_size

Seen: TypeAlias = Callable[[Tensor, Tensor, Tensor | None, Any], None]
"""Takes norms of the text's part `(B, L)` and the images' `(B, prompts, L)`, the order of the rows
if they are repeated, and the layer's shape as its block tells it."""
_UNCONDITIONAL = 1  # the number that a guider's call gives a negative conditioning's rows
_ALIKE = 1e-3  # of the largest value: what rows of the same latent and text may differ by


class LaidMask(Protocol):
    """A mask in one call."""

    def of(self, tokens: int, told: Any) -> Tensor:
        """Return it for a layer of so many tokens, whose block may have `told` its shape."""


Prompts: TypeAlias = list[tuple[Tensor, Tensor, LaidMask | None]]
"""K', V' and mask of each image prompt on one layer."""
LayerPrompts: TypeAlias = tuple[Layer, Prompts, Seen | None]
"""A layer, the image prompts on it, and what watches it."""


def for_all(rows: Tensor, x: Tensor) -> Tensor:
    """Who splits the picture into tiles repeats tensors to the tiles, but not our list."""
    if len(x) % len(rows):
        raise RuntimeError(
            f"The model is run on {len(x)} of the {len(rows)} rows that the image prompt stands "
            "beside, so which row follows which image cannot be told: another node has cut the "
            "batch. Take that node or Apply IP-Adapter out."
        )
    return repeat_to_batch_size(rows.to(x.device), len(x))  # ComfyUI has models on several


@contextmanager
def forward_as(module: Any, forward: Callable[..., Any]) -> Iterator[None]:
    """Have a module run `forward`, while the context lasts; then what it ran before."""
    before = vars(module).get("forward")  # another pack's
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


class MaskAt:
    """A mask in one model call: `(B, tokens, 1)` at each layer's size, or `(B, 1, 1)` at all."""

    def __init__(self, rows: MaskRows, x: Tensor) -> None:
        self.rows, self.x = rows, x
        self.latent = (x.shape[-2], x.shape[-1])
        levels = MaskRows(for_all(rows.levels, x), rows.at)
        self.views = levels.views(self.latent)

    def of(self, tokens: int, told: Any) -> Tensor:
        """Return it for a layer of so many tokens, whose block may have `told` its shape."""
        if 0 in self.views:
            return self.views[0]
        if tokens not in self.views:
            size = layer_size(tokens, self.latent, told)
            if size is None:
                raise RuntimeError(
                    f"An attention layer has {tokens} places, which are no known size of the "
                    f"{self.latent[0]}×{self.latent[1]} latent: another node has changed it "
                    "without saying how. Take the image prompt's mask or that node out."
                )
            self.views[tokens] = for_all(self.rows.at(size), self.x)
        return self.views[tokens]


@dataclass(eq=False)
class Call:
    """What the layers of one model call share: the latent's size, and which text its chunks are.

    `chunks`: ComfyUI's `cond_or_uncond` as it came. A copy: attention couples change the list.
    """

    latent: Size
    chunks: tuple[int, ...]
    _orders: dict[int, tuple[Tensor, int]] = field(default_factory=dict)

    def order(self, query: Tensor, rows: int) -> Tensor:
        """Return which of the call's `rows` each row of a layer's `query` is.

        Attention couples repeat the rows of every conditional chunk, once for each region, and
        join the results with masks that sum to 1: an image added to all of them is added once.

        Raises:
            RuntimeError: The rows are repeated in another way, or not only repeated.
        """
        found = len(query)
        if found not in self._orders:
            numbers = repeated_rows(found, rows, self.chunks)
            if numbers is None:
                raise _untold(found, rows)
            self._orders[found] = torch.tensor(numbers, device=query.device), 0
        order, layers = self._orders[found]
        self._orders[found] = order, layers + 1
        # The number fits other patches too. Before the first layer all texts' rows are alike; a
        # wait for the device, once a call.
        if layers == 1:
            numbers = order.tolist()
            first = query[[numbers.index(number) for number in numbers]]
            if (query - first).abs().amax() > _ALIKE * query.abs().amax():
                raise _untold(found, rows)
        return order


def repeated_rows(found: int, rows: int, chunks: Sequence[int]) -> list[int] | None:
    """Return the numbers of `rows` in the order of an attention couple's `found` rows.

    Each chunk of a conditional text stands there r times in place of once, r whole; None where no
    r gives that number.
    """
    if not chunks or rows % len(chunks):
        return None
    size = rows // len(chunks)
    unconditional = chunks.count(_UNCONDITIONAL)
    conditional = len(chunks) - unconditional
    if not conditional or found % size or (found // size - unconditional) % conditional:
        return None
    times = (found // size - unconditional) // conditional
    if times < 1:
        return None
    return [
        number
        for i, chunk in enumerate(chunks)
        for _ in range(1 if chunk == _UNCONDITIONAL else times)
        for number in range(i * size, (i + 1) * size)
    ]


def _untold(found: int, rows: int) -> RuntimeError:
    return RuntimeError(
        f"Cross-attention runs on {found} rows at once where the image prompt stands beside "
        f"{rows}: another node adds, cuts or separates rows inside attention, so which row "
        "follows which image cannot be told. Take that node or Apply IP-Adapter out."
    )


class ImageParts:
    """One layer in one model call: what the images add to the text's part."""

    def __init__(self, prompts: Prompts, call: Call, seen: Seen | None = None) -> None:
        self.prompts = prompts
        self.call = call
        self.seen = seen

    def add_to(
        self,
        text: Tensor,
        q: Tensor,
        image_of: Callable[[Tensor, Tensor, Tensor], Tensor],
        told: Any = None,
        beside: Tensor | None = None,
    ) -> Tensor:
        """Add every image's part to the text's, `(B, L, C)`.

        Args:
            text: The text's part, or the output of a block.
            q: The layer's query, one row for each of `text`.
            image_of: Attention of query, K' and V', `(B, L, C)`.
            told: The layer's shape, for masks and record.
            beside: What the record compares the images with, if not with `text`.
        """
        out, rows = text, len(self.prompts[0][0])
        order = None if len(q) == rows else self.call.order(q, rows)
        norms = []
        for key, value, levels in self.prompts:
            mask = None if levels is None else levels.of(text.shape[1], told)
            if order is not None:
                key, value = key[order], value[order]
                mask = None if mask is None else mask[order]
            image = image_of(q, key, value)
            out = add(out, image, mask)
            if self.seen is not None:
                norms.append((image if mask is None else image * mask).float().norm(dim=-1))
        if self.seen is not None:
            theirs = text if beside is None else beside
            self.seen(theirs.float().norm(dim=-1), torch.stack(norms, 1), order, told)
        return out
