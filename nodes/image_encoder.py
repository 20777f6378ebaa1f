"""IPA_LoadImageEncoder."""

from __future__ import annotations

from comfy_api.latest import io

from ..ip_adapter_core.comfyui.open_clip import load_image_encoder
from ..ip_adapter_core.files import finder
from . import folders


class LoadImageEncoder(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="IPA_LoadImageEncoder",
            display_name="Load Image Encoder (OpenCLIP)",
            category="model/loaders",
            search_aliases=["open clip", "clip vision", "image encoder", "ip adapter encoder"],
            description=(
                "Reads any vision tower (image encoder) of OpenCLIP from models/clip_vision: the "
                "sizes that Load CLIP Vision does not know, and encoders of your own."
            ),
            inputs=[
                io.Combo.Input(
                    "encoder_name",
                    options=folders.encoder_names(),
                    tooltip="A model of OpenCLIP, whole or its vision tower alone. Its "
                    "configuration is inside the file, or beside it: the same name with .json, or "
                    "open_clip_config.json. ViT-H, ViT-g and ViT-bigG need none, except their "
                    "quickgelu variants (DFN, MetaCLIP), which have the same shapes.",
                )
            ],
            outputs=[
                io.ClipVision.Output(
                    "clip_vision",
                    display_name="clip_vision",
                    tooltip="The image encoder: for Encode Image Prompt.",
                )
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, encoder_name: str | None) -> str | None:
        """A file that was changed is read anew, and so is its configuration. None comes over a
        link."""
        if encoder_name is None:
            return None
        return finder.digest([finder.stamps(folders.encoder_path(encoder_name))])

    @classmethod
    def execute(cls, encoder_name: str) -> io.NodeOutput:
        return io.NodeOutput(load_image_encoder(folders.encoder_path(encoder_name)))
