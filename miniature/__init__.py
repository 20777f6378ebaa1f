"""The miniature: images made by rule, and models trained on them, beside their weights.

`python -m miniature` builds everything that lies here anew, into output/miniature-SEED: `build.py`
has its parts in order. `assemble.py` lays the shipped files out for ComfyUI.
"""
