"""Compile the settings of an Apply node, and apply the result to a model or to conditionings."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ..compatibility import check_encoder, check_fits
from ..image_prompt import ImagePrompt
from ..packing import LayerFolding, Packed, lacks_black, layer_folding
from ..variants import CROSS_ATTENTION
from .conditioning import Conditioning, attached_to
from .decoupled_attention import inject_decoupled_attention
from .host import FLUX_HOOKS, CurveInput
from .layers import KEY, is_kolors, layers_at, layers_of, name_of
from .loaders import ManagedAdapter
from .masks import Deal, Masks, Resampling
from .prompt_rows import CompiledPrompt
from .sampling import prepare_run, prompts_at_step
from .schedule import Schedule

logger = logging.getLogger("comfyui_ip_adapter")
Sides: TypeAlias = tuple[CompiledPrompt, CompiledPrompt | None]
"""Positive and negative, None where nothing stands against the image."""


@dataclass(frozen=True)
class ApplySettings:
    """What the Apply nodes ask for.

    `weight` is λ; `start_at`, `end_at` are fractions of the schedule; `mask (M, H, W)` or `(H, W)`.
    Multipliers of λ: `layer_weights` one a layer (and more than that in a `LayerFolding`),
    `weight_curve` over the schedule (ComfyUI's curve, or what it is made of), `latent_weights` one
    a latent. `deal`, `resampling`: of images and masks over the latents. `lora_weight`: of the LoRA
    that a FaceID adapter carries for the model. Raises ValueError for values out of their domain.
    """

    adapter: ManagedAdapter
    image_prompt: ImagePrompt
    weight: float
    start_at: float
    end_at: float
    combine: str
    mask: Tensor | None = None
    layer_weights: Sequence[float] | LayerFolding | None = None
    weight_curve: Any = None
    latent_weights: Sequence[float] | None = None
    deal: Deal = "in turn"
    resampling: Resampling = "bicubic"
    lora_weight: float = 1.0

    def __post_init__(self) -> None:
        for name in ("weight", "start_at", "end_at", "lora_weight"):
            value = getattr(self, name)
            if not math.isfinite(value):
                raise ValueError(f"{name} must be a finite number, found {value}.")
        if self.start_at > self.end_at:
            raise ValueError(
                f"start_at ({self.start_at}) lies after end_at ({self.end_at}). Both are "
                "fractions of the schedule, 0 its first step and 1 its end: swap them."
            )
        if self.mask is not None:
            self.check_mask(self.mask)
        if self.latent_weights is not None:
            self._check_latent_weights(self.latent_weights)

    @staticmethod
    def check_mask(mask: Tensor) -> None:
        """Raise ValueError unless it is one or more masks with finite values."""
        if mask.ndim not in (2, 3) or 0 in mask.shape:
            raise ValueError(
                f"mask has shape {list(mask.shape)}; expected [masks, height, width], none of "
                "them 0. Connect a mask that holds at least one picture."
            )
        if not mask.isfinite().all():
            raise ValueError("mask contains NaN or infinite values; expected 0 … 1.")

    def _check_latent_weights(self, weights: Sequence[float]) -> None:
        if not len(weights) or not all(map(math.isfinite, weights)):
            raise ValueError(
                f"latent_weights must be one finite number a latent; found {list(weights)}."
            )

    @property
    def masks(self) -> Masks | None:
        """Return what the image branch is multiplied with; None without mask and weights."""
        if self.mask is None and self.latent_weights is None:
            return None
        weights = [1.0] if self.latent_weights is None else self.latent_weights
        mask = None if self.mask is None else self.mask.float().cpu()
        if mask is not None and mask.ndim == 2:
            mask = mask[None]
        return Masks(mask, torch.tensor(weights, dtype=torch.float32), self.deal, self.resampling)

    @property
    def schedule(self) -> Schedule:
        return Schedule(self.start_at, self.end_at, curve_of(self.weight_curve))


def warn_of_black(mask: Tensor, name: str = "mask") -> None:
    """Tell the log of a mask that lets nothing act.

    Load Image gives such a one of an image without transparency.
    """
    if not (mask > 0).any():
        logger.warning(
            "%s is black everywhere, so that its image acts nowhere. (Load Image gives such a mask "
            "for a picture without transparency: draw one there, or use Load Image as Mask.)",
            name,
        )


def curve_of(given: Any, name: str = "weight_curve") -> CurveInput | None:
    """Return ComfyUI's curve, also from what an API request holds in its place.

    (A bare list in a request is a link to ComfyUI.) `name`: of the input, for messages. Raises
    ValueError for what is no curve, or has values that are not finite.
    """
    if given is None:
        return None
    try:
        curve: CurveInput = CurveInput.from_raw(given)
        finite = curve.points and all(math.isfinite(x) for point in curve.points for x in point)
    except (TypeError, ValueError, KeyError) as error:
        raise ValueError(
            f"{name} is {given!r}; expected the output of a Curve Editor, or in a request "
            '{"points": [[0, 1], [1, 0.5]]}, each a fraction of the schedule and a multiplier.'
        ) from error
    if not finite:
        raise ValueError(f"{name} has the points {curve.points}; expected one or more finite ones.")
    return curve


def compile_prompt(model: ModelPatcher, settings: ApplySettings) -> Sides | None:
    """Both sides, or None where λ is 0 on every layer: then nothing is to do.

    Raises ValueError if model, adapter and image prompt do not belong together.
    """
    if settings.mask is not None:
        warn_of_black(settings.mask)
    made = compile_prompts(model, [settings])
    return made[0] if made else None


def compile_prompts(model: ModelPatcher, several: Sequence[ApplySettings]) -> list[Sides]:
    """Compile several prompts of one adapter, loaded once; leave those of no weight out."""
    acting = [(settings, _folding(model, settings)) for settings in several]
    acting = [(settings, folding) for settings, folding in acting if folding.acts]
    if not acting:
        return []
    with several[0].adapter.loaded():
        return [_sides(model, settings, folding) for settings, folding in acting]


def _folding(model: ModelPatcher, settings: ApplySettings) -> LayerFolding:
    adapter, weights = settings.adapter, settings.layer_weights
    inner = model.get_model_object("diffusion_model")
    layers = layers_at(inner, adapter.spec.place)
    check_fits(adapter.spec, adapter.name, name_of(model), layers, is_kolors(inner))
    check_encoder(adapter.spec, settings.image_prompt, adapter.name, adapter.trained_with)
    if adapter.spec.place != CROSS_ATTENTION:
        if not FLUX_HOOKS:
            raise RuntimeError(
                f"'{adapter.name}' is an IP-Adapter for Flux.1, whose blocks this ComfyUI, or a "
                "pack that put its own in their place, does not open. Update ComfyUI to 0.17 or "
                "newer, or take that pack out."
            )
        every = layers_of(model)  # which Layer Weights gives one number each
        if weights is not None and not isinstance(weights, LayerFolding):
            weights = LayerFolding.alike(weights)
        if weights is not None and len(weights.positive) == len(every):
            weights = weights.only([i for i, layer in enumerate(every) if layer in layers])
    return layer_folding(adapter.spec, settings.weight, weights)


def _sides(model: ModelPatcher, settings: ApplySettings, folding: LayerFolding) -> Sides:
    adapter, masks, schedule = settings.adapter, settings.masks, settings.schedule
    spec, prompt = adapter.spec, settings.image_prompt
    dtype, dim_head = torch.float32, None
    if spec.place != CROSS_ATTENTION:
        # Rows of a transformer are large: InstantX's 128 tokens take 90 MB in 16 bit.
        dtype = model.get_model_object("manual_cast_dtype") or model.model.get_dtype()
        dim_head = layers_at(model.get_model_object("diffusion_model"), spec.place)[0].dim_head

    def made(packed: Packed) -> CompiledPrompt:
        return CompiledPrompt(packed, masks, schedule, spec.layer_dims, settings.deal, spec.place)

    if spec.place == "block output" and lacks_black(prompt):
        logger.warning(
            "The image prompt for '%s' was saved or made without a black picture, which this "
            "adapter is guided away from: with guidance (cfg) above 1 the result differs. Encode "
            "the image again.",
            adapter.name,
        )
    image, against = adapter.compile(prompt, folding, settings.combine, dtype, dim_head)
    return made(image), None if against is None else made(against)


def apply_to_model(
    model: ModelPatcher, positive: CompiledPrompt, negative: CompiledPrompt | None
) -> ModelPatcher:
    """Return a clone that samples with the prompt; `model` stays as it is.

    `negative` acts wherever the guider's name for a conditioning says so, `positive` on all others.
    """
    patched = with_wrappers(model)
    before = patched.get_attachment(KEY) or ()
    patched.set_attachments(KEY, (*before, (positive, negative)))
    return patched


def for_conditionings(model: ModelPatcher, *conditionings: Conditioning) -> ModelPatcher:
    """`model` itself, or, where a conditioning carries a prompt already, one that understands."""
    carried = any(attached_to(*entry) for conditioning in conditionings for entry in conditioning)
    return with_wrappers(model) if carried else model


def with_wrappers(model: ModelPatcher) -> ModelPatcher:
    """Return a clone that understands image prompts in conditionings."""
    patched = model.clone()
    for kind, wrapper in (
        (WrappersMP.OUTER_SAMPLE, prepare_run),
        (WrappersMP.CALC_COND_BATCH, prompts_at_step),
        (WrappersMP.DIFFUSION_MODEL, inject_decoupled_attention),
    ):
        patched.remove_wrappers_with_key(kind, KEY)
        patched.add_wrapper_with_key(kind, KEY, wrapper)
    return patched
