"""What ComfyUI since 0.9.0 (January 2026) calls otherwise, or lacks.

The one place that stands between the pack and its host: where a host changes, its change goes here,
with the version that brought it.
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import comfy.clip_vision
import comfy.model_management as memory
import comfy.model_patcher
from comfy.clip_model import CLIPVisionModelProjection
from comfy.clip_vision import ClipVisionModel
from comfy_api.latest import io

try:
    from comfy_api.input import CurveInput as CurveInput
except ImportError:

    class CurveInput:  # type: ignore[no-redef]
        """Refuses curves: before 0.19 there is no Curve Editor, and nothing to draw one with."""

        @staticmethod
        def from_raw(given: Any) -> CurveInput:
            raise RuntimeError(
                "This ComfyUI is older than 0.19.0 and knows no curves. Update it, or take "
                "weight_curve out."
            )


# 0.12
CoreModelPatcher = getattr(
    comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcher
)
LEAVES_PROJECTION_OUT = "_load_from_state_dict" in vars(CLIPVisionModelProjection)
"""Whether an encoder's file without projection makes a model without one. Before 0.32 the
projection was whatever lay in memory."""


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
        folder, target = os.path.realpath(folder), os.path.realpath(target)
        return os.path.commonpath((folder, target)) == folder
    except ValueError:  # a null byte, or another drive
        return False


def schema(**settings: Any) -> io.Schema:
    """Return a node's schema without what the host does not know (0.11: search aliases)."""
    known = {field.name for field in dataclasses.fields(io.Schema)}
    return io.Schema(**{name: value for name, value in settings.items() if name in known})
