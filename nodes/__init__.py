"""What a user drags: the schema of each node and one call into the core."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io
from typing_extensions import override

from .apply import ApplyIPAdapter, ApplyIPAdapterConditioning
from .attention_map import AttentionMap, RecordAttention
from .auto_load import AutoLoadIPAdapter
from .combine import CombineImagePrompts
from .encode import EncodeImagePrompt
from .grid import DrawGrid, GridValues
from .image_encoder import LoadImageEncoder
from .layer_weights import LatentWeights, LayerWeights
from .load import LoadIPAdapter
from .noise import NegativeNoise
from .prepare import PrepareImage
from .prompt_files import LoadImagePrompt, SaveImagePrompt
from .regions import ApplyIPAdapterRegions


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
