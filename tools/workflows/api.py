"""The example workflows as `POST /prompt` takes them, and the public models that they name.

`workflows/api/<name>.json` is the source of everything else that there is of a workflow.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeGuard

from ip_adapter_core.files.published import (
    BASE,
    BASE_SDXL_VIT_H,
    FACE_ID,
    PLUS,
    PLUS_FACE,
    VIT_H,
    VIT_L,
    XLABS,
    Weights,
)
from tools.comfyui.install import ROOT

FOLDER = ROOT / "workflows"
NAMES = sorted(path.stem for path in (FOLDER / "api").glob("*.json"))
DEFECTS = "monochrome, lowres, bad anatomy, worst quality, low quality"
"""The negative text of the authors' own code."""

LOADERS = {
    "CheckpointLoaderSimple": ("checkpoints", "ckpt_name"),
    "CLIPVisionLoader": ("clip_vision", "clip_name"),
    "IPA_LoadAdapter": ("ipadapter", "adapter_name"),
    "ControlNetLoader": ("controlnet", "control_net_name"),
}
"""The folder of `models/` that a class loads from, and its input that names a file there."""

Api = Mapping[str, Mapping[str, Any]]
_HUB = "https://huggingface.co"


def _checkpoint(repository: str, name: str, label: str) -> Weights:
    return Weights(name, f"{_HUB}/{repository}/resolve/main/{name}", "checkpoints", label)


SD15 = _checkpoint(
    "Comfy-Org/stable-diffusion-v1-5-archive", "v1-5-pruned-emaonly-fp16.safetensors", "SD 1.5"
)
DREAMSHAPER = _checkpoint("Lykon/DreamShaper", "DreamShaper_8_pruned.safetensors", "DreamShaper 8")
SDXL = _checkpoint("stabilityai/stable-diffusion-xl-base-1.0", "sd_xl_base_1.0.safetensors", "SDXL")
CANNY = Weights(
    "control_v11p_sd15_canny_fp16.safetensors",
    f"{_HUB}/comfyanonymous/ControlNet-v1-1_fp16_safetensors/resolve/main/"
    "control_v11p_sd15_canny_fp16.safetensors",
    "controlnet",
)
FLUX = Weights(
    "flux1-dev.safetensors",
    f"{_HUB}/Comfy-Org/flux1-dev/resolve/main/flux1-dev.safetensors",
    "diffusion_models",
    "Flux.1 dev",
)
CLIP_L, T5 = (
    Weights(name, f"{_HUB}/comfyanonymous/flux_text_encoders/resolve/main/{name}", "text_encoders")
    for name in ("clip_l.safetensors", "t5xxl_fp16.safetensors")
)
AE = Weights(
    "ae.safetensors",
    f"{_HUB}/Comfy-Org/Lumina_Image_2.0_Repackaged/resolve/main/split_files/vae/ae.safetensors",
    "vae",
)
PUBLIC = {
    weights.name: weights
    for weights in (
        *(SD15, DREAMSHAPER, SDXL, CANNY, FLUX, CLIP_L, T5, AE, VIT_H, VIT_L),
        *(BASE, PLUS, PLUS_FACE, BASE_SDXL_VIT_H, FACE_ID, XLABS),
    )
}


def read(name: str) -> dict[str, Any]:
    """Read a workflow."""
    return dict(json.loads((FOLDER / "api" / f"{name}.json").read_text("utf-8")))


def of_class(api: Api, *classes: str) -> Iterator[dict[str, Any]]:
    """Yield the inputs of every node of these classes."""
    return (node["inputs"] for node in api.values() if node["class_type"] in classes)


def needed(api: Api, class_: str) -> dict[str, Any]:
    """Return the nodes of a class, and all that they need."""
    found = [id_ for id_, node in api.items() if node["class_type"] == class_]
    for id_ in found:
        found += [value[0] for value in api[id_]["inputs"].values() if is_link(value)]
    return {id_: dict(api[id_]) for id_ in found}


def missing(api: Api, models: Path) -> list[str]:
    """Return the files that the workflow loads and that `models` lacks, relative to it."""
    named = [
        Path(folder, inputs[key])
        for loader, (folder, key) in LOADERS.items()
        for inputs in of_class(api, loader)
    ]
    return [str(path) for path in named if not (models / path).is_file()]


def is_link(value: Any) -> TypeGuard[list[Any]]:
    """Return whether an input's value is another node's output, `[node, number]`."""
    return isinstance(value, list)


def fed_by(api: Api, id_: str) -> Iterator[str]:
    """Yield the ids of the nodes that a node's outputs go to."""
    for other, node in api.items():
        if any(is_link(value) and value[0] == id_ for value in node["inputs"].values()):
            yield other


def smaller(api: Api, steps: int, side: int) -> dict[str, Any]:
    """Return a copy with `steps` steps, every size scaled until the shortest is `side` pixels."""
    made = copy.deepcopy(dict(api))
    inputs_of = [node["inputs"] for node in made.values()]
    sized = [inputs for inputs in inputs_of if isinstance(inputs.get("height"), int)]
    shortest = min(min(inputs["width"], inputs["height"]) for inputs in sized)
    for inputs in sized:
        for name in ("width", "height"):
            inputs[name] = inputs[name] * side // shortest
    for inputs in inputs_of:
        if "steps" in inputs:
            inputs["steps"] = steps
    return made
