"""What the IPADAPTER socket carries: mappings, the packs' own and others'."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from ...ip_adapter_core.comfyui.loaders import ManagedAdapter, adapter_of

_UNNAMED = "IPADAPTER"


class Models(NamedTuple):
    """An adapter, and the encoders of images and faces that came with it, if they did."""

    adapter: ManagedAdapter
    clip_vision: Any
    insightface: Any = None


def models(ipadapter: Any, clip_vision: Any = None) -> Models:
    """Return what a socket holds; a `clip_vision` of one's own goes before the loader's.

    Raises ValueError for what is no adapter.
    """
    if isinstance(ipadapter, ManagedAdapter):
        return Models(ipadapter, clip_vision)
    if not isinstance(ipadapter, Mapping):
        raise ValueError(
            f"ipadapter is a {type(ipadapter).__name__}; expected the output of an IPAdapter Model "
            "Loader or an IPAdapter Unified Loader."
        )
    name: str
    inner: Any
    name, inner = _UNNAMED, ipadapter
    if "ipadapter" in ipadapter:
        entry = ipadapter["ipadapter"] or {}
        inner, file = entry.get("model"), entry.get("file")
        name = str(file or name).replace("\\", "/").rsplit("/", 1)[-1]
        if clip_vision is None:
            clip_vision = (ipadapter.get("clipvision") or {}).get("model")
    if not isinstance(inner, Mapping) or not inner.get("image_proj"):
        raise ValueError(
            "No IP-Adapter came in at 'ipadapter'. Connect an IPAdapter Model Loader or an "
            "IPAdapter Unified Loader."
        )
    if name == _UNNAMED and any("perceiver_resampler" in key for key in inner["image_proj"]):
        # Without a file's name the key of the pack that made it tells the versions apart.
        name = f"{name} (FaceID-Plus{'V2' if inner.get('faceidplusv2') else ''})"
    faces = (ipadapter.get("insightface") or {}).get("model")
    return Models(adapter_of(inner, name), clip_vision, faces)
