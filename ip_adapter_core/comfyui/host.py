"""What ComfyUI since 0.9.0 (January 2026) calls otherwise, or lacks.

Where a host changes, its change goes here, with the version that brought it.
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import comfy.model_management as memory
import comfy.model_patcher as patchers
import torch
from comfy.clip_model import CLIPVisionModelProjection
from comfy.clip_vision import ClipVisionModel
from comfy.ldm.flux.layers import DoubleStreamBlock
from comfy_api.latest import io

try:
    from comfy_api.input import CurveInput as CurveInput
except ImportError:

    class CurveInput:  # type: ignore[no-redef]
        """Refuses curves: before 0.19 there is no Curve Editor."""

        @staticmethod
        def from_raw(given: Any) -> CurveInput:
            found = "This ComfyUI is older than 0.19.0 and knows no curves"
            raise RuntimeError(f"{found}. Update it, or take weight_curve out.")


FLUX_HOOKS = "attn1_patch" in DoubleStreamBlock.forward.__code__.co_consts
"""Whether the blocks of a Flux call attention's patches (0.17)."""
CoreModelPatcher = getattr(patchers, "CoreModelPatcher", patchers.ModelPatcher)  # 0.12
if "_load_from_state_dict" not in vars(CLIPVisionModelProjection):

    def _without_noise(self: Any, state: Any, prefix: str, *rest: Any) -> None:
        # Before 0.32 an encoder's file without projection got one of what lay in memory.
        if f"{prefix}visual_projection.weight" not in state:
            self.visual_projection = torch.nn.Identity()
        torch.nn.Module._load_from_state_dict(self, state, prefix, *rest)

    CLIPVisionModelProjection._load_from_state_dict = _without_noise


def unload(patcher: Any) -> None:
    """Take one model and its clones from the device."""
    if hasattr(memory, "unload_model_and_clones"):  # 0.23
        memory.unload_model_and_clones(patcher)
        return
    loaded = memory.current_loaded_models
    others = [x for x in loaded if x.model is None or not x.model.is_clone(patcher)]
    memory.free_memory(1e30, patcher.load_device, others)


def clip_vision_model(config: dict[str, Any]) -> ClipVisionModel:
    """Build ComfyUI's CLIP vision model of these sizes, without weights."""
    try:
        return ClipVisionModel(config)  # 0.23
    except TypeError:
        with TemporaryDirectory() as folder:
            path = Path(folder, "config.json")
            path.write_text(json.dumps(config), "utf-8")
            return ClipVisionModel(str(path))


def is_within(folder: str, target: str) -> bool:
    """Tell whether a path lies in a folder once its links are followed (0.28 has its own)."""
    try:
        inside = os.path.commonpath([*map(os.path.realpath, (folder, target))])
        return inside == os.path.realpath(folder)
    except ValueError:  # a null byte, or another drive
        return False


def schema(**settings: Any) -> io.Schema:
    """Return a node's schema without what the host does not know (0.11: search aliases)."""
    known = {field.name for field in dataclasses.fields(io.Schema)}
    return io.Schema(**{name: value for name, value in settings.items() if name in known})
