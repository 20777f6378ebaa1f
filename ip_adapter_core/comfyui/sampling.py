"""Image prompts on a model: what `Apply` registers, and what runs while sampling.

Three stateless wrappers share one key. OUTER_SAMPLE prepares the prompts of a run and puts them
into the conditionings; CALC_COND_BATCH keeps those in force at the step; DIFFUSION_MODEL lays
the image branch over the attention slots for one UNet call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol, TypeAlias

import comfy.ldm.modules.attention as host_attention
import comfy.model_patcher
from comfy.patcher_extension import WrappersMP
from comfy.utils import repeat_to_batch_size
from torch import Tensor

from ..attention import add, image_attention
from ..packing import unpack
from .layers import Layer, cross_attention_layers
from .masks import Levels, Size, resize, split_levels
from .prompt_rows import KEY, AttachedPrompts, CompiledPrompt, PromptRows, Run
from .schedule import Moment

LAYERS, UNNAMED = f"{KEY}.layers", f"{KEY}.unnamed"  # in the run's transformer_options
RECORD = f"{KEY}.record"  # the same, and an attachment of the model

Model: TypeAlias = comfy.model_patcher.ModelPatcher
Conditioning: TypeAlias = list[list[Any]]
Conds: TypeAlias = dict[str, list[dict[str, Any]]]
Pair: TypeAlias = tuple[CompiledPrompt, CompiledPrompt]


class AttentionRecord(Protocol):
    """Who wants to see what the image prompts do at every layer (see record.py)."""

    def watching(self, sample: Callable[..., Any], run: Run, conds: Conds) -> Callable[..., Any]:
        """The same sampling run, watched."""

    def evaluates(self, conds: list[Any], latent: Size) -> None:
        """These conditionings, with their prompts in force, are about to be evaluated on latents
        of this size."""

    def look(
        self, options: dict[str, Any], latent: tuple[int, int]
    ) -> Callable[[DecoupledAttention, Layer], Callable[..., Tensor]] | None:
        """What watches the layers of one UNet call on latents of this size; None: nothing."""


def apply_to_model(model: Model, positive: CompiledPrompt, negative: CompiledPrompt) -> Model:
    """A clone that samples with the prompt: `negative` wherever the guider's name for a
    conditioning says so, `positive` on all others. `model` stays as it is."""
    patched = with_wrappers(model)
    before = patched.get_attachment(KEY) or ()
    patched.set_attachments(KEY, (*before, (positive, negative)))
    return patched


def apply_to_conditioning(conditioning: Conditioning, prompt: CompiledPrompt) -> Conditioning:
    """A copy whose entries carry the prompt besides those that they carry already."""

    def attach(options: dict[str, Any]) -> dict[str, Any]:
        model_conds = options.get("model_conds", {})
        before = model_conds[KEY].cond if KEY in model_conds else ()
        attached = AttachedPrompts((*before, prompt))
        return {**options, "model_conds": {**model_conds, KEY: attached}}

    return [[states, attach(options)] for states, options in conditioning]


def for_conditionings(model: Model, *conditionings: Conditioning) -> Model:
    """`model` itself, or, where a conditioning carries a prompt already, one that understands."""
    entries = (options for conditioning in conditionings for _, options in conditioning)
    carried = any(KEY in options.get("model_conds", {}) for options in entries)
    return with_wrappers(model) if carried else model


def with_wrappers(model: Model) -> Model:
    """A clone that understands image prompts in conditionings."""
    patched = model.clone()
    for kind, wrapper in (
        (WrappersMP.OUTER_SAMPLE, prepare_run),
        (WrappersMP.CALC_COND_BATCH, keep_in_force),
        (WrappersMP.DIFFUSION_MODEL, lay_over_attention),
    ):
        patched.remove_wrappers_with_key(kind, KEY)
        patched.add_wrapper_with_key(kind, KEY, wrapper)
    return patched


def prepare_run(executor: Any, noise: Tensor, *args: Any, **kwargs: Any) -> Any:
    """OUTER_SAMPLE: every conditioning gets its prompts as rows beside the latents."""
    guider = executor.class_obj
    model: Model = guider.model_patcher
    run = Run(
        layers=cross_attention_layers(model.get_model_object("diffusion_model")),
        device=model.load_device,
        dtype=model.get_model_object("manual_cast_dtype") or model.model.get_dtype(),
        batch=noise.shape[0],
        latent=(noise.shape[-2], noise.shape[-1]),
        model_sampling=model.get_model_object("model_sampling"),
        sigmas=args[2] if len(args) > 2 else kwargs.get("sigmas"),
    )
    pairs = model.get_attachment(KEY) or ()
    before = guider.conds
    guider.conds = {
        name: [
            _prepared(entry, pairs, run, positive="negative" not in name) for entry in conditioning
        ]
        for name, conditioning in before.items()
    }
    shared = guider.model_options["transformer_options"]
    shared[LAYERS] = run.layers
    shared[UNNAMED] = run.rows([negative for _, negative in pairs]) if pairs else None
    record: AttentionRecord | None = model.get_attachment(RECORD)
    sample = executor
    if record is not None:
        shared[RECORD] = record
        sample = record.watching(executor, run, guider.conds)
    try:
        return sample(noise, *args, **kwargs)
    finally:  # who runs the guider again finds it as it was, and no K'/V' stay on the device
        guider.conds = before


def _prepared(
    entry: dict[str, Any], pairs: tuple[Pair, ...], run: Run, positive: bool
) -> dict[str, Any]:
    model_conds = entry["model_conds"]
    attached = model_conds[KEY].cond if KEY in model_conds else ()
    prompts = (*(pos if positive else neg for pos, neg in pairs), *attached)
    return _with_rows(entry, run.rows(prompts, positive) if prompts else None)


def _with_rows(entry: dict[str, Any], rows: PromptRows | None) -> dict[str, Any]:
    model_conds = {k: v for k, v in entry["model_conds"].items() if k != KEY}
    if rows is not None:
        model_conds[KEY] = rows
    return {**entry, "model_conds": model_conds}


def keep_in_force(
    executor: Any,
    model: Any,
    conds: list[Any],
    x: Tensor,
    timestep: Tensor,
    model_options: dict[str, Any],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """CALC_COND_BATCH: drop the prompts whose window this step lies outside of.

    All conditionings of the call then have our entry, or none has: one without prompts gets an
    empty one, since the host runs those with other entries in a UNet call of their own. One that
    the guider does not know (the PerpNeg node's) gets the model's negative side.
    """
    entries = [entry for conditioning in conds if conditioning for entry in conditioning]
    unnamed = _beside(x, model_options["transformer_options"])
    rows = [entry["model_conds"].get(KEY, unnamed) for entry in entries]
    present = [r for r in rows if r is not None]
    if not present or not all(isinstance(r, PromptRows) for r in present):
        return executor(model, conds, x, timestep, model_options, *args, **kwargs)
    rows = [None if r is None else r.over(x) for r in rows]
    if any(r.changing for r in present):
        moment = Moment(timestep)
        rows = [None if r is None else r.at(moment) for r in rows]
    if any(r is not None and r.prompts for r in rows):
        empty = PromptRows(present[0].cond, ())
        kept = iter([_with_rows(e, r or empty) for e, r in zip(entries, rows, strict=True)])
    else:
        kept = iter([_with_rows(e, None) for e in entries])
    conds = [conditioning and [next(kept) for _ in conditioning] for conditioning in conds]
    record: AttentionRecord | None = model_options["transformer_options"].get(RECORD)
    if record is not None:
        record.evaluates(conds, (x.shape[-2], x.shape[-1]))
    return executor(model, conds, x, timestep, model_options, *args, **kwargs)


def _beside(x: Tensor, options: dict[str, Any]) -> PromptRows | None:
    """The model's negative side for conditionings that the guider does not know. Context windows
    have cut their frames out of `x`, but only the known conditionings' rows."""
    rows: PromptRows | None = options.get(UNNAMED)
    window = options.get("context_window")
    if rows is None or window is None or len(rows.cond) == len(x):
        return rows
    return PromptRows(window.get_tensor(rows.cond), rows.prompts)


def lay_over_attention(executor: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """DIFFUSION_MODEL: for this call, cross-attention becomes decoupled cross-attention around
    whatever patch stands in its slot. Nothing is left behind."""
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
    """A UNet's call, with `rows` as `PromptRows.concat` gives them."""
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
        before = slots.get(layer.key) or slots.get(layer.key[:2])
        made = DecoupledAttention(prompts, latent, before)
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
    """The host's attention as it is now: packs replace it after this module was imported."""
    return host_attention.optimized_attention(*args, **kwargs)


class DecoupledAttention:
    """One layer for one UNet call: text attention, or the patch in its place, plus the images'."""

    def __init__(
        self,
        prompts: list[tuple[Tensor, Tensor, Levels | None]],
        latent: tuple[int, int],
        before: Callable[..., Tensor] | None,
    ) -> None:
        self.prompts = prompts
        self.latent = latent
        self.before = before

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Tensor:
        out = self.text(q, k, v, options)
        for image, mask in self.images(q, options):
            out = add(out, image, mask)
        return out

    def text(self, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Tensor:
        """The text's part, `(B, L, C)`: attention, or what another pack has put in its place."""
        if self.before is not None:
            return self.before(q, k, v, options)
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
