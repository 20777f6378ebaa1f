"""IP-Adapter for ComfyUI: a picture as a prompt (arXiv 2308.06721)."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from comfy_api.latest import ComfyExtension

# ComfyUI serves this folder under /extensions/; its help panel reads the nodes' pages in docs/.
WEB_DIRECTORY = "./web"


async def comfy_entrypoint() -> ComfyExtension:
    """Give ComfyUI the nodes; it calls this once, and nothing is imported before."""
    from .nodes import IPAdapterExtension

    return IPAdapterExtension()
