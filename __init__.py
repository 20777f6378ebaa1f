"""IP-Adapter for ComfyUI: a picture as a prompt (arXiv 2308.06721)."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from comfy_api.latest import ComfyExtension


async def comfy_entrypoint() -> ComfyExtension:
    """Called by ComfyUI once; nothing is imported before."""
    from .nodes import IPAdapterExtension

    return IPAdapterExtension()
