"""Decoupled attention in one call of a model, and in a UNet's cross-attention layers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, TypeAlias

import comfy.ldm.modules.attention as comfy_attention
from torch import Tensor, nn

from ..attention import image_attention
from ..layer_weights import LayerKey
from ..packing import unpack
from ..variants import CROSS_ATTENTION, Place
from .flux_blocks import AttentionOutputs, BlockOutputs
from .layers import KEY, LAYERS, RECORD, Conds, Layer, cross_attentions, layers_by_place
from .masks import Size
from .model_call import Call, ImageParts, LayerPrompts, MaskAt, Prompts, Seen, for_all, forward_as
from .prompt_rows import SamplingRun

Patch: TypeAlias = Callable[..., Tensor]
REPLACED = f"{KEY}.replaced"  # in the run's transformer_options


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

    def look(self, options: dict[str, Any], latent: Size) -> Callable[[Place, Layer], Seen] | None:
        """Return what watches the layers of one model call on latents of this size, if any."""


def inject_decoupled_attention(executor: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Make attention decoupled for this call of a model, around whatever patches stand there.

    The DIFFUSION_MODEL wrapper; nothing is left behind. (APPLY_MODEL is outside what ComfyUI's
    torch.compile traces, which never looks at the options again: a prompt's window would not end.)
    """
    rows = kwargs.pop(KEY, None)
    if not rows:
        return executor(x, *args, **kwargs)
    # Where it stands differs between models; behind it come no mappings, before it control's.
    mappings = [i for i, value in enumerate(args) if isinstance(value, dict)]
    named = "transformer_options" in kwargs or not mappings
    given = kwargs.get("transformer_options") if named else args[mappings[-1]]
    with _laid(given or {}, executor.class_obj, rows, x) as options:
        if named:
            return executor(x, *args, **{**kwargs, "transformer_options": options})
        at = mappings[-1]
        return executor(x, *args[:at], options, *args[at + 1 :], **kwargs)


@contextlib.contextmanager
def _laid(
    options: dict[str, Any], model: nn.Module, rows: list[Any], x: Tensor
) -> Iterator[dict[str, Any]]:
    """Lay `rows`, as `PromptRows.concat` gives them, over the options of one call."""
    latent = (x.shape[-2], x.shape[-1])
    call = Call(latent, tuple(options.get("cond_or_uncond") or ()))
    record: AttentionRecord | None = options.get(RECORD)
    watch = None if record is None else record.look(options, latent)
    of_model = options.get(LAYERS) or layers_by_place(model)
    slots = list(zip(rows[::3], rows[1::3], rows[2::3], strict=True))
    with contextlib.ExitStack() as around:
        for place, kind in PLACES.items():
            own = [(packed, mask) for packed, mask, where in slots if where == place]
            if not own:
                continue
            layers = of_model[place]
            dims = [layer.dim for layer in layers]
            keys_values = [unpack(for_all(packed, x), dims) for packed, _ in own]
            masks = [None if mask is None else MaskAt(mask, x) for _, mask in own]
            prompts: list[Prompts] = [
                [(*kv[i], mask) for kv, mask in zip(keys_values, masks, strict=True)]
                for i in range(len(dims))
            ]
            seen = [None if watch is None else watch(place, layer) for layer in layers]
            made = kind(list(zip(layers, prompts, seen, strict=True)), call)
            options = around.enter_context(made.laid(options, model))
        yield options


class CrossAttentionSlots:
    """A UNet's cross-attention: the image's part joins that of the text, in the `attn2` slots."""

    def __init__(self, layers: Sequence[LayerPrompts], call: Call) -> None:
        self.layers = layers
        self.call = call

    @contextlib.contextmanager
    def laid(self, options: dict[str, Any], unet: nn.Module) -> Iterator[dict[str, Any]]:
        """Give a copy of the options that has the images' parts in it."""
        replaced = options.get("patches_replace", {})
        slots = replaced.get("attn2", {})
        ours: dict[Any, Patch] = {}
        theirs = options.get(REPLACED, ())
        modules = dict(cross_attentions(unet)) if theirs else {}
        with contextlib.ExitStack() as around:
            for layer, prompts, seen in self.layers:
                other_patch = slots.get(layer.key) or slots.get(layer.key[:2])
                made = DecoupledAttention(prompts, self.call, other_patch, seen)
                if other_patch is None and layer.key in theirs:
                    module = modules[layer.key]
                    around.enter_context(forward_as(module, _on_top(module, made)))
                else:
                    ours[layer.key] = made
            attn2 = {**slots, **ours}
            yield {**options, "patches_replace": {**replaced, "attn2": attn2}}


PLACES: dict[Place, Any] = {
    CROSS_ATTENTION: CrossAttentionSlots,
    "attention output": AttentionOutputs,
    "block output": BlockOutputs,
}


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


def _on_top(module: Any, attention: DecoupledAttention) -> Callable[..., Tensor]:
    """Return a forward that adds the images to whatever the layer's own gives."""
    inner = module.forward

    def project(image: Tensor) -> Tensor:
        # Images join before the output projection, which is linear but for its bias.
        bias = module.to_out(image.new_zeros(1, 1, image.shape[-1]))
        return module.to_out(image) - bias

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        options = {**(kwargs.get("transformer_options") or {}), "n_heads": module.heads}
        out = inner(x, *args, **kwargs)
        return attention.add_images(out, module.to_q(x), options, project)

    return forward


def optimized_attention(*args: Any, **kwargs: Any) -> Tensor:
    """Call ComfyUI's attention as it is now: packs replace it after this module was imported."""
    return comfy_attention.optimized_attention(*args, **kwargs)


class DecoupledAttention(ImageParts):
    """One layer for one UNet call: text attention, or the patch in its place, plus the images'."""

    def __init__(
        self,
        prompts: Prompts,
        call: Call,
        other_patch: Patch | None,
        seen: Seen | None = None,
    ) -> None:
        super().__init__(prompts, call, seen)
        self.other_patch = other_patch

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

        def image_of(q: Tensor, key: Tensor, value: Tensor) -> Tensor:
            image = image_attention(q, key, value, options["n_heads"])
            return image if project is None else project(image)

        return self.add_to(text, q, image_of, options.get("activations_shape"))
