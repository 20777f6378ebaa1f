"""Apply image prompts to a model, to conditionings, or to regions."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io
from torch import Tensor

from ..ip_adapter_core.comfyui.apply import (
    ApplySettings,
    apply_to_model,
    compile_prompt,
    compile_prompts,
    curve_of,
    for_conditionings,
    warn_of_black,
    with_wrappers,
)
from ..ip_adapter_core.comfyui.conditioning import Conditioning, apply_to_conditioning
from ..ip_adapter_core.comfyui.face_lora import with_lora
from ..ip_adapter_core.comfyui.host import schema
from ..ip_adapter_core.comfyui.loaders import ManagedAdapter
from ..ip_adapter_core.image_prompt import ImagePrompt
from ..ip_adapter_core.packing import COMBINE
from ..ip_adapter_core.region_masks import OVERLAPS, share_out
from . import types


def shared_inputs() -> list[io.Input]:
    """Return the inputs that the Apply nodes share."""
    return [
        types.IPAdapter.Input(
            "adapter",
            tooltip="An IP-Adapter for the same family as the model (SD1.5, SDXL or Flux.1).",
        ),
        types.ImagePrompt.Input(
            "image_prompt", tooltip="Made with the image encoder that the adapter was trained with."
        ),
        io.Float.Input(
            "weight",
            default=1.0,
            min=-5.0,
            max=5.0,
            step=0.05,
            tooltip="λ: how much the image counts. 1 for the image alone (with an empty text), "
            "about 0.5 together with a text, 0 for none at all.",
        ),
        types.fraction(
            "start_at",
            0.0,
            "Where in the schedule the image prompt begins, as a fraction. With a denoise "
            "below 1, sampling itself begins after 0.",
        ),
        types.fraction(
            "end_at",
            1.0,
            "Where in the schedule it ends; outside this range, the model is untouched. A "
            "step exactly on a boundary belongs to both sides, as in ComfyUI's own ranges.",
        ),
        io.Combo.Input(
            "combine",
            options=list(COMBINE),
            default="concat",
            tooltip="Several images: concat shows the model all of them, average their mean, "
            "per_latent gives each latent of the batch its own.",
        ),
        io.Mask.Input(
            "mask",
            optional=True,
            tooltip="Where the image acts, over the whole picture, of any size. A batch of masks "
            "gives each latent its own. Nodes that sample tiles or crops one by one lay it over "
            "each of them anew.",
        ),
        types.LayerWeights.Input(
            "layer_weights",
            optional=True,
            tooltip="A multiplier of the weight for each cross-attention layer.",
        ),
        io.Custom("CURVE").Input(
            "weight_curve",
            optional=True,
            tooltip="A multiplier of the weight over the schedule, from its start on the left to "
            "its end on the right: connect a Curve Editor. Costs no further UNet call.",
            extra_dict={"forceInput": True},
        ),
        types.LatentWeights.Input(
            "latent_weights",
            optional=True,
            tooltip="A multiplier of the weight for each latent of the batch: frames of an "
            "animation, or the same picture at several weights.",
        ),
        io.Float.Input(
            "lora_weight",
            default=1.0,
            min=-5.0,
            max=5.0,
            step=0.05,
            optional=True,
            tooltip="Of the LoRA that a FaceID adapter carries for the model: for the whole run, "
            "whatever window and mask say. Other adapters have none.",
        ),
    ]


class ApplyIPAdapter(types.Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="IPA_Apply",
            display_name="Apply IP-Adapter",
            category="model/conditioning",
            search_aliases=["ip adapter", "ipadapter", "image prompt", "reference", "style"],
            description=(
                "Makes the model follow a picture besides the text. Several can stand in a row."
            ),
            inputs=[io.Model.Input("model", tooltip=types.PATCHED), *shared_inputs()],
            outputs=[
                types.output(
                    io.Model,
                    "model",
                    "The model that follows the picture: for the sampler, or the next Apply node.",
                )
            ],
        )

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        adapter: ManagedAdapter,
        image_prompt: ImagePrompt,
        weight: float,
        start_at: float,
        end_at: float,
        combine: str,
        mask: Tensor | None = None,
        layer_weights: Sequence[float] | None = None,
        weight_curve: Any = None,
        latent_weights: Sequence[float] | None = None,
        lora_weight: float = 1.0,
    ) -> io.NodeOutput:
        shared = adapter, image_prompt, weight, start_at, end_at, combine
        multipliers = layer_weights, weight_curve, latent_weights
        settings = ApplySettings(*shared, mask, *multipliers, lora_weight=lora_weight)
        compiled = compile_prompt(model, settings)
        if compiled is None:
            return io.NodeOutput(model)
        model = with_lora(model, adapter, settings.lora_weight)
        return io.NodeOutput(apply_to_model(model, *compiled))


class ApplyIPAdapterConditioning(types.Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="IPA_ApplyConditioning",
            display_name="Apply IP-Adapter (Conditioning)",
            category="model/conditioning",
            search_aliases=["ip adapter", "image prompt", "regional image prompt"],
            description=(
                "Gives the picture to these two conditionings only, so that each prompt or "
                "region can have its own. The sampler needs the model output too."
            ),
            inputs=[
                io.Model.Input("model", tooltip=types.PATCHED),
                io.Conditioning.Input("positive", tooltip="Gets the image."),
                io.Conditioning.Input(
                    "negative", tooltip="Gets the empty image, or the prompt's negative one."
                ),
                *shared_inputs(),
            ],
            outputs=[
                types.output(
                    io.Model,
                    "model",
                    "For the sampler or the next node of this kind: it reads the pictures "
                    "of the conditionings.",
                ),
                types.output(
                    io.Conditioning, "positive", "The positive conditioning, with the image."
                ),
                types.output(
                    io.Conditioning,
                    "negative",
                    "The negative conditioning, with the empty image or the prompt's negative one.",
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        positive: Conditioning,
        negative: Conditioning,
        adapter: ManagedAdapter,
        image_prompt: ImagePrompt,
        weight: float,
        start_at: float,
        end_at: float,
        combine: str,
        mask: Tensor | None = None,
        layer_weights: Sequence[float] | None = None,
        weight_curve: Any = None,
        latent_weights: Sequence[float] | None = None,
        lora_weight: float = 1.0,
    ) -> io.NodeOutput:
        shared = adapter, image_prompt, weight, start_at, end_at, combine
        multipliers = layer_weights, weight_curve, latent_weights
        settings = ApplySettings(*shared, mask, *multipliers, lora_weight=lora_weight)
        compiled = compile_prompt(model, settings)
        if compiled is None:
            return io.NodeOutput(for_conditionings(model, positive, negative), positive, negative)
        return io.NodeOutput(
            with_wrappers(with_lora(model, adapter, settings.lora_weight)),
            apply_to_conditioning(positive, *compiled),
            apply_to_conditioning(negative, compiled[1], compiled[1]),
        )


_MOST = 32  # regions


class ApplyIPAdapterRegions(types.Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        knobs = {knob.id: knob for knob in shared_inputs()}
        names = [*("weight", "start_at", "end_at", "combine"), "layer_weights"]
        names += ["weight_curve", "lora_weight"]
        return schema(
            node_id="IPA_ApplyRegions",
            display_name="Apply IP-Adapter (Regions)",
            category="model/conditioning",
            search_aliases=["ip adapter", "regional image prompt", "image prompt mask", "regions"],
            description="Several pictures in one model, each in the region of its own mask.",
            inputs=[
                io.Model.Input("model", tooltip=types.PATCHED),
                knobs["adapter"],
                io.Autogrow.Input(
                    "image_prompts",
                    template=io.Autogrow.TemplatePrefix(
                        types.ImagePrompt.Input(
                            "image_prompt",
                            tooltip="Made with the image encoder that the adapter was trained "
                            "with.",
                        ),
                        "image_prompt",
                        1,
                        _MOST,
                    ),
                    tooltip="One per region.",
                ),
                io.Autogrow.Input(
                    "masks",
                    template=io.Autogrow.TemplatePrefix(
                        io.Mask.Input("mask", tooltip="White where the image acts."),
                        "mask",
                        1,
                        _MOST,
                    ),
                    tooltip="Where each image prompt acts, in their order, of any sizes. One image "
                    "prompt more than masks: the last one gets what the masks leave free.",
                ),
                io.Combo.Input(
                    "overlap",
                    options=list(OVERLAPS),
                    default="normalize",
                    tooltip="Where masks overlap: normalize lets the regions share, so that "
                    "together they count no more than the weight; add adds them up.",
                ),
                *(knobs[name] for name in names),
            ],
            outputs=[
                types.output(
                    io.Model,
                    "model",
                    "The model that follows all of the pictures: for the sampler, or a "
                    "further Apply node.",
                )
            ],
        )

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        adapter: ManagedAdapter,
        image_prompts: dict[str, ImagePrompt | None],
        masks: dict[str, Tensor | None],
        overlap: str,
        weight: float,
        start_at: float,
        end_at: float,
        combine: str,
        layer_weights: Sequence[float] | None = None,
        weight_curve: Any = None,
        lora_weight: float = 1.0,
    ) -> io.NodeOutput:
        prompts, given = types.by_number(image_prompts), types.by_number(masks)
        _check_paired(prompts.keys(), given.keys())
        for number, mask in given.items():
            ApplySettings.check_mask(mask)
            warn_of_black(mask, f"mask{number}")
        shares = share_out([*given.values()], overlap, rest=len(prompts) > len(given))
        curve = curve_of(weight_curve)
        regions = [
            ApplySettings(
                adapter=adapter,
                image_prompt=prompt,
                weight=weight,
                start_at=start_at,
                end_at=end_at,
                combine=combine,
                mask=mask,
                layer_weights=layer_weights,
                weight_curve=curve,
                lora_weight=lora_weight,
            )
            for prompt, mask in zip(prompts.values(), shares, strict=True)
        ]
        made = compile_prompts(model, regions)
        if made:
            model = with_lora(model, adapter, lora_weight)
        for sides in made:
            model = apply_to_model(model, *sides)
        return io.NodeOutput(model)


def _check_paired(prompts: Collection[int], masks: Collection[int]) -> None:
    """Raise ValueError unless masks and prompts belong together by number.

    Every prompt but the last has a mask, and every mask a prompt.
    """
    lacking = [f"mask{n}" for n in prompts if n not in masks and n != max(prompts)]
    lacking += [f"image_prompt{n}" for n in masks if n not in prompts]
    if lacking or not masks:
        raise ValueError(
            f"{len(prompts)} image prompts do not go with {len(masks)} masks: nothing comes in at "
            f"{', '.join(lacking) or 'masks'}. Give every image prompt the mask of its number; "
            "only the last may have none, and gets what the masks leave free."
        )
