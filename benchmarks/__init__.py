"""Measurements of this pack in ComfyUI, on random weights of SD1.5's full size."""
