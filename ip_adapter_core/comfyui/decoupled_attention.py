"""Decoupled cross-attention in one UNet call: where its parts are laid, what one layer computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import comfy.ldm.modules.attention as comfy_attention
from comfy.utils import repeat_to_batch_size
from torch import Tensor

from ..attention import add, image_attention
from ..packing import unpack
from .layers import KEY, LAYERS, RECORD, Conds, Layer, cross_attention_layers
from .masks import Levels, Size, resize, split_levels
from .prompt_rows import SamplingRun


class AttentionRecord(Protocol):
    """Observer called at every cross-attention layer (see record.py)."""

    def watching(
        self, sample: Callable[..., Any], run: SamplingRun, conds: Conds
    ) -> Callable[..., Any]:
        """Return the same sampling run, watched."""

    def evaluates(self, conds: list[Any], latent: Size) -> None:
        """Note that these conditionings are about to be evaluated on latents of this size.

        Their prompts are those in force.
        """

    def look(
        self, options: dict[str, Any], latent: tuple[int, int]
    ) -> Callable[[DecoupledAttention, Layer], Callable[..., Tensor]] | None:
        """Return what watches the layers of one UNet call on latents of this size, if any."""


def inject_decoupled_attention(executor: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Make cross-attention decoupled for this call, around whatever patch stands in its slot.

    The DIFFUSION_MODEL wrapper; nothing is left behind.
    """
    rows = kwargs.pop(KEY, None)
    return _decoupled(executor, rows, x, *args, **kwargs) if rows else executor(x, *args, **kwargs)


def _decoupled(
    executor: Any,
    rows: list[Tensor | None],
    x: Tensor,
    timesteps: Any = None,
    context: Any = None,
    y: Any = None,
    control: Any = None,
    transformer_options: dict[str, Any] | None = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Call a UNet with `rows` as `PromptRows.concat` gives them: packed K'/V' and mask in turn."""
    options = transformer_options or {}
    layers = options.get(LAYERS) or cross_attention_layers(executor.class_obj)
    replaced = options.get("patches_replace", {})
    slots = replaced.get("attn2", {})
    dims = [layer.dim for layer in layers]
    latent = (x.shape[-2], x.shape[-1])
    rows = [None if r is None else _for_all(r, x) for r in rows]
    keys_values = [unpack(packed, dims) for packed in rows[::2] if packed is not None]
    masks = [None if m is None else split_levels(m, *latent) for m in rows[1::2]]
    record: AttentionRecord | None = options.get(RECORD)
    watch = None if record is None else record.look(options, latent)
    ours = {}
    for i, layer in enumerate(layers):
        prompts = [(*kv[i], mask) for kv, mask in zip(keys_values, masks, strict=True)]
        other_patch = slots.get(layer.key) or slots.get(layer.key[:2])
        made = DecoupledAttention(prompts, latent, other_patch)
        ours[layer.key] = made if watch is None else watch(made, layer)
    attn2 = {**slots, **ours}
    options = {**options, "patches_replace": {**replaced, "attn2": attn2}}
    return executor(x, timesteps, context, y, control, options, *args, **kwargs)


def _for_all(rows: Tensor, x: Tensor) -> Tensor:
    """Who splits the picture into tiles repeats tensors to the tiles, but not our list."""
    if len(x) % len(rows):
        raise RuntimeError(
            f"The model is run on {len(x)} of the {len(rows)} rows that the image prompt stands "
            "beside, so which row follows which image cannot be told: another node has cut the "
            "batch. Take that node or Apply IP-Adapter out."
        )
    return repeat_to_batch_size(rows, len(x))


def optimized_attention(*args: Any, **kwargs: Any) -> Tensor:
    """Call ComfyUI's attention as it is now: packs replace it after this module was imported."""
    return comfy_attention.optimized_attention(*args, **kwargs)


class DecoupledAttention:
    """One layer for one UNet call: text attention, or the patch in its place, plus the images'."""

    def __init__(
        self,
        prompts: list[tuple[Tensor, Tensor, Levels | None]],
        latent: tuple[int, int],
        other_patch: Callable[..., Tensor] | None,
    ) -> None:
        self.prompts = prompts
        self.latent = latent
        self.other_patch = other_patch

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Tensor:
        out = self.text(q, k, v, options)
        for image, mask in self.images(q, options):
            out = add(out, image, mask)
        return out

    def text(self, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Tensor:
        """Return the text's part, `(B, L, C)`: attention, or what another pack put in its place."""
        if self.other_patch is not None:
            return self.other_patch(q, k, v, options)
        return optimized_attention(
            *(q, k, v, options["n_heads"]),
            attn_precision=options["attn_precision"],
            transformer_options=options,
        )

    def images(self, q: Tensor, options: dict[str, Any]) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Each image prompt's part, `(B, L, C)`, and its mask, `(B, L, 1)` or `(B, 1, 1)`."""
        if q.shape[0] != len(self.prompts[0][0]):
            raise RuntimeError(
                f"Another node's attn2 patch made {q.shape[0]} rows of the "
                f"{len(self.prompts[0][0])} that the image prompt stands beside, so which row "
                "follows which image cannot be told. Take that node or Apply IP-Adapter out."
            )
        for key, value, mask in self.prompts:
            yield image_attention(q, key, value, options["n_heads"]), self._at(mask, q, options)

    def _at(self, levels: Levels | None, q: Tensor, options: dict[str, Any]) -> Tensor | None:
        if levels is None or isinstance(levels, Tensor):
            return levels
        if q.shape[1] in levels:
            return levels[q.shape[1]]
        finest = levels[self.latent[0] * self.latent[1]]
        return resize(finest, self.latent, options["activations_shape"][-2:])
