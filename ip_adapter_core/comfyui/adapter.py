"""IP_ADAPTER: the adapter under the host's memory management."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import comfy.model_management as memory
import comfy.model_patcher
import comfy.ops
import torch
from torch import Tensor

from .. import packing
from ..adapter import AdapterSpec, IPAdapter
from ..files import adapter_file as checkpoint
from ..files.header import file_format, read_header
from ..image_prompt import ImagePrompt


@dataclass(frozen=True)
class HostAdapter:
    """An `IPAdapter`, where it came from, and the patcher that moves it between devices.

    `trained_with`: the image encoder's name, where this repository's training noted it.
    """

    name: str
    module: IPAdapter
    patcher: comfy.model_patcher.ModelPatcher
    trained_with: str | None = None

    @property
    def spec(self) -> AdapterSpec:
        return self.module.spec

    @contextmanager
    def loaded(self) -> Iterator[None]:
        """The adapter is on the compute device within, and only there."""
        memory.load_models_gpu([self.patcher])
        try:
            yield
        finally:
            memory.unload_model_and_clones(self.patcher)

    def compile(
        self, image_prompt: ImagePrompt, weights: Sequence[float], combine: str
    ) -> tuple[Tensor, Tensor]:
        """Packed K'/V' of the image and of its negative, `(R, T, 2·Σ widths)`, float32 on the CPU.

        `weights`: λ of each layer. The adapter must be `loaded`. Raises ValueError for what
        `packing.tokens` refuses.
        """
        device = self.patcher.load_device
        sides = packing.tokens(self.module, image_prompt.to(device, torch.float32), combine)
        positive, negative = (
            packing.fold(self.module.keys_values(tokens), weights).cpu() for tokens in sides
        )
        return positive, negative


def load_adapter(path: str | os.PathLike[str]) -> HostAdapter:
    """Read a checkpoint for use in the host. Raises CheckpointError."""
    module = checkpoint.load(path, operations=comfy.ops.manual_cast)
    module.requires_grad_(False)
    patcher = comfy.model_patcher.CoreModelPatcher(
        module, load_device=memory.get_torch_device(), offload_device=torch.device("cpu")
    )
    trained_with = None
    if file_format(path) == "safetensors":
        trained_with = checkpoint.trained_with(read_header(path)[1])
    return HostAdapter(os.path.basename(path), module, patcher, trained_with)
