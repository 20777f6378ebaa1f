"""IPA_PrepareImage."""

from __future__ import annotations

from comfy_api.latest import io, ui
from torch import Tensor

from ..ip_adapter_core.comfyui.encode import CROPS
from ..ip_adapter_core.comfyui.prepare import SQUARES, seen
from ..ip_adapter_core.crops import MAX_GRID


def _fraction(name: str, side: str) -> io.Input:
    return io.Float.Input(
        name,
        default=0.5,
        min=0.0,
        max=1.0,
        step=0.01,
        tooltip=f"For point: its place in the {side}. The square stays inside the picture.",
    )


class PrepareImage(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="IPA_PrepareImage",
            display_name="Prepare Image for Prompt",
            category="model/conditioning",
            search_aliases=[
                "crop for clip vision",
                "prep image for ip adapter",
                "tiles",
                "preview",
            ],
            description=(
                "Shows what the image encoder sees of a picture, and chooses what that is. Encode "
                "Image Prompt takes the result as it is, with any crop."
            ),
            inputs=[
                io.ClipVision.Input(
                    "clip_vision", tooltip="The image encoder, which says how large it sees."
                ),
                io.Image.Input("image", tooltip="The reference, or a batch of them."),
                io.Combo.Input(
                    "crop",
                    options=[*CROPS, *SQUARES],
                    default="center",
                    tooltip="center, pad, none: as in Encode Image Prompt. point: the largest "
                    "square around a chosen point. tiles: squares that cover the whole picture, "
                    "one image each.",
                ),
                _fraction("x", "width, 0 left and 1 right"),
                _fraction("y", "height, 0 top and 1 bottom"),
                io.Int.Input(
                    "grid",
                    default=1,
                    min=1,
                    max=MAX_GRID,
                    tooltip="For tiles: how many along the short side. More show finer details; "
                    "a square picture makes grid × grid of them.",
                ),
            ],
            outputs=[
                io.Image.Output(
                    "image",
                    display_name="image",
                    tooltip="The squares that the encoder sees: for Encode Image Prompt.",
                )
            ],
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls, clip_vision: object, image: Tensor, crop: str, x: float, y: float, grid: int
    ) -> io.NodeOutput:
        made = seen(clip_vision, image, crop, x, y, grid)
        return io.NodeOutput(made, ui=ui.PreviewImage(made, cls=cls))
