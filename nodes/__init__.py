"""What a user drags: the schema of each node and one call into the core."""

from __future__ import annotations

import logging
from pathlib import Path

from comfy_api.latest import ComfyExtension, io
from typing_extensions import override

from .apply import ApplyIPAdapter, ApplyIPAdapterConditioning, ApplyIPAdapterRegions
from .attention_map import AttentionMap, RecordAttention
from .encode import EncodeImagePrompt, NegativeNoise, PrepareImage
from .faces import EncodeFace, LoadFaceEncoder
from .grid import DrawGrid, GridValues
from .image_prompts import CombineImagePrompts, LoadImagePrompt, SaveImagePrompt
from .loaders import AutoLoadIPAdapter, LoadImageEncoder, LoadIPAdapter
from .weights import LatentWeights, LayerWeights

logger = logging.getLogger("comfyui_ip_adapter")


class IPAdapterExtension(ComfyExtension):
    @override
    async def on_load(self) -> None:
        """Serve the ids of ComfyUI_IPAdapter_plus too; whatever goes wrong, the nodes stay."""
        try:
            from .ipadapter_plus import serve

            serve(f"custom_nodes.{Path(__file__).parents[1].name}")
        except Exception:
            logger.exception("The node ids of ComfyUI_IPAdapter_plus cannot be served.")

    @override
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [
            LoadIPAdapter,
            AutoLoadIPAdapter,
            LoadImageEncoder,
            LoadFaceEncoder,
            EncodeFace,
            PrepareImage,
            NegativeNoise,
            EncodeImagePrompt,
            CombineImagePrompts,
            SaveImagePrompt,
            LoadImagePrompt,
            ApplyIPAdapter,
            ApplyIPAdapterConditioning,
            ApplyIPAdapterRegions,
            LayerWeights,
            LatentWeights,
            RecordAttention,
            AttentionMap,
            GridValues,
            DrawGrid,
        ]
