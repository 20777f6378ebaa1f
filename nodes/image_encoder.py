"""IPA_LoadImageEncoder."""

from __future__ import annotations

import os

from comfy_api.latest import io

from ..ip_adapter_core.host.open_clip import load_image_encoder
from ..ip_adapter_core.image_tower import configurations
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
                "Reads any image tower of OpenCLIP from models/clip_vision: the sizes that Load "
                "CLIP Vision does not know, and encoders of your own."
            ),
            inputs=[
                io.Combo.Input(
                    "encoder_name",
                    options=folders.encoder_names(),
                    tooltip="A model of OpenCLIP, whole or its image tower alone. Its "
                    "configuration is inside the file, or beside it: the same name with .json, or "
                    "open_clip_config.json. ViT-H, ViT-g and ViT-bigG need none.",
                )
            ],
            outputs=[io.ClipVision.Output("clip_vision", display_name="clip_vision")],
        )

    @classmethod
    def fingerprint_inputs(cls, encoder_name: str) -> tuple[tuple[str, int, int], ...]:
        """A file that was changed is read anew, and so is its configuration."""
        path = folders.encoder_path(encoder_name)
        found = []
        for file in (path, *configurations(path)):
            status = os.stat(file)
            found.append((os.path.basename(file), status.st_mtime_ns, status.st_size))
        return tuple(found)

    @classmethod
    def execute(cls, encoder_name: str) -> io.NodeOutput:
        return io.NodeOutput(load_image_encoder(folders.encoder_path(encoder_name)))
