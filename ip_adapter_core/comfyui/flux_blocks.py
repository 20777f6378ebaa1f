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

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..attention import attend
from ..layer_weights import Block
from .layers import BLOCKS, Blocks
from .masks import Size
from .model_call import Call, ImageParts, LaidMask, LayerPrompts, Seen, forward_as

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
    """What both places share: blocks by their kind and number, and the picture's size.

    What is laid is patches of attention and what runs around a block: in ComfyUI's slots, or, where
    another pack runs the blocks in a way of its own (to leave some out, say), which tells a block
    neither options nor its number, on the blocks themselves while the call lasts.
    """

    def __init__(self, layers: Sequence[LayerPrompts], call: Call) -> None:
        _, first, _ = layers[0]  # whose masks are those of every layer
        masks = {id(mask): _MaskOverRows(mask) for _, _, mask in first if mask is not None}
        self.blocks: dict[Block, _Block] = {
            layer.key[:2]: _Block(
                [(k, v, None if mask is None else masks[id(mask)]) for k, v, mask in images],
                call,
                None if watch is None else partial(_see_the_picture, watch),
            )
            for layer, images, watch in layers
        }
        self.latent = call.latent
        self.size: Size = self.latent
        self.text = 0  # rows

    @contextmanager
    def laid(self, options: dict[str, Any], model: nn.Module) -> Iterator[dict[str, Any]]:
        """Give a copy of the options that has the images' parts in it."""
        patch: Any = model.patch_size
        self.size = -(-self.latent[0] // patch), -(-self.latent[1] // patch)  # padded, as there
        known: Blocks | None = options.get(BLOCKS)
        if known is None or known.transformer is not model:  # a clone on another device
            known = Blocks.of(model)
        modules = known.modules
        if _run_by_comfyui(model, modules):
            yield self.in_slots(options)
            return
        with ExitStack() as around:
            for key, block in self.blocks.items():
                module = modules[key]
                around.enter_context(forward_as(module, self._on_top(module, key, block)))
            yield options

    def in_slots(self, options: dict[str, Any]) -> dict[str, Any]:
        return _with_patches(options, **self.patches())

    def patches(self) -> dict[str, Any]:
        """Patches of attention, by the names that ComfyUI has for them."""
        return {"attn1_patch": self.see}

    def see(self, q: Tensor, k: Tensor, v: Tensor, **more: Any) -> dict[str, Any]:
        """Keep the query of a block's rows that images join; `attn1_patch`."""
        raise NotImplementedError

    def around(
        self, block: _Block, img: Tensor, run: Callable[[], dict[str, Any]]
    ) -> dict[str, Any]:
        """Run a block on `img`, and return what it gives as ComfyUI's slots do."""
        return run()

    def of(self, options: Mapping[str, Any]) -> _Block | None:
        """Return the block that a patch is called in."""
        return self.blocks.get((options["block_type"], options["block_index"]))

    def _on_top(self, module: Any, key: Block, block: _Block) -> Callable[..., Any]:
        """Return a forward that runs the block's own with the images' parts in it."""
        inner, (kind, number) = module.forward, key

        def forward(*args: Any, **kwargs: Any) -> Any:
            given = {**(kwargs.get("transformer_options") or {}), "img_slice": [self.text]}
            told = {**given, "block_type": kind, "block_index": number}
            kwargs["transformer_options"] = _with_patches(told, **self.patches())

            def run() -> dict[str, Any]:
                out = inner(*args, **kwargs)
                return dict(zip(("img", "txt"), out, strict=True)) if kind == "double" else out

            img = args[0] if args else kwargs["img" if kind == "double" else "x"]
            out = self.around(block, img, run)
            return (out["img"], out["txt"]) if kind == "double" else out

        return forward


class AttentionOutputs(_Blocks):
    """InstantX: the image's part joins attention's output, before it is projected."""

    def patches(self) -> dict[str, Any]:
        return {"attn1_patch": self.see, "attn1_output_patch": self.add}

    def see(self, q: Tensor, k: Tensor, v: Tensor, **more: Any) -> dict[str, Any]:
        block = self.of(more["extra_options"])
        if block is not None:
            double = more["extra_options"]["block_type"] == "double"
            self.text = _text_rows(more["extra_options"])
            block.query = q[:, :, self.text :] if double else q
        return {}

    def add(self, attention: Tensor, options: dict[str, Any]) -> Tensor:
        """Add the images' parts; `attn1_output_patch`."""
        block = self.of(options)
        if block is None:
            return attention
        before = _text_rows(options)
        if options["block_type"] == "single":
            return block.added(attention, (before, *self.size))
        picture = block.added(attention[:, before:], (0, *self.size))
        return torch.cat([attention[:, :before], picture], dim=1)


class BlockOutputs(_Blocks):
    """XLabs: the image's part joins what a double block gives of the picture.

    A block that another pack leaves out, for what it gave before, gives no image's part either.
    """

    def in_slots(self, options: dict[str, Any]) -> dict[str, Any]:
        replaced = options.get("patches_replace", {})
        slots = replaced.get("dit", {})

        def slot(block: _Block, theirs: Any) -> Any:
            def run(given: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
                def inner() -> Any:
                    return theirs(given, more) if theirs else more["original_block"](given)

                return self.around(block, given["img"], inner)

            return run

        ours = {
            (f"{kind}_block", number): slot(block, slots.get((f"{kind}_block", number)))
            for (kind, number), block in self.blocks.items()
        }
        laid = {**options, "patches_replace": {**replaced, "dit": {**slots, **ours}}}
        return _with_patches(laid, **self.patches())

    def see(self, q: Tensor, k: Tensor, v: Tensor, **more: Any) -> dict[str, Any]:
        block = self.of(more["extra_options"])
        if block is not None:
            block.query = q[:, :, _text_rows(more["extra_options"]) :]
        return {}

    def around(
        self, block: _Block, img: Tensor, run: Callable[[], dict[str, Any]]
    ) -> dict[str, Any]:
        came = None if block.seen is None else img.clone()  # a block adds to it in place
        out = run()
        beside = None if came is None else out["img"] - came
        return {**out, "img": block.added(out["img"], (0, *self.size), beside)}


def _run_by_comfyui(model: nn.Module, modules: Mapping[Block, nn.Module]) -> bool:
    """Return whether ComfyUI's own code runs these blocks, one by one.

    A model that is being compiled is taken for that: what is traced here holds for later calls.
    """
    if torch.compiler.is_compiling():
        return True
    if "forward_orig" in vars(model):
        return False
    return all(
        modules.get((kind, number)) is block
        for kind in ("double", "single")
        for number, block in enumerate(getattr(model, f"{kind}_blocks"))
    )


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
