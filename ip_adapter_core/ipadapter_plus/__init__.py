"""What the nodes of ComfyUI_IPAdapter_plus compute, in this pack's terms (nodes/ipadapter_plus)."""
