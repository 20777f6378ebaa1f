"""Layer weights as named data: on which cross-attention layers an image acts, and how much.

Blocks are named as ComfyUI names them: ("input" | "output" | "middle", number) in a UNet, ("double"
| "single", number) in a Flux. Which of a UNet's carry style and which composition was found for
SDXL by InstantStyle (arXiv 2404.02733: up_blocks.0.attentions.1 and down_blocks.2.attentions.1 in
diffusers' names); for SD1.5 it is what users of ComfyUI_IPAdapter_plus settled on.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from .latent_weights import LIMITS, NUMBER, plain

Block: TypeAlias = tuple[str, int]
LayerKey: TypeAlias = tuple[str, int, int]
"""A block and the index of the transformer in it."""

_SIDES = ("input", "middle", "output", "double", "single")  # as a model runs through them
_OF_UNETS = _SIDES[:3]
_WEAK, _LEAST, _NEITHER = 0.2, 0.05, 0.1


@dataclass(frozen=True)
class Layout:
    """Blocks with cross-attention of a kind of UNet, with weights of what they carry."""

    blocks: frozenset[Block]
    style: Mapping[Block, float]
    composition: Mapping[Block, float]


def _layout(
    inputs: Sequence[int],
    outputs: Sequence[int],
    style: Mapping[Block, float],
    composition: Mapping[Block, float],
    middle: bool = True,
) -> Layout:
    sides = [("input", number) for number in inputs] + [("output", number) for number in outputs]
    return Layout(frozenset([*sides, ("middle", 0)] if middle else sides), style, composition)


LAYOUTS: dict[str, Layout] = {
    "sd15": _layout(
        (1, 2, 4, 5, 7, 8),
        range(3, 12),
        style=dict.fromkeys(
            [("input", n) for n in (1, 2, 4, 5)] + [("output", n) for n in range(5, 12)], 1.0
        ),
        composition={("input", 7): 0.25, ("input", 8): 1.0},
    ),
    "sdxl": _layout(
        (4, 5, 7, 8), range(6), style={("output", 1): 1.0}, composition={("input", 8): 1.0}
    ),
    # A single level with cross-attention: its last block draws color and texture.
    "one level": _layout(
        (1,), (0, 1), style={("output", 1): 1.0}, composition={("output", 0): 1.0}, middle=False
    ),
}


@dataclass(frozen=True)
class LayerPreset:
    """Weights of layers by what they carry, by side, or by depth.

    `style`, `composition`: factors of the weights that a known layout has for them. `away`: which
    of them the negative side shows, so that guidance leads away from it. `sides`: weights by side,
    for any UNet. None of these: `ramp` over the depth, from first to last block and back.
    `rest`: the weight of all other layers.
    """

    about: str
    style: float | None = None
    composition: float | None = None
    away: Literal["", "style", "composition"] = ""
    sides: Mapping[str, float] = field(default_factory=dict)
    rest: float = 1.0
    ramp: tuple[float, float, float] = (1.0, 1.0, 1.0)

    @property
    def names_blocks(self) -> bool:
        """Whether it is for known layouts only."""
        return self.style is not None or self.composition is not None or bool(self.away)

    def blocks(self, layout: Layout) -> dict[Block, float]:
        """Return the weights that it gives to blocks of a known layout."""
        pairs = (self.style, layout.style), (self.composition, layout.composition)
        return {
            block: factor * weight
            for factor, weights in pairs
            if factor is not None
            for block, weight in weights.items()
        }

    def away_blocks(self, layout: Layout) -> dict[Block, float]:
        """Return what the negative side of blocks of a known layout has of the image itself."""
        if self.away == "composition":
            return {**layout.composition}
        if self.away == "style":  # all but the composition: a little of what carries neither
            rest = layout.blocks - layout.composition.keys()
            return {block: layout.style.get(block, _NEITHER) for block in rest}
        return {}


LAYER_PRESETS: dict[str, LayerPreset] = {
    "uniform": LayerPreset("Every layer alike."),
    "style": LayerPreset(
        "Colours, texture and way of drawing; not what is where.", style=1.0, rest=0.0
    ),
    "strong style": LayerPreset("Everything but the composition.", composition=0.0),
    "composition": LayerPreset("What is where; not how it looks.", composition=1.0, rest=0.0),
    "style and composition": LayerPreset(
        "Both, and no more.", style=1.0, composition=1.0, rest=0.0
    ),
    "style without composition": LayerPreset(
        "The style, and away from the composition.", style=1.0, composition=-1.0, rest=0.0
    ),
    "ease in": LayerPreset("Strong where the UNet begins, fading.", ramp=(1.0, 0.525, _LEAST)),
    "ease out": LayerPreset("Weak where the UNet begins, growing.", ramp=(_LEAST, 0.525, 1.0)),
    "ease in-out": LayerPreset("Strongest in the middle.", ramp=(_LEAST, 1.0, _LEAST)),
    "reverse in-out": LayerPreset("Weakest in the middle.", ramp=(1.0, _LEAST, 1.0)),
    "weak input": LayerPreset("0.2 in the input (down) blocks.", sides={"input": _WEAK}),
    "weak middle": LayerPreset("0.2 in the middle block.", sides={"middle": _WEAK}),
    "weak output": LayerPreset("0.2 in the output (up) blocks.", sides={"output": _WEAK}),
    "strong middle": LayerPreset(
        "0.2 in input and output blocks.", sides={"input": _WEAK, "output": _WEAK}
    ),
    "precise style": LayerPreset(
        "The style, with the composition shown to the negative side.",
        style=1.0,
        away="composition",
        rest=0.0,
    ),
    "precise composition": LayerPreset(
        "The composition, with the style shown to the negative side.",
        composition=1.0,
        away="style",
        rest=0.0,
    ),
    "away from composition": LayerPreset(
        "The composition to the negative side, and no more.", away="composition", rest=0.0
    ),
    "away from style": LayerPreset(
        "The style to the negative side, and no more.", away="style", rest=0.0
    ),
}


def forward(layers: Sequence[LayerKey]) -> list[LayerKey]:
    """Return the layers in the order in which the UNet runs through them."""
    return sorted(layers, key=lambda layer: (_SIDES.index(layer[0]), *layer[1:]))


def layer_names(layers: Sequence[LayerKey]) -> list[str]:
    """Name each layer: "input 4", "input 4.1" where a block has several transformers, "middle"."""
    blocks = [layer[:2] for layer in layers]
    return [
        block_name((side, number)) + (f".{index}" if blocks.count((side, number)) > 1 else "")
        for side, number, index in layers
    ]


def preset_weights(name: str, layers: Sequence[LayerKey]) -> list[float]:
    """Return the preset's weight for each of `layers`, in their order.

    Raises:
        ValueError: The name is unknown, or the preset names blocks and the layers are of no layout
            that it knows.
    """
    preset, layout = _preset(name, layers)
    if layout is not None:
        weights = preset.blocks(layout)
        return [weights.get(layer[:2], preset.rest) for layer in layers]
    if preset.sides:
        return [preset.sides.get(layer[0], preset.rest) for layer in layers]
    blocks = _blocks(layers)
    last = max(1, len(blocks) - 1)
    return [_ramp(preset.ramp, blocks.index(layer[:2]) / last) for layer in layers]


def away_weights(name: str, layers: Sequence[LayerKey]) -> list[float]:
    """Return what the preset shows the negative side of the image itself, 0 for most layers.

    Raises ValueError as `preset_weights` does.
    """
    preset, layout = _preset(name, layers)
    weights = preset.away_blocks(layout) if layout is not None else {}
    return [weights.get(layer[:2], 0.0) for layer in layers]


def _preset(name: str, layers: Sequence[LayerKey]) -> tuple[LayerPreset, Layout | None]:
    """Return a preset, and the layers' layout where it names blocks."""
    if name not in LAYER_PRESETS:
        raise ValueError(
            f"There is no preset {name!r}; expected one of {', '.join(LAYER_PRESETS)}."
        )
    preset, blocks = LAYER_PRESETS[name], _blocks(layers)
    of_unet = all(side in _OF_UNETS for side, _ in blocks)
    if not of_unet and (preset.names_blocks or preset.sides):
        runs = " and ".join(f"{len(own)} {side}" for side, own in _by_side(blocks).items())
        general = [key for key, x in LAYER_PRESETS.items() if not (x.names_blocks or x.sides)]
        raise ValueError(
            f"The preset '{name}' names blocks of a UNet, but this model is a transformer of "
            f"{runs} blocks. Choose {', '.join(general)}, or type weights for its blocks, such as "
            "'double 0: 0.5' or 'single: 0'."
        )
    if not preset.names_blocks:
        return preset, None
    layout = next((known for known in LAYOUTS.values() if known.blocks == set(blocks)), None)
    if layout is None:
        raise ValueError(
            f"The preset '{name}' names blocks of SD1.5 and SDXL, but "
            "this model has cross-attention in "
            f"{', '.join(map(block_name, blocks)) or 'no block'}. Choose uniform or another "
            "preset for any model, and type weights for its layers."
        )
    return preset, layout


