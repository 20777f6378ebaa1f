"""IPA_RecordAttention and IPA_AttentionMap."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io, ui
from torch import Tensor

from ..ip_adapter_core.attention_map import blocks_of, check_images, overlay, resize_maps
from ..ip_adapter_core.comfyui.host import schema
from ..ip_adapter_core.comfyui.record import AttentionRecorder, recording
from . import types


class RecordAttention(types.Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="IPA_RecordAttention",
            display_name="Record Image Attention",
            category="model/conditioning",
            search_aliases=["ip adapter attention", "attention map", "heat map"],
            description=(
                "Watches where image prompts act while a picture is sampled, for 'Image Attention "
                "Map'. The picture stays the same to the bit. Goes between the last 'Apply "
                "IP-Adapter' and the sampler."
            ),
            inputs=[io.Model.Input("model", tooltip=types.PATCHED)],
            outputs=[
                types.output(io.Model, "model", "The model that is watched: for the sampler."),
                types.output(
                    types.AttentionRecord, "record", "What was seen: for Image Attention Map."
                ),
            ],
            not_idempotent=True,  # two of these on one model must not share a record
        )

    @classmethod
    def execute(cls, model: Any) -> io.NodeOutput:
        return io.NodeOutput(*recording(model))


class AttentionMap(types.Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="IPA_AttentionMap",
            display_name="Image Attention Map",
            category="model/conditioning",
            search_aliases=["ip adapter attention", "heat map", "where the image acts"],
            description=(
                "Where the image prompt acted, as a heat map over the finished picture: its share "
                "in the output of the cross-attention layers."
            ),
            inputs=[
                types.AttentionRecord.Input(
                    "record", tooltip="The output of Record Image Attention."
                ),
                io.Latent.Input(
                    "samples",
                    tooltip="The latents that the sampler made with the recorded model: they say "
                    "which sampling run the map is of.",
                ),
                io.Image.Input("image", tooltip="The picture decoded from these latents."),
                io.String.Input(
                    "blocks",
                    default="all",
                    tooltip="Which blocks of the UNet: all, input, middle, output, or single ones, "
                    "'input 8, output 1'.",
                ),
                types.fraction(
                    "start_at",
                    0.0,
                    "The first step to look at, as a fraction of the schedule.",
                ),
                types.fraction(
                    "end_at",
                    1.0,
                    "The last step to look at, as a fraction of the schedule.",
                ),
                io.Int.Input(
                    "prompt_number",
                    default=0,
                    min=0,
                    max=64,
                    tooltip="Which image prompt to show, if several are applied: 1 for the first "
                    "applied; 0 for all together.",
                ),
                types.fraction(
                    "opacity",
                    0.6,
                    "Opacity of the heat map over the picture; 1 shows the map alone.",
                    step=0.05,
                ),
            ],
            outputs=[
                types.output(io.Image, "overlay", "The map as colours over the picture."),
                types.output(
                    io.Mask, "heat_map", "The shares themselves, from 0 to 1: one mask per picture."
                ),
            ],
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls,
        record: AttentionRecorder,
        samples: dict[str, Any],
        image: Tensor,
        blocks: str,
        start_at: float,
        end_at: float,
        prompt_number: int,
        opacity: float,
    ) -> io.NodeOutput:
        run = record.of(samples["samples"])
        maps = run.heat(blocks_of(blocks), start_at, end_at, prompt_number)
        check_images(image, maps)
        maps = resize_maps(maps, *image.shape[1:3])
        shown = overlay(image, maps, opacity)
        return io.NodeOutput(shown, maps, ui=ui.PreviewImage(shown, cls=cls))
