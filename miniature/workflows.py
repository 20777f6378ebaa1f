"""The example workflows on the miniature: the same graphs, other files, sizes and words."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from tools.workflows.api import DEFECTS, DREAMSHAPER, PUBLIC, SDXL, of_class, smaller

SIDE, STEPS, GUIDANCE = 64, 20, 4.0  # steps: a divisor of 1,000, else ddim_uniform adds one
CHECKPOINT, ENCODER = "miniature.safetensors", "miniature.safetensors"
SECOND, CONTROL = "miniature-outlined.safetensors", "miniature-edges.safetensors"
ADAPTERS = {"base": "miniature.safetensors", "fine-grained": "miniature-plus.safetensors"}
Api = dict[str, Any]

_PLUS = {weights.name for weights in PUBLIC.values() if "-plus" in weights.name}


def runs(api: Mapping[str, Any]) -> bool:
    """Return whether the miniature is what a workflow is of: one family, no faces, no Flux."""
    names = [loader["ckpt_name"] for loader in of_class(api, "CheckpointLoaderSimple")]
    return names not in ([], [SDXL.name]) and not any(of_class(api, "IPA_EncodeFace"))


def on_miniature(
    api: Mapping[str, Any],
    text: str,
    adapter: str | None = None,
    steps: int = STEPS,
    guidance: float = GUIDANCE,
) -> Api:
    """Return a copy that runs on the miniature's models at their size.

    `text` stands in for every positive text but the empty one; negative texts become empty: the
    miniature knows shapes, not flaws. `adapter`: "base" or "fine-grained" (plus), by default
    whichever kind the workflow names.
    """
    made = smaller(api, steps, SIDE)
    for node in made.values():
        inputs = node["inputs"]
        match node["class_type"]:
            case "CheckpointLoaderSimple":
                other = inputs["ckpt_name"] == DREAMSHAPER.name
                inputs["ckpt_name"] = SECOND if other else CHECKPOINT
            case "ControlNetLoader":
                inputs["control_net_name"] = CONTROL
            case "CLIPVisionLoader":
                node["class_type"] = "IPA_LoadImageEncoder"
                node["inputs"] = {"encoder_name": ENCODER}
            case "IPA_LoadAdapter":
                named = "fine-grained" if inputs["adapter_name"] in _PLUS else "base"
                inputs["adapter_name"] = ADAPTERS[adapter or named]
            case "CLIPTextEncode":
                inputs["text"] = "" if inputs["text"] in ("", DEFECTS) else text
            case "KSampler":
                inputs["cfg"] = guidance
    return made


def in_editor(workflow: Mapping[str, Any], text: str) -> dict[str, Any]:
    """Return a copy of an editor's workflow that runs as `on_miniature` makes it run by API."""
    made = copy.deepcopy(dict(workflow))
    sides = {"EmptyLatentImage": slice(0, 2), "ImageScale": slice(1, 3)}  # of the widgets
    shortest = min(
        min(node["widgets_values"][sides[node["type"]]])
        for node in made["nodes"]
        if node["type"] in sides
    )
    for node in made["nodes"]:
        values: list[Any] = node.get("widgets_values") or []
        match node["type"]:
            case "CheckpointLoaderSimple":
                values[0] = SECOND if values[0] == DREAMSHAPER.name else CHECKPOINT
            case "ControlNetLoader":
                values[0] = CONTROL
            case "CLIPVisionLoader":
                node["type"] = "IPA_LoadImageEncoder"
                node["properties"] = {"Node name for S&R": node["type"]}
                node["inputs"] = []
                values[0] = ENCODER
            case "IPA_LoadAdapter":
                values[0] = ADAPTERS["fine-grained" if values[0] in _PLUS else "base"]
            case "CLIPTextEncode":
                values[0] = "" if values[0] in ("", DEFECTS) else text
            case "EmptyLatentImage" | "ImageScale":
                at = sides[node["type"]]
                values[at] = [side * SIDE // shortest for side in values[at]]
            case "KSampler":
                values[2:4] = [STEPS, GUIDANCE]
        node.get("properties", {}).pop("models", None)  # nothing is offered for download
    return made


def given(api: Mapping[str, Any], **values: Mapping[str, Any]) -> Api:
    """Return a copy with these inputs in all nodes of a class: `given(api, KSampler={…})`."""
    made = copy.deepcopy(dict(api))
    for node in made.values():
        node["inputs"].update(values.get(node["class_type"], {}))
    return made