def _blocks(layers: Sequence[LayerKey]) -> list[Block]:
    """Return the layers' blocks in the order in which the UNet runs through them."""
    return list(dict.fromkeys(layer[:2] for layer in forward(layers)))


def _by_side(blocks: Sequence[Block]) -> dict[str, list[Block]]:
    return {s: [b for b in blocks if b[0] == s] for s in dict.fromkeys(s for s, _ in blocks)}


def _ramp(points: tuple[float, float, float], depth: float) -> float:
    """Linear between a start, a middle and an end, at depths 0, 0.5 and 1."""
    start, middle, end = points
    if depth < 0.5:
        return start + (middle - start) * 2 * depth
    return middle + (end - middle) * (2 * depth - 1)


_EDIT = re.compile(
    r"(?P<side>all|input|output|middle|double|single)(?:\s*(?P<number>\d+))?(?:\.(?P<index>\d+))?"
    rf"\s*[:=]\s*(?P<weight>{NUMBER})",
    re.IGNORECASE,
)


def edited(weights: Sequence[float], layers: Sequence[LayerKey], text: str) -> list[float]:
    """Return `weights` of `layers` with what `text` sets, one line or comma an entry.

    Later ones last: "all: 0", "output: 1", "input 7: 0.5", "output 1.9: 0", "middle: 0"; "#" begins
    a remark.

    Raises:
        ValueError: An entry cannot be read, names no layer of these, or is outside LIMITS.
    """
    result = list(weights)
    lines = (line.partition("#")[0] for line in plain(text).splitlines())
    for entry in filter(None, (part.strip() for line in lines for part in re.split("[,;]", line))):
        match = _EDIT.fullmatch(entry)
        if match is None:
            raise ValueError(
                f"The layer weight {entry!r} cannot be read; expected a layer and a number, such "
                "as 'input 7: 0.5', 'output 1.9: 0', 'middle: 1', 'output: 0.2' or 'all: 0'; of a "
                "Flux 'double 3: 0.5' or 'single: 0'."
            )
        weight = float(match["weight"])
        if not LIMITS[0] <= weight <= LIMITS[1]:
            raise ValueError(
                f"The layer weight {entry!r} is out of range; expected {LIMITS[0]:g} … "
                f"{LIMITS[1]:g}, as for the weight of the Apply node that it multiplies."
            )
        chosen = [place for place, layer in enumerate(layers) if _names(match, layer)]
        if not chosen:
            kind = "cross-attention layer" if layers[0][0] in _OF_UNETS else "block"
            raise ValueError(
                f"The layer weight {entry!r} names no {kind} of this model, which "
                f"has {', '.join(layer_names(forward(layers)))}."
            )
        for place in chosen:
            result[place] = weight
    return result


def _names(match: re.Match[str], layer: LayerKey) -> bool:
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


def listed(weights: Sequence[float], layers: Sequence[LayerKey]) -> str:
    """List the weights as `edited` reads them, in the UNet's order, equal ones of a block once."""
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
