"""Where the nodes of a workflow stand: steps side by side, their nodes one below the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

Box = tuple[int, int, int, int]
"""x, y, width, height in the editor's units; y is below the title bar."""

STEPS = (
    "Models",
    "Pictures",
    "Text",
    "Image prompt",
    "Structure",
    "Regions",
    "Start picture",
    "Sampling",
    "Result",
)
STEP_OF = {
    "CheckpointLoaderSimple": "Models",
    "CLIPVisionLoader": "Models",
    "IPA_LoadAdapter": "Models",
    "IPA_AutoLoad": "Models",
    "ControlNetLoader": "Models",
    "LoadImage": "Pictures",
    "LoadImageMask": "Pictures",
    "InvertMask": "Pictures",
    "BatchImagesNode": "Pictures",
    "CLIPTextEncode": "Text",
    "IPA_EncodeImage": "Image prompt",
    "IPA_Apply": "Image prompt",
    "IPA_ApplyConditioning": "Image prompt",
    "IPA_ApplyRegions": "Image prompt",
    "IPA_LayerWeights": "Image prompt",
    "IPA_LatentWeights": "Image prompt",
    "IPA_CombinePrompts": "Image prompt",
    "IPA_PrepareImage": "Image prompt",
    "IPA_NegativeNoise": "Image prompt",
    "IPA_SavePrompt": "Image prompt",
    "IPA_LoadPrompt": "Image prompt",
    "IPA_GridValues": "Image prompt",
    "IPA_RecordAttention": "Image prompt",
    "CurveEditor": "Image prompt",
    "ConditioningSetAreaPercentage": "Regions",
    "ConditioningCombine": "Regions",
    "Canny": "Structure",
    "ControlNetApplyAdvanced": "Structure",
    "ImageToMask": "Start picture",
    "VAEEncode": "Start picture",
    "SetLatentNoiseMask": "Start picture",
    "EmptyLatentImage": "Sampling",
    "KSampler": "Sampling",
    "VAEDecode": "Sampling",
    "ImageCompositeMasked": "Result",
    "IPA_AttentionMap": "Result",
    "IPA_DrawGrid": "Result",
    "SaveImage": "Result",
}
LEAST = {
    "LoadImage": (300, 330),
    "LoadImageMask": (300, 340),
    "CLIPTextEncode": (380, 140),
    "CurveEditor": (300, 340),
    "IPA_LayerWeights": (340, 420),
    "IPA_LatentWeights": (300, 180),
    "IPA_PrepareImage": (300, 460),
    "IPA_AttentionMap": (460, 620),
    "IPA_DrawGrid": (460, 520),
    "SaveImage": (460, 520),
}
"""Room for pictures and text, which slots and widgets alone would not give."""

TITLE = 30
GAP = 44
MARGIN = 20
HEADING = 50


@dataclass(frozen=True)
class Step:
    """A titled frame around the nodes of one step."""

    title: str
    box: Box


def size_of(type_: str, sockets: int, widgets: int, step: str) -> tuple[int, int]:
    """Width and height as the editor would make them, or more."""
    height = 22 * sockets + 26 * widgets + 24
    width = 420 if step == "Models" else 300
    least_width, least_height = LEAST.get(type_, (0, 0))
    return max(width, least_width), max(height, least_height)


def place(
    steps: Sequence[str], sizes: Sequence[tuple[int, int]]
) -> tuple[list[tuple[int, int]], list[Step]]:
    """Positions of the nodes, given each one's step and size, and the steps' frames."""
    positions = [(0, 0)] * len(sizes)
    frames: list[Step] = []
    left = 0
    for step in STEPS:
        members = [index for index, own in enumerate(steps) if own == step]
        if not members:
            continue
        width = max(sizes[index][0] for index in members)
        y = HEADING + TITLE
        for index in members:
            positions[index] = (left + MARGIN, y)
            y += sizes[index][1] + TITLE + GAP
        bottom = y - TITLE - GAP + MARGIN
        frames.append(Step(step, (left, 0, width + 2 * MARGIN, bottom)))
        left += width + 2 * MARGIN + GAP
    return positions, frames
