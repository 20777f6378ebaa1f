"""Bring requests up to date that were written for earlier versions of ComfyUI_IPAdapter_plus."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...ip_adapter_core.ipadapter_plus.weight_types import ONCE_CALLED, SCALING_OF_FIRST_TYPES

FIRST_ENCODER = "IPAdapterEncoderOfFirstVersion"
_FILES = "ipadapter_file", "preset", "embeds"
_TIMINGS = {"reverse_in_out": "ease_in_out"}


def completed(request: dict[str, Any], served: Mapping[str, type]) -> dict[str, Any]:
    """Return a request to ComfyUI in which nodes of the `served` ids have what they lack.

    Inputs that were added later get their defaults, and values that were once called otherwise
    their names; all else is left as it is.
    """
    prompt = request.get("prompt")
    for node in prompt.values() if isinstance(prompt, dict) else ():
        if isinstance(node, dict) and isinstance(node.get("inputs"), dict):
            _complete(node, served)
    return request


def _complete(node: dict[str, Any], served: Mapping[str, type]) -> None:
    given = node["inputs"]
    if node.get("class_type") == "IPAdapterEncoder" and "image_1" in given:
        if served.get("IPAdapterEncoder") is None:
            return
        node["class_type"] = FIRST_ENCODER
    kind: Any = served.get(str(node.get("class_type")))
    if kind is None:
        return
    for name, (type_, *options) in kind.INPUT_TYPES().get("required", {}).items():
        if name in given:
            given[name] = _renamed(name, given[name], type_)
        elif name in _FILES:  # which one, nobody can guess
            continue
        elif isinstance(type_, list) or (options and "default" in options[0]):
            default = type_[0] if isinstance(type_, list) and type_ else None
            given[name] = options[0].get("default", default) if options else default


def _renamed(name: str, value: Any, choices: Any) -> Any:
    if not isinstance(value, str) or not isinstance(choices, list) or value in choices:
        return value
    if name == "weight_type" and "linear" in choices and value in SCALING_OF_FIRST_TYPES:
        return "linear"
    renamed = {**ONCE_CALLED, **_TIMINGS}.get(value, value)
    return renamed if renamed in choices else value
