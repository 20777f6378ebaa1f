"""IPA_LoadAdapter."""

from __future__ import annotations

import os

from comfy_api.latest import io

from ..ip_adapter_core.comfyui.adapter import load_adapter
from . import folders, types


class LoadIPAdapter(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="IPA_LoadAdapter",
            display_name="Load IP-Adapter",
            category="model/loaders",
            search_aliases=["ip adapter", "ipadapter", "image prompt model", "load adapter"],
            description=(
                "Reads an IP-Adapter from models/ipadapter. Its kind (base, fine-grained or "
                "full; SD1.5 or SDXL) is recognised from the file's contents."
            ),
            inputs=[
                io.Combo.Input(
                    "adapter_name",
                    options=folders.adapter_names(),
                    tooltip="A .safetensors, .bin or .pt file in models/ipadapter. It must match "
                    "the family of the model (SD1.5, SDXL) and the image encoder.",
                )
            ],
            outputs=[
                types.IPAdapter.Output(
                    "adapter", display_name="adapter", tooltip="The adapter: for the Apply nodes."
                )
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, adapter_name: str | None) -> tuple[str, int, int] | None:
        """A file that was trained or downloaded anew is read anew. None comes over a link."""
        if adapter_name is None:
            return None
        status = os.stat(folders.adapter_path(adapter_name))
        return adapter_name, status.st_mtime_ns, status.st_size

    @classmethod
    def execute(cls, adapter_name: str) -> io.NodeOutput:
        return io.NodeOutput(load_adapter(folders.adapter_path(adapter_name)))
