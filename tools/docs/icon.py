"""Draw docs/icon.png, the pack's icon in the registry: an image, and one that follows it.

python -m tools.docs.icon
"""

from __future__ import annotations

from dataclasses import replace

import torch
from PIL import Image, ImageDraw, ImageFilter

from miniature.scenes import BACKGROUNDS, COLORS, SHAPES, TEXTURES, render, scenes, to_pil
from tools.comfyui.install import ROOT

SIDE, TILE = 400, 232  # the registry takes squares of at most 400 pixels
GROUND, INK = "#1e2127", "#f2f2f2"


def _tile(shape: str) -> Image.Image:
    """Draw a scene of the miniature's that differs in its shape alone, in a frame."""
    numbers = {"colour": [*COLORS].index("orange"), "texture": TEXTURES.index("plain")}
    numbers |= {"background": [*BACKGROUNDS].index("sky"), "shape": SHAPES.index(shape)}
    row = replace(scenes(0, 1), **{name: torch.tensor([n]) for name, n in numbers.items()})
    still = {name: torch.zeros(1) for name in ("x", "y", "angle")}
    row = replace(row, **still, size=torch.tensor([0.82]), light=torch.ones(1))
    tile = Image.new("RGBA", (TILE + 12, TILE + 12), (0, 0, 0, 0))
    ImageDraw.Draw(tile).rounded_rectangle((0, 0, TILE + 11, TILE + 11), 28, fill=INK)
    mask = Image.new("L", (TILE, TILE))
    ImageDraw.Draw(mask).rounded_rectangle((0, 0, TILE - 1, TILE - 1), 24, fill=255)
    tile.paste(to_pil(render(row, TILE)[0]), (6, 6), mask)
    return tile


def draw() -> Image.Image:
    icon = Image.new("RGBA", (SIDE, SIDE), (0, 0, 0, 0))
    ImageDraw.Draw(icon).rounded_rectangle((0, 0, SIDE - 1, SIDE - 1), 64, fill=GROUND)
    for shape, place in (("star", (30, 30)), ("ring", (SIDE - TILE - 42, SIDE - TILE - 42))):
        tile = _tile(shape)
        shadow = Image.new("RGBA", icon.size, (0, 0, 0, 0))
        shadow.paste((0, 0, 0, 150), (place[0] + 4, place[1] + 8), tile.getchannel("A"))
        icon.alpha_composite(shadow.filter(ImageFilter.GaussianBlur(8)))
        icon.alpha_composite(tile, place)
    return icon


if __name__ == "__main__":
    target = ROOT / "docs" / "icon.png"
    draw().save(target, optimize=True)
    print(target.relative_to(ROOT))
