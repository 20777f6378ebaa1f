"""IPA_AutoLoad."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..ip_adapter_core.comfyui import auto
from ..ip_adapter_core.comfyui.adapter import load_adapter
from ..ip_adapter_core.files.finder import ADAPTER_PRESETS
from . import folders, types
from .shown import show


class AutoLoadIPAdapter(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="IPA_AutoLoad",
            display_name="Load IP-Adapter (Auto)",
            category="model/loaders",
            search_aliases=[
                "ip adapter",
                "ipadapter",
                "image prompt",
                "unified loader",
                "ip adapter unified loader",
                "load clip vision",
            ],
            description=(
                "Finds the IP-Adapter for a model, and its image encoder, among the files in "
                "models/ipadapter and models/clip_vision. Goes by what is in the files; only light "
                "and standard, and face and fine-grained, which look alike inside, are told apart "
                "by the words 'light' and 'face' in the name."
            ),
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="Decides for the family (SD1.5, SDXL); only its layers are looked at. "
                    "Connect it straight from the checkpoint: behind a LoRA, every change of that "
                    "would load the files again.",
                ),
                io.Combo.Input(
                    "preset",
                    options=list(ADAPTER_PRESETS),
                    default="standard",
                    tooltip="light: SD1.5 only, follows the picture loosely. standard: its content "
                    "and style. fine-grained: details too (plus). face: a face (plus-face). full "
                    "face: SD1.5 only, a face at its closest (full-face).",
                ),
            ],
            outputs=[
                types.IPAdapter.Output(
                    "adapter",
                    display_name="adapter",
                    tooltip="The adapter that was found: for the Apply nodes.",
                ),
                io.ClipVision.Output(
                    "clip_vision",
                    display_name="clip_vision",
                    tooltip="The image encoder that goes with it: for Encode Image Prompt.",
                ),
                io.String.Output(
                    "chosen",
                    display_name="chosen",
                    tooltip="Which files were taken and why, and what is in doubt, as text.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, preset: str | None = None, **_: Any) -> str:
        """Looks again when a file that may be chosen comes, goes or changes. (The model is not
        given here, nor a preset over a link.)"""
        return auto.fingerprint(preset, folders.adapters(), folders.encoders())

    @classmethod
    def execute(cls, model: Any, preset: str) -> io.NodeOutput:
        choice = auto.find(model, preset, folders.adapters(), folders.encoders())
        chosen = auto.describe(choice)
        show(cls, chosen)
        adapter = load_adapter(choice.adapter.path)
        return io.NodeOutput(adapter, auto.load_encoder(choice.encoder), chosen)
