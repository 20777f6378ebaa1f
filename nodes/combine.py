"""IPA_CombinePrompts."""

from __future__ import annotations

from comfy_api.latest import io

from ..ip_adapter_core.combine import METHODS, combine, parse_weights
from . import types

MOST = 50


class CombineImagePrompts(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        template = io.Autogrow.TemplatePrefix(
            types.ImagePrompt.Input("prompt", tooltip="All must be of one image encoder."),
            prefix="prompt",
            min=1,
            max=MOST,
        )
        return io.Schema(
            node_id="IPA_CombinePrompts",
            display_name="Combine Image Prompts",
            category="model/conditioning",
            search_aliases=["merge image prompts", "ip adapter combine embeds", "average embeds"],
            description=(
                "Makes one image prompt of several: all images side by side, or one image that "
                "is calculated from theirs."
            ),
            inputs=[
                io.Autogrow.Input(
                    "prompts",
                    template=template,
                    tooltip="A prompt of one image goes with each image of the others.",
                ),
                io.Combo.Input(
                    "method",
                    options=list(METHODS),
                    default="concat",
                    tooltip="concat: all images side by side. average: their weighted mean. "
                    "norm_average: the mean direction with the mean length, which keeps the "
                    "strength of a single image. add: the weighted sum. subtract: the first "
                    "without the others.",
                ),
                io.String.Input(
                    "weights",
                    default="",
                    tooltip='One number per prompt, as in "1, 0.5"; empty for 1 each. concat takes '
                    "1 only.",
                ),
            ],
            outputs=[
                types.ImagePrompt.Output(
                    "image_prompt",
                    display_name="image_prompt",
                    tooltip="The combined prompt, of the same image encoder.",
                )
            ],
        )

    @classmethod
    def execute(cls, prompts: io.Autogrow.Type, method: str, weights: str) -> io.NodeOutput:
        given = types.in_order(prompts)
        return io.NodeOutput(combine(given, method, parse_weights(weights, len(given))))
