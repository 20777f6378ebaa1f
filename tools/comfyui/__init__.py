"""A ComfyUI to run: found or installed, as a server, a client of it, its editor in a browser."""
