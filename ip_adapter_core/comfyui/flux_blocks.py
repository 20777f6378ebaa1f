"""Image prompts in the blocks of a Flux, and of Chroma, which has the same.

A block tells its query (after the norm of q and k, before rotary positions) and where the picture's
rows begin; all else is read from the `transformer_options` of the call. XLabs' adapters add the
image's part to what a double block gives, InstantX's to attention's output in every block, before
its projection; in single blocks that is the text's rows too.

A mask has a place for the picture's rows alone. Others (the text's in single blocks, those of
Kontext's reference pictures) belong to all of the picture, and take the mask's mean: nothing where
the mask is black, all where it is white.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..attention import attend
from ..layer_weights import Block
from .layers import Layer
from .masks import Size
from .model_call import Call, ImageParts, LaidMask, Prompts, Seen

Rows = tuple[int, int, int]
"""How many rows stand before the picture's, and the picture's height and width in patches."""


class _MaskOverRows:
    """A mask over a block's rows: at the picture's patches, its mean at all others."""

    def __init__(self, patches: LaidMask) -> None:
        self.patches = patches
        self.made: dict[tuple[int, Rows], Tensor] = {}

    def of(self, tokens: int, told: Any) -> Tensor:
        """Return `(B, tokens, 1)`, or `(B, 1, 1)` for one value a row; `told`: `Rows`."""
        if (tokens, told) not in self.made:
            before, height, width = told
            mask = self.patches.of(height * width, (height, width))
            if mask.shape[1] > 1:
                mean = mask.mean(1, keepdim=True)
                behind = tokens - before - height * width
                parts = [mean.expand(-1, before, -1), mask, mean.expand(-1, behind, -1)]
                mask = torch.cat(parts, dim=1)
            self.made[tokens, told] = mask
        return self.made[tokens, told]


class _Block(ImageParts):
    """A block in one call, and its query while it runs."""

    query: Tensor | None = None

    def added(self, text: Tensor, rows: Rows, beside: Tensor | None = None) -> Tensor:
        """Return `text (B, L, C)` with every image's part, and forget the query."""
        query, self.query = self.query, None
        return text if query is None else self.add_to(text, query, attend, rows, beside)


class _Blocks:
    """What both places share: blocks by their kind and number, and the picture's size."""

    def __init__(
        self,
        layers: Sequence[Layer],
        prompts: Sequence[Prompts],
        seen: Sequence[Seen | None],
        call: Call,
    ) -> None:
        masks = {id(mask): _MaskOverRows(mask) for _, _, mask in prompts[0] if mask is not None}
        self.blocks: dict[Block, _Block] = {
            layer.key[:2]: _Block(
                [(k, v, None if mask is None else masks[id(mask)]) for k, v, mask in images],
                call,
                None if watch is None else partial(_see_the_picture, watch),
            )
            for layer, images, watch in zip(layers, prompts, seen, strict=True)
        }
        self.latent = call.latent

    def block(self, options: Mapping[str, Any]) -> _Block | None:
        """Return the block that a patch is called in."""
        return self.blocks.get((options["block_type"], options["block_index"]))

    def size(self, model: nn.Module) -> Size:
        """Return the picture's height and width in patches, padded as the model pads it."""
        patch: Any = model.patch_size
        return -(-self.latent[0] // patch), -(-self.latent[1] // patch)


class AttentionOutputs(_Blocks):
    """InstantX: the image's part joins attention's output, before it is projected."""

    @contextmanager
    def laid(self, options: dict[str, Any], model: nn.Module) -> Iterator[dict[str, Any]]:
        """Give a copy of the options that has the images' parts in it."""
        size = self.size(model)

        def see(q: Tensor, k: Tensor, v: Tensor, **more: Any) -> dict[str, Any]:
            options = more["extra_options"]
            block = self.block(options)
            if block is not None:
                before = _text_rows(options)
                block.query = q[:, :, before:] if options["block_type"] == "double" else q
            return {}

        def add(attention: Tensor, options: dict[str, Any]) -> Tensor:
            block = self.block(options)
            if block is None:
                return attention
            before = _text_rows(options)
            if options["block_type"] == "single":
                return block.added(attention, (before, *size))
            picture = block.added(attention[:, before:], (0, *size))
            return torch.cat([attention[:, :before], picture], dim=1)

        yield _with_patches(options, attn1_patch=see, attn1_output_patch=add)


class BlockOutputs(_Blocks):
    """XLabs: the image's part joins what a double block gives of the picture."""

    @contextmanager
    def laid(self, options: dict[str, Any], model: nn.Module) -> Iterator[dict[str, Any]]:
        """Give a copy of the options that has the images' parts in it.

        A block that another pack leaves out, for what it gave before, gives no image's part either.
        """
        size = self.size(model)
        replaced = options.get("patches_replace", {})
        slots = replaced.get("dit", {})

        def see(q: Tensor, k: Tensor, v: Tensor, **more: Any) -> dict[str, Any]:
            block = self.block(more["extra_options"])
            if block is not None:
                block.query = q[:, :, _text_rows(more["extra_options"]) :]
            return {}

        def around(block: _Block, theirs: Any) -> Any:
            def run(given: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
                # The block adds to its input in place.
                came = None if block.seen is None else given["img"].clone()
                out = more["original_block"](given) if theirs is None else theirs(given, more)
                beside = None if came is None else out["img"] - came
                return {**out, "img": block.added(out["img"], (0, *size), beside)}

            return run

        ours = {
            (f"{kind}_block", number): around(block, slots.get((f"{kind}_block", number)))
            for (kind, number), block in self.blocks.items()
        }
        laid = {**options, "patches_replace": {**replaced, "dit": {**slots, **ours}}}
        yield _with_patches(laid, attn1_patch=see)


def _text_rows(options: Mapping[str, Any]) -> int:
    """Return how many rows of text stand before the picture's."""
    return int(options["img_slice"][0])


def _with_patches(options: dict[str, Any], **patches: Any) -> dict[str, Any]:
    """Return the options with a patch more in each of these lists, behind those of others."""
    before = options.get("patches", {})
    after = {name: [*before.get(name, ()), patch] for name, patch in patches.items()}
    return {**options, "patches": {**before, **after}}


def _see_the_picture(
    watch: Seen, text: Tensor, images: Tensor, order: Tensor | None, told: Rows
) -> None:
    """Show a record the rows that have a place in the picture."""
    before, height, width = told
    rows = slice(before, before + height * width)
    watch(text[:, rows], images[:, :, rows], order, (height, width))
