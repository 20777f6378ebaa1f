"""IPA_NegativeNoise."""

from __future__ import annotations

from comfy_api.latest import io
from torch import Tensor

from ..ip_adapter_core.negative_noise import KINDS, noise


class NegativeNoise(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="IPA_NegativeNoise",
            display_name="Negative Image Noise",
            category="model/conditioning",
            search_aliases=["ip adapter noise", "negative image", "noise image"],
            description=(
                "Makes noise of a picture, for negative_image of Encode Image Prompt: to be "
                "steered away from in place of the empty image."
            ),
            inputs=[
                io.Image.Input("image", tooltip="Usually the reference itself."),
                io.Combo.Input(
                    "kind",
                    options=list(KINDS),
                    default="gaussian",
                    tooltip="gaussian: mixed with grey noise. dissolve: grains take random "
                    "colours. shuffle: squares change places, so that all colours stay.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="How much is noise. 0 is the picture as it is, 1 noise alone.",
                ),
                io.Float.Input(
                    "blur",
                    default=0.0,
                    min=0.0,
                    max=32.0,
                    step=0.5,
                    tooltip="Standard deviation of a blur after it, in pixels of a picture whose "
                    "short side is 224; at a strength of 0 too.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=True,
                    tooltip="The same seed makes the same noise.",
                ),
            ],
            outputs=[
                io.Image.Output(
                    "image",
                    display_name="image",
                    tooltip="The noise: for negative_image of Encode Image Prompt.",
                )
            ],
        )

    @classmethod
    def execute(
        cls, image: Tensor, kind: str, strength: float, blur: float, seed: int
    ) -> io.NodeOutput:
        return io.NodeOutput(noise(image, kind, strength, blur, seed))
