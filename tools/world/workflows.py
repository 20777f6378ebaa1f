"""The example workflows on the miniature: the same graphs, other files, sizes and words."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from tools.workflows.parts import DEFECTS
from tools.workflows.public import DREAMSHAPER, PUBLIC
from tools.workflows.smaller import smaller

SIDE, STEPS, GUIDANCE = 64, 20, 4.0
CHECKPOINT, ENCODER = "miniature.safetensors", "miniature.safetensors"
SECOND, CONTROL = "miniature-outlined.safetensors", "miniature-edges.safetensors"
ADAPTERS = {"base": "miniature.safetensors", "fine-grained": "miniature-plus.safetensors"}
Api = dict[str, Any]

_PLUS = {weights.name for weights in PUBLIC.values() if "-plus" in weights.name}


def on_miniature(
    api: Mapping[str, Any],
    text: str,
    adapter: str | None = None,
    steps: int = STEPS,
    guidance: float = GUIDANCE,
) -> Api:
    """A copy that runs on the miniature's models at their size. `text` stands in for every positive
    text but the empty one; negative texts become empty: the miniature knows shapes, not flaws.
    `adapter`: "base" or "fine-grained", by default whichever kind the workflow names.
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


def given(api: Mapping[str, Any], **values: Mapping[str, Any]) -> Api:
    """A copy with these inputs in every node of a class: `given(api, KSampler={"seed": 1})`."""
    made = copy.deepcopy(dict(api))
    for node in made.values():
        node["inputs"].update(values.get(node["class_type"], {}))
    return made
