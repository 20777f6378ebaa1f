"""Load an adapter and an image encoder, by name or to fit a model."""

from __future__ import annotations

import os
from typing import Any

from comfy_api.latest import io

from ..ip_adapter_core.comfyui.host import schema
from ..ip_adapter_core.comfyui.loaders import (
    describe_choice,
    find_files,
    fingerprint_files,
    load_adapter,
    load_encoder,
    load_image_encoder,
)
from ..ip_adapter_core.files import finder
from ..ip_adapter_core.files.finder import ADAPTER_PRESETS
from . import paths, types


class LoadIPAdapter(types.Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="IPA_LoadAdapter",
            display_name="Load IP-Adapter",
            category="model/loaders",
            search_aliases=["ip adapter", "ipadapter", "image prompt model", "load adapter"],
            description=(
                "Reads an IP-Adapter from models/ipadapter. Its kind (base, fine-grained, "
                "full, FaceID, …; SD1.5, SDXL or Flux.1) is recognised from the file's contents."
            ),
            inputs=[
                io.Combo.Input(
                    "adapter_name",
                    options=paths.adapter_names(),
                    tooltip="A .safetensors, .bin or .pt file in models/ipadapter. It must match "
                    "the family of the model (SD1.5, SDXL, Flux.1) and the image encoder.",
                )
            ],
            outputs=[types.output(types.IPAdapter, "adapter", "The adapter: for the Apply nodes.")],
        )

    @classmethod
    def fingerprint_inputs(cls, adapter_name: str | None) -> tuple[str, int, int] | None:
        """Have a file that was trained or downloaded anew read anew; None comes over a link."""
        if adapter_name is None:
            return None
        status = os.stat(paths.adapter_path(adapter_name))
        return adapter_name, status.st_mtime_ns, status.st_size

    @classmethod
    def execute(cls, adapter_name: str) -> io.NodeOutput:
        return io.NodeOutput(load_adapter(paths.adapter_path(adapter_name)))


class AutoLoadIPAdapter(types.Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
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
                "and standard, and face, composition and fine-grained, which look alike inside, "
                "are told apart by the words 'light', 'face' and 'composition' in the name."
            ),
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="Decides for the family (SD1.5, SDXL, Flux.1); only its layers are "
                    "looked at. Connect it straight from the checkpoint: behind a LoRA, every "
                    "change of that would load the files again.",
                ),
                io.Combo.Input(
                    "preset",
                    options=list(ADAPTER_PRESETS),
                    default="standard",
                    tooltip="light: SD1.5 only, follows the picture loosely. standard: its content "
                    "and style. fine-grained: details too (plus). face: a face (plus-face). full "
                    "face: SD1.5 only, a face at its closest (full-face). composition: what is "
                    "where (the composition adapters). bigG: as standard, with ViT-bigG/14, and "
                    "NOOB-IPA-MARK1 for anime SDXL. faceid, faceid-plus, portrait: a face, by "
                    "Encode Face.",
                ),
            ],
            outputs=[
                types.output(
                    types.IPAdapter, "adapter", "The adapter that was found: for the Apply nodes."
                ),
                types.output(
                    io.ClipVision,
                    "clip_vision",
                    "The image encoder that goes with it: for Encode Image Prompt.",
                ),
                types.output(
                    io.String,
                    "chosen",
                    "Which files were taken and why, and what is in doubt, as text.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, preset: str | None = None, **_: Any) -> str:
        """Look again when a file that may be chosen comes, goes or changes.

        The model is not given here, nor a preset over a link.
        """
        return fingerprint_files(preset, paths.adapters(), paths.encoders())

    @classmethod
    def execute(cls, model: Any, preset: str) -> io.NodeOutput:
        choice = find_files(model, preset, paths.adapters(), paths.encoders())
        chosen = describe_choice(choice)
        types.show(cls, chosen)
        adapter = load_adapter(choice.adapter.path)
        encoder = None if choice.encoder is None else load_encoder(choice.encoder)
        return io.NodeOutput(adapter, encoder, chosen)


class LoadImageEncoder(types.Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
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
                    options=paths.encoder_names(),
                    tooltip="A model of OpenCLIP, whole or its vision tower alone. Its "
                    "configuration is inside the file, or beside it: the same name with .json, or "
                    "open_clip_config.json. ViT-H, ViT-g and ViT-bigG need none, except their "
                    "quickgelu variants (DFN, MetaCLIP), which have the same shapes.",
                )
            ],
            outputs=[
                types.output(
                    io.ClipVision, "clip_vision", "The image encoder: for Encode Image Prompt."
                )
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, encoder_name: str | None) -> str | None:
        """Have a changed file or configuration read anew; None comes over a link."""
        if encoder_name is None:
            return None
        return finder.digest([finder.stamps(paths.encoder_path(encoder_name))])

    @classmethod
    def execute(cls, encoder_name: str) -> io.NodeOutput:
        return io.NodeOutput(load_image_encoder(paths.encoder_path(encoder_name)))
