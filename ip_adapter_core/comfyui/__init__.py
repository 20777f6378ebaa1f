"""Everything of the core that knows ComfyUI: the only place there that imports `comfy`."""
