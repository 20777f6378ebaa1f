"""Decoupled cross-attention in one UNet call: where its parts are laid, what one layer computes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

import comfy.ldm.modules.attention as comfy_attention
import torch
from comfy.utils import repeat_to_batch_size
from torch import Tensor, nn

from ..attention import add, image_attention
from ..layer_weights import LayerKey
from ..packing import unpack
from .layers import KEY, LAYERS, RECORD, Conds, Layer, cross_attention_layers, cross_attentions
from .masks import MaskRows, Size, layer_size
from .prompt_rows import SamplingRun

Patch: TypeAlias = Callable[..., Tensor]
Seen: TypeAlias = Callable[[Tensor, Tensor, Tensor | None, Any], None]
"""Takes norms of the text's part `(B, L)` and the images' `(B, prompts, L)`, the order of the rows
if they are repeated, and the layer's shape as its block tells it."""
REPLACED = f"{KEY}.replaced"  # in the run's transformer_options
_UNCONDITIONAL = 1  # the number that a guider's call gives a negative conditioning's rows
_ALIKE = 1e-3  # of the largest value: what rows of the same latent and text may differ by


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

    def look(self, options: dict[str, Any], latent: Size) -> Callable[[Layer], Seen] | None:
        """Return what watches the layers of one UNet call on latents of this size, if any."""


def inject_decoupled_attention(executor: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Make cross-attention decoupled for this call, around whatever patch stands in its slot.

    The DIFFUSION_MODEL wrapper; nothing is left behind.
    """
    rows = kwargs.pop(KEY, None)
    return _decoupled(executor, rows, x, *args, **kwargs) if rows else executor(x, *args, **kwargs)


def _decoupled(
    executor: Any,
    rows: list[Any],
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
    unet = executor.class_obj
    layers = options.get(LAYERS) or cross_attention_layers(unet)
    replaced = options.get("patches_replace", {})
    slots = replaced.get("attn2", {})
    dims = [layer.dim for layer in layers]
    latent = (x.shape[-2], x.shape[-1])
    keys_values = [unpack(_for_all(packed, x), dims) for packed in rows[::2]]
    masks = [None if mask is None else _Mask(mask, x) for mask in rows[1::2]]
    call = _Call(latent, tuple(options.get("cond_or_uncond") or ()))
    record: AttentionRecord | None = options.get(RECORD)
    watch = None if record is None else record.look(options, latent)
    ours: dict[Any, Patch] = {}
    theirs = options.get(REPLACED, ())
    modules = dict(cross_attentions(unet)) if theirs else {}
    with contextlib.ExitStack() as around:
        for i, layer in enumerate(layers):
            prompts = [(*kv[i], mask) for kv, mask in zip(keys_values, masks, strict=True)]
            other_patch = slots.get(layer.key) or slots.get(layer.key[:2])
            seen = None if watch is None else watch(layer)
            made = DecoupledAttention(prompts, call, other_patch, seen)
            if other_patch is None and layer.key in theirs:
                around.enter_context(_on_top(modules[layer.key], made))
            else:
                ours[layer.key] = made
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


def replaced_modules(unet: nn.Module) -> tuple[LayerKey, ...]:
    """Return the layers where another pack's forward stands in place of ComfyUI's.

    What it does beside attention (guidance by a second text, regions) only itself can do. Not to
    be asked inside a UNet call, which may be compiled.
    """
    usual = comfy_attention.CrossAttention.forward
    return tuple(
        key
        for key, attention in cross_attentions(unet)
        if getattr(attention.forward, "__func__", None) is not usual
    )


@contextlib.contextmanager
def _on_top(module: Any, attention: DecoupledAttention) -> Iterator[None]:
    """Add the images to whatever the layer's own forward gives, while the context lasts."""
    inner, before = module.forward, vars(module).get("forward")

    def project(image: Tensor) -> Tensor:
        # Images join before the output projection, which is linear but for its bias.
        bias = module.to_out(image.new_zeros(1, 1, image.shape[-1]))
        return module.to_out(image) - bias

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        options = {**(kwargs.get("transformer_options") or {}), "n_heads": module.heads}
        out = inner(x, *args, **kwargs)
        return attention.add_images(out, module.to_q(x), options, project)

    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


def optimized_attention(*args: Any, **kwargs: Any) -> Tensor:
    """Call ComfyUI's attention as it is now: packs replace it after this module was imported."""
    return comfy_attention.optimized_attention(*args, **kwargs)


class _Mask:
    """A mask in one UNet call: `(B, tokens, 1)` at each layer's size, or `(B, 1, 1)` at all."""

    def __init__(self, rows: MaskRows, x: Tensor) -> None:
        self.rows, self.x = rows, x
        self.latent = (x.shape[-2], x.shape[-1])
        levels = MaskRows(_for_all(rows.levels, x), rows.at)
        self.views = levels.views(self.latent)

    def of(self, tokens: int, told: Sequence[int] | None) -> Tensor:
        """Return it for a layer of so many tokens, whose block may have `told` its shape."""
        if 0 in self.views:
            return self.views[0]
        if tokens not in self.views:
            size = layer_size(tokens, self.latent, told)
            if size is None:
                raise RuntimeError(
                    f"A cross-attention layer has {tokens} places, which are no known size of the "
                    f"{self.latent[0]}×{self.latent[1]} latent: another node has changed it "
                    "without saying how. Take the image prompt's mask or that node out."
                )
            self.views[tokens] = _for_all(self.rows.at(size), self.x)
        return self.views[tokens]


@dataclass(eq=False)
class _Call:
    """What the layers of one UNet call share: the latent's size, and which text its chunks are.

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


class DecoupledAttention:
    """One layer for one UNet call: text attention, or the patch in its place, plus the images'."""

    def __init__(
        self,
        prompts: list[tuple[Tensor, Tensor, _Mask | None]],
        call: _Call,
        other_patch: Patch | None,
        seen: Seen | None = None,
    ) -> None:
        self.prompts = prompts
        self.call = call
        self.other_patch = other_patch
        self.seen = seen

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Tensor:
        return self.add_images(self._text(q, k, v, options), q, options)

    def _text(self, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Tensor:
        """Return the text's part, `(B, L, C)`: attention, or what another pack put in its place."""
        if self.other_patch is not None:
            return self.other_patch(q, k, v, options)
        return optimized_attention(
            *(q, k, v, options["n_heads"]),
            attn_precision=options.get("attn_precision"),
            transformer_options=options,
        )

    def add_images(
        self,
        text: Tensor,
        q: Tensor,
        options: dict[str, Any],
        project: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Add every image's part, perhaps projected, to the text's, `(B, L, C)`."""
        out, rows, told = text, len(self.prompts[0][0]), options.get("activations_shape")
        order = None if len(q) == rows else self.call.order(q, rows)
        norms = []
        for key, value, levels in self.prompts:
            mask = None if levels is None else levels.of(q.shape[1], told)
            if order is not None:
                key, value = key[order], value[order]
                mask = None if mask is None else mask[order]
            image = image_attention(q, key, value, options["n_heads"])
            image = image if project is None else project(image)
            out = add(out, image, mask)
            if self.seen is not None:
                norms.append((image if mask is None else image * mask).float().norm(dim=-1))
        if self.seen is not None:
            self.seen(text.float().norm(dim=-1), torch.stack(norms, 1), order, told)
        return out
