"""What a user drags: the schema of each node and one call into the core."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io
from typing_extensions import override

from .apply import ApplyIPAdapter, ApplyIPAdapterConditioning, ApplyIPAdapterRegions
from .attention_map import AttentionMap, RecordAttention
from .encode import EncodeImagePrompt, NegativeNoise, PrepareImage
from .grid import DrawGrid, GridValues
from .image_prompts import CombineImagePrompts, LoadImagePrompt, SaveImagePrompt
from .loaders import AutoLoadIPAdapter, LoadImageEncoder, LoadIPAdapter
from .weights import LatentWeights, LayerWeights


class IPAdapterExtension(ComfyExtension):
    @override
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [
            LoadIPAdapter,
            AutoLoadIPAdapter,
            LoadImageEncoder,
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
