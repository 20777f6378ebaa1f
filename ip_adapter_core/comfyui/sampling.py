"""What runs around sampling, and around each of its steps.

Three stateless wrappers share one key, and `apply.with_wrappers` registers them. Here, OUTER_SAMPLE
prepares the prompts of a run and puts them into the conditionings, and CALC_COND_BATCH keeps those
in force at the step; DIFFUSION_MODEL is in decoupled_attention.py.
"""

from __future__ import annotations

from typing import Any, TypeAlias

from comfy.model_patcher import ModelPatcher
from torch import Tensor

from .conditioning import PromptedStates, compiled
from .decoupled_attention import REPLACED, AttentionRecord, replaced_modules
from .layers import BLOCKS, KEY, LAYERS, RECORD, Blocks, frames_of, layers_by_place
from .prompt_rows import CompiledPrompt, PromptRows, SamplingRun
from .schedule import Moment

Pair: TypeAlias = tuple[CompiledPrompt, CompiledPrompt | None]
UNNAMED = f"{KEY}.unnamed"  # in the run's transformer_options


def prepare_run(executor: Any, noise: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Give every conditioning its prompts as rows beside the latents: the OUTER_SAMPLE wrapper."""
    guider = executor.class_obj
    model: ModelPatcher = guider.model_patcher
    inner = model.get_model_object("diffusion_model")
    run = SamplingRun(
        layers=layers_by_place(inner),
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
    shared[BLOCKS] = Blocks.of(inner)
    against = [negative for _, negative in pairs if negative is not None]
    shared[UNNAMED] = run.rows(against) if against else None
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
    entry: dict[str, Any], pairs: tuple[Pair, ...], run: SamplingRun, positive: bool
) -> dict[str, Any]:
    states = entry.get("cross_attn")
    of_model = (pos if positive else neg for pos, neg in pairs)
    prompts = [*filter(None, of_model), *compiled(states, entry)]
    if isinstance(states, PromptedStates):
        entry = {**entry, "cross_attn": states.as_subclass(Tensor)}
    return _with_rows(entry, run.rows(prompts, positive) if prompts else None)


def _with_rows(entry: dict[str, Any], rows: PromptRows | None) -> dict[str, Any]:
    model_conds = {k: v for k, v in entry["model_conds"].items() if k != KEY}
    if rows is not None:
        model_conds[KEY] = rows
    return {**entry, "model_conds": model_conds}


def prompts_at_step(
    executor: Any,
    model: Any,
    conds: list[Any],
    x: Tensor,
    timestep: Tensor,
    model_options: dict[str, Any],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Leave the prompts in force at this step, as they are then: the CALC_COND_BATCH wrapper.

    All conditionings of the call then have our entry, or none has: one without prompts gets an
    empty one, since ComfyUI runs those with other entries in a UNet call of their own. One that
    the guider does not know (the PerpNeg node's) gets the model's negative side.
    """
    entries = [entry for conditioning in conds if conditioning for entry in conditioning]
    unnamed = _unnamed(x, model_options["transformer_options"])
    rows = [entry["model_conds"].get(KEY, unnamed) for entry in entries]
    present = [r for r in rows if r is not None]
    if not present or not all(isinstance(r, PromptRows) for r in present):
        return executor(model, conds, x, timestep, model_options, *args, **kwargs)
    rows = [None if r is None else r.for_latents(x) for r in rows]
    if any(r.changing for r in present):
        moment = Moment(timestep)
        rows = [None if r is None else r.at_step(moment) for r in rows]
    if any(r is not None and r.prompts for r in rows):
        empty = PromptRows(present[0].cond, ())
        kept = iter([_with_rows(e, r or empty) for e, r in zip(entries, rows, strict=True)])
    else:
        kept = iter([_with_rows(e, None) for e in entries])
    conds = [conditioning and [next(kept) for _ in conditioning] for conditioning in conds]
    shared = model_options["transformer_options"]
    shared[REPLACED] = replaced_modules(model.diffusion_model)
    record: AttentionRecord | None = shared.get(RECORD)
    if record is not None:
        record.evaluates(conds, (x.shape[-2], x.shape[-1]))
    return executor(model, conds, x, timestep, model_options, *args, **kwargs)


def _unnamed(x: Tensor, options: dict[str, Any]) -> PromptRows | None:
    """Return the model's negative side for conditionings that the guider does not know.

    Context windows have cut their frames out of `x`, but only the known conditionings' rows.
    """
    rows: PromptRows | None = options.get(UNNAMED)
    window, frames = options.get("context_window"), frames_of(options)
    if rows is None or frames is None or len(rows.cond) == len(x):
        return rows
    cut = rows.cond[list(frames)] if window is None else window.get_tensor(rows.cond)
    return PromptRows(cut, rows.prompts)
