"""Everything that knows ComfyUI. The only place that imports `comfy`."""
