"""IP-Adapter in plain torch; ComfyUI is needed only by its subpackage `comfyui`."""
