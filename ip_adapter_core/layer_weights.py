"""Layer weights as named data: on which cross-attention layers an image acts, and how much.

Blocks are named as ComfyUI names them: ("input" | "output" | "middle", number). Which of them carry
style and which composition was found for SDXL by InstantStyle (arXiv 2404.02733: up_blocks.0.
attentions.1 and down_blocks.2.attentions.1 in diffusers' names); for SD1.5 it is what users of
ComfyUI_IPAdapter_plus settled on.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from .latent_weights import LIMITS, NUMBER, plain

Block: TypeAlias = tuple[str, int]
Layer: TypeAlias = tuple[str, int, int]
"""A block and the index of the transformer in it."""

_SIDES = ("input", "middle", "output")  # as a UNet runs through them
_FAMILIES = ("SD1.5", "SDXL")
_WEAK, _LEAST = 0.2, 0.05


def _blocks(inputs: Sequence[int], outputs: Sequence[int]) -> frozenset[Block]:
    sides = [("input", number) for number in inputs] + [("output", number) for number in outputs]
    return frozenset([*sides, ("middle", 0)])


LAYOUTS: dict[str, frozenset[Block]] = {
    "SD1.5": _blocks((1, 2, 4, 5, 7, 8), range(3, 12)),
    "SDXL": _blocks((4, 5, 7, 8), range(6)),
    "the miniature": frozenset({("input", 1), ("output", 0), ("output", 1)}),
}
"""Which blocks of a family have cross-attention. The miniature is this repository's own (see
miniature/README.md): there its last layer carries colour and texture, whatever the seed."""

STYLE: dict[str, dict[Block, float]] = {
    "SD1.5": {
        **{("input", number): 1.0 for number in (1, 2, 4, 5)},
        **{("output", number): 1.0 for number in range(5, 12)},
    },
    "SDXL": {("output", 1): 1.0},
    "the miniature": {("output", 1): 1.0},
}
COMPOSITION: dict[str, dict[Block, float]] = {
    "SD1.5": {("input", 7): 0.25, ("input", 8): 1.0},
    "SDXL": {("input", 8): 1.0},
    "the miniature": {("output", 0): 1.0},
}


@dataclass(frozen=True)
class Preset:
    """`blocks`: weights by layout, for the layouts that it knows. `sides`: by side, for any. Both
    empty: `ramp` over the depth, from first to last block and back. `rest`: of all others."""

    about: str
    blocks: Mapping[str, Mapping[Block, float]] = field(default_factory=dict)
    sides: Mapping[str, float] = field(default_factory=dict)
    rest: float = 1.0
    ramp: tuple[float, float, float] = (1.0, 1.0, 1.0)


def _times(table: dict[str, dict[Block, float]], factor: float) -> dict[str, dict[Block, float]]:
    return {
        name: {block: factor * weight for block, weight in blocks.items()}
        for name, blocks in table.items()
    }


def _both(
    one: dict[str, dict[Block, float]], other: dict[str, dict[Block, float]]
) -> dict[str, dict[Block, float]]:
    return {name: {**one[name], **other[name]} for name in one}


PRESETS: dict[str, Preset] = {
    "uniform": Preset("Every layer alike."),
    "style": Preset("Colours, texture and way of drawing; not what is where.", STYLE, rest=0.0),
    "strong style": Preset("Everything but the composition.", _times(COMPOSITION, 0.0)),
    "composition": Preset("What is where; not how it looks.", COMPOSITION, rest=0.0),
    "style and composition": Preset("Both, and no more.", _both(STYLE, COMPOSITION), rest=0.0),
    "style without composition": Preset(
        "The style, and away from the composition.",
        _both(STYLE, _times(COMPOSITION, -1.0)),
        rest=0.0,
    ),
    "ease in": Preset("Strong where the UNet begins, fading.", ramp=(1.0, 0.525, _LEAST)),
    "ease out": Preset("Weak where the UNet begins, growing.", ramp=(_LEAST, 0.525, 1.0)),
    "ease in-out": Preset("Strongest in the middle.", ramp=(_LEAST, 1.0, _LEAST)),
    "reverse in-out": Preset("Weakest in the middle.", ramp=(1.0, _LEAST, 1.0)),
    "weak input": Preset("0.2 in the input (down) blocks.", sides={"input": _WEAK}),
    "weak middle": Preset("0.2 in the middle block.", sides={"middle": _WEAK}),
    "weak output": Preset("0.2 in the output (up) blocks.", sides={"output": _WEAK}),
    "strong middle": Preset(
        "0.2 in input and output blocks.", sides={"input": _WEAK, "output": _WEAK}
    ),
}


def forward(layers: Sequence[Layer]) -> list[Layer]:
    """In the order in which the UNet runs through them."""
    return sorted(layers, key=lambda layer: (_SIDES.index(layer[0]), *layer[1:]))


def layer_names(layers: Sequence[Layer]) -> list[str]:
    """ "input 4", or "input 4.1" where a block has several transformers; "middle" has no number."""
    blocks = [layer[:2] for layer in layers]
    return [
        block_name((side, number)) + (f".{index}" if blocks.count((side, number)) > 1 else "")
        for side, number, index in layers
    ]


def preset_weights(name: str, layers: Sequence[Layer]) -> list[float]:
    """The preset's weight for each of `layers`, in their order. Raises ValueError for an unknown
    name, or if the preset names blocks and the layers are of no layout that it knows."""
    if name not in PRESETS:
        raise ValueError(f"There is no preset {name!r}; expected one of {', '.join(PRESETS)}.")
    preset = PRESETS[name]
    blocks = list(dict.fromkeys(layer[:2] for layer in forward(layers)))
    if preset.blocks:
        found = next((k for k, own in LAYOUTS.items() if own == set(blocks)), None)
        if found is None:
            raise ValueError(
                f"The preset '{name}' names blocks of {' and '.join(_FAMILIES)}, but this model "
                f"has cross-attention in {', '.join(map(block_name, blocks)) or 'no block'}. "
                "Choose uniform or another preset for any model, and type weights for its layers."
            )
        return [preset.blocks[found].get(layer[:2], preset.rest) for layer in layers]
    if preset.sides:
        return [preset.sides.get(layer[0], preset.rest) for layer in layers]
    last = max(1, len(blocks) - 1)
    return [_ramp(preset.ramp, blocks.index(layer[:2]) / last) for layer in layers]


def _ramp(points: tuple[float, float, float], depth: float) -> float:
    """Linear between a start, a middle and an end, at depths 0, 0.5 and 1."""
    start, middle, end = points
    if depth < 0.5:
        return start + (middle - start) * 2 * depth
    return middle + (end - middle) * (2 * depth - 1)


_EDIT = re.compile(
    r"(?P<side>all|input|output|middle)(?:\s*(?P<number>\d+))?(?:\.(?P<index>\d+))?"
    rf"\s*[:=]\s*(?P<weight>{NUMBER})",
    re.IGNORECASE,
)


def edited(weights: Sequence[float], layers: Sequence[Layer], text: str) -> list[float]:
    """`weights` of `layers` with what `text` sets, one line or comma an entry, later ones last:
    "all: 0", "output: 1", "input 7: 0.5", "output 1.9: 0", "middle: 0"; "#" begins a remark.

    Raises ValueError for an entry that cannot be read, names no layer of these, or has a weight
    outside LIMITS."""
    made = list(weights)
    lines = (line.partition("#")[0] for line in plain(text).splitlines())
    for entry in filter(None, (part.strip() for line in lines for part in re.split("[,;]", line))):
        match = _EDIT.fullmatch(entry)
        if match is None:
            raise ValueError(
                f"The layer weight {entry!r} cannot be read; expected a layer and a number, such "
                "as 'input 7: 0.5', 'output 1.9: 0', 'middle: 1', 'output: 0.2' or 'all: 0'."
            )
        weight = float(match["weight"])
        if not LIMITS[0] <= weight <= LIMITS[1]:
            raise ValueError(
                f"The layer weight {entry!r} is out of range; expected {LIMITS[0]:g} … "
                f"{LIMITS[1]:g}, as for the weight of the Apply node that it multiplies."
            )
        chosen = [place for place, layer in enumerate(layers) if _meant(match, layer)]
        if not chosen:
            raise ValueError(
                f"The layer weight {entry!r} names no cross-attention layer of this model, which "
                f"has {', '.join(layer_names(forward(layers)))}."
            )
        for place in chosen:
            made[place] = weight
    return made


def _meant(match: re.Match[str], layer: Layer) -> bool:
    side, number, index = match["side"].lower(), match["number"], match["index"]
    if side == "all":
        return number is None and index is None
    if index is not None and number is None and side != "middle":  # which has a single block
        return False
    return (
        side == layer[0]
        and (number is None or int(number) == layer[1])
        and (index is None or int(index) == layer[2])
    )


def listed(weights: Sequence[float], layers: Sequence[Layer]) -> str:
    """The weights as `edited` reads them, in the UNet's order; equal ones of a block together."""
    table = dict(zip(layers, weights, strict=True))
    lines = []
    for block in dict.fromkeys(layer[:2] for layer in forward(layers)):
        own = [layer for layer in forward(layers) if layer[:2] == block]
        if len({table[layer] for layer in own}) == 1:
            lines.append(f"{block_name(block)}: {table[own[0]]:g}")
        else:
            lines += [f"{block_name(block)}.{layer[2]}: {table[layer]:g}" for layer in own]
    return "\n".join(lines)


def block_name(block: Block) -> str:
    return "middle" if block == ("middle", 0) else f"{block[0]} {block[1]}"
