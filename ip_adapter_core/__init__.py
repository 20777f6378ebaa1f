"""IP-Adapter in plain torch; ComfyUI is needed only by the `host` subpackage."""
