"""Regional prompts: what the texts of the positive and of the negative conditioning are set to."""

from __future__ import annotations

import torch

SIZE = 16


def masked(left: bool, **options):
    mask = torch.zeros(1, SIZE, SIZE)
    mask[..., : SIZE // 2] = 1
    return {"mask": mask if left else 1 - mask, "mask_strength": 0.8, **options}


def area(height, width, top, left, strength=1.0):
    return {"area": (height, width, top, left), "strength": strength}


LAYOUTS = {
    "masks": ([masked(True), masked(False)], [{}]),
    "masks bounding areas": (
        [masked(True, set_area_to_bounds=True), masked(False, set_area_to_bounds=True)],
        [{}],
    ),
    "area over all": ([{}, area(8, 8, 8, 0, 2.0)], [{}]),
    "equal areas": ([area(16, 8, 0, 0), area(16, 8, 0, 8)], [{}]),
    "negative area": ([{}, {}], [area(8, 16, 8, 0), {}]),
    "default": ([masked(True), {"default": True}], [{}, {"default": True}]),
    "default beside area": ([area(16, 8, 0, 0), {"default": True}], [{}]),
}


def texts(small, layout: str):
    """Positive and negative conditioning, with an entry of its own text for each region."""
    sides, seed = [], 0
    for options in LAYOUTS[layout]:
        sides.append([small.text(seed + i, **o)[0] for i, o in enumerate(options)])
        seed += len(options)
    return sides


def image_mask() -> torch.Tensor:
    """Smooth, and different everywhere: whatever is shifted or mirrored shows."""
    coarse = torch.rand(1, 1, 5, 5, generator=torch.Generator().manual_seed(3))
    return torch.nn.functional.interpolate(coarse, (40, 24), mode="bilinear")[0]
