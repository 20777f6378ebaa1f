"""What a user drags: the schema of each node and one call into the core."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io
from typing_extensions import override

from .apply import ApplyIPAdapter, ApplyIPAdapterConditioning
from .combine import CombineImagePrompts
from .encode import EncodeImagePrompt
from .image_encoder import LoadImageEncoder
from .load import LoadIPAdapter
from .noise import NegativeNoise
from .prepare import PrepareImage
from .prompt_files import LoadImagePrompt, SaveImagePrompt


class IPAdapterExtension(ComfyExtension):
    @override
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [
            LoadIPAdapter,
            EncodeImagePrompt,
            ApplyIPAdapter,
            ApplyIPAdapterConditioning,
            LoadImageEncoder,
            PrepareImage,
            NegativeNoise,
            CombineImagePrompts,
            SaveImagePrompt,
            LoadImagePrompt,
        ]
