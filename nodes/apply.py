"""IPA_Apply and IPA_ApplyConditioning."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..ip_adapter_core.comfyui.apply import Settings, compile_prompt
from ..ip_adapter_core.comfyui.sampling import (
    apply_to_conditioning,
    apply_to_model,
    for_conditionings,
    with_wrappers,
)
from ..ip_adapter_core.packing import COMBINE
from . import types


def settings() -> list[io.Input]:
    """The inputs that the Apply nodes share; `Settings` takes them by name."""
    return [
        types.IPAdapter.Input(
            "adapter", tooltip="An IP-Adapter for the same family as the model (SD1.5 or SDXL)."
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
        io.Float.Input(
            "start_at",
            default=0.0,
            min=0.0,
            max=1.0,
            step=0.001,
            tooltip="Where in the schedule the image prompt begins, as a fraction. With a denoise "
            "below 1, sampling itself begins after 0.",
        ),
        io.Float.Input(
            "end_at",
            default=1.0,
            min=0.0,
            max=1.0,
            step=0.001,
            tooltip="Where in the schedule it ends; outside this range, the model is untouched. A "
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
            "gives each latent its own.",
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
    ]


class ApplyIPAdapter(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="IPA_Apply",
            display_name="Apply IP-Adapter",
            category="model/conditioning",
            search_aliases=["ip adapter", "ipadapter", "image prompt", "reference", "style"],
            description=(
                "Makes the model follow a picture besides the text. Several can stand in a row."
            ),
            inputs=[io.Model.Input("model", tooltip=types.PATCHED), *settings()],
            outputs=[
                io.Model.Output(
                    "model",
                    display_name="model",
                    tooltip="The model that follows the picture: for the sampler, or the next "
                    "Apply node.",
                )
            ],
        )

    @classmethod
    def execute(cls, model: Any, **settings: Any) -> io.NodeOutput:
        compiled = compile_prompt(model, Settings(**settings))
        return io.NodeOutput(model if compiled is None else apply_to_model(model, *compiled))


class ApplyIPAdapterConditioning(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
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
                *settings(),
            ],
            outputs=[
                io.Model.Output(
                    "model",
                    display_name="model",
                    tooltip="For the sampler or the next node of this kind: it reads the pictures "
                    "of the conditionings.",
                ),
                io.Conditioning.Output(
                    "positive",
                    display_name="positive",
                    tooltip="The positive conditioning, with the image.",
                ),
                io.Conditioning.Output(
                    "negative",
                    display_name="negative",
                    tooltip="The negative conditioning, with the empty image or the prompt's "
                    "negative one.",
                ),
            ],
        )

    @classmethod
    def execute(cls, model: Any, positive: Any, negative: Any, **settings: Any) -> io.NodeOutput:
        compiled = compile_prompt(model, Settings(**settings))
        if compiled is None:
            return io.NodeOutput(for_conditionings(model, positive, negative), positive, negative)
        return io.NodeOutput(
            with_wrappers(model),
            *map(apply_to_conditioning, (positive, negative), compiled),
        )
