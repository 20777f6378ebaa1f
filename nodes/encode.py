"""IPA_EncodeImage."""

from __future__ import annotations

from comfy_api.latest import io
from torch import Tensor

from ..ip_adapter_core.comfyui.encode import CROPS, encode
from . import types


class EncodeImagePrompt(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
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
                types.ImagePrompt.Output(
                    "image_prompt",
                    display_name="image_prompt",
                    tooltip="The pictures as a prompt: for the Apply nodes, Combine Image Prompts "
                    "or Save Image Prompt.",
                )
            ],
        )

    @classmethod
    def execute(
        cls, clip_vision: object, image: Tensor, crop: str, negative_image: Tensor | None = None
    ) -> io.NodeOutput:
        return io.NodeOutput(encode(clip_vision, image, negative_image, crop))
