"""Encode images, and prepare what is encoded."""

from __future__ import annotations

from comfy_api.latest import io, ui
from torch import Tensor

from ..ip_adapter_core.comfyui.encode import CROPS, SQUARES, encode, prepare_image
from ..ip_adapter_core.comfyui.host import schema
from ..ip_adapter_core.crops import MAX_GRID
from ..ip_adapter_core.negative_noise import KINDS, noise
from . import types


class EncodeImagePrompt(types.Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="IPA_EncodeImage",
            display_name="Encode Image Prompt",
            category="model/conditioning",
            search_aliases=["image prompt", "ip adapter encode", "clip vision encode", "reference"],
            description=(
                "Turns one or more pictures into an image prompt. Depends on the image encoder "
                "only: every adapter made for that encoder can use the result."
            ),
            inputs=[
                io.ClipVision.Input(
                    "clip_vision",
                    tooltip="The image encoder that the adapter was trained with: CLIP ViT-H/14 "
                    "for SD1.5 and the *_vit-h adapters, ViT-bigG/14 for ip-adapter_sdxl and "
                    "ip-adapter_sd15_vit-G.",
                ),
                io.Image.Input(
                    "image",
                    tooltip="The reference. A batch of pictures makes a prompt of several images.",
                ),
                io.Combo.Input(
                    "crop",
                    options=list(CROPS),
                    default="center",
                    tooltip="How a picture that is not square meets the encoder. center: cut the "
                    "long side, as in training. pad: keep everything inside neutral margins. "
                    "none: squeeze.",
                ),
                io.Image.Input(
                    "negative_image",
                    optional=True,
                    tooltip="What to steer away from. Without it: the empty image of training.",
                ),
            ],
            outputs=[
                types.output(
                    types.ImagePrompt,
                    "image_prompt",
                    "The pictures as a prompt: for the Apply nodes, Combine Image Prompts "
                    "or Save Image Prompt.",
                )
            ],
        )

    @classmethod
    def execute(
        cls, clip_vision: object, image: Tensor, crop: str, negative_image: Tensor | None = None
    ) -> io.NodeOutput:
        return io.NodeOutput(encode(clip_vision, image, negative_image, crop))


def _fraction(name: str, side: str) -> io.Input:
    return types.fraction(
        name,
        0.5,
        f"For point: its place in the {side}. The square stays inside the picture.",
        step=0.01,
    )


class PrepareImage(types.Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
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
                types.output(
                    io.Image, "image", "The squares that the encoder sees: for Encode Image Prompt."
                )
            ],
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls, clip_vision: object, image: Tensor, crop: str, x: float, y: float, grid: int
    ) -> io.NodeOutput:
        made = prepare_image(clip_vision, image, crop, x, y, grid)
        return io.NodeOutput(made, ui=ui.PreviewImage(made, cls=cls))


class NegativeNoise(types.Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
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
                types.fraction(
                    "strength",
                    1.0,
                    "How much is noise. 0 is the picture as it is, 1 noise alone.",
                    step=0.01,
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
                types.output(
                    io.Image, "image", "The noise: for negative_image of Encode Image Prompt."
                )
            ],
        )

    @classmethod
    def execute(
        cls, image: Tensor, kind: str, strength: float, blur: float, seed: int
    ) -> io.NodeOutput:
        return io.NodeOutput(noise(image, kind, strength, blur, seed))
