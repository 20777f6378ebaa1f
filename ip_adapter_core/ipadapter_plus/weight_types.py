"""Weight types of ComfyUI_IPAdapter_plus, as λ of every layer on both sides of guidance.

They go by the number t of a block with cross-attention, in the order in which the UNet runs:
SD1.5 has 16, SDXL 11. Which of them carry style and which composition is layer_weights.py's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ..layer_weights import LAYOUTS, Block, LayerKey, forward
from ..packing import V_ONLY, LayerFolding

WEIGHT_TYPES = (
    *("linear", "ease in", "ease out", "ease in-out", "reverse in-out", "weak input"),
    *("weak output", "weak middle", "strong middle", "style transfer", "composition"),
    *("strong style transfer", "style and composition", "style transfer precise"),
    "composition precise",
)
ONCE_CALLED = {
    "style transfer (SDXL)": "style transfer",
    "style transfer (SDXL only)": "style transfer",
    "composition (SDXL)": "composition",
    "style transfer and composition": "style and composition",
}
"""Names that lived for some weeks of 2024, and what they are called since."""
SCALING_OF_FIRST_TYPES = {
    "original": "V only",
    "linear": "K+V",
    "channel penalty": "K+mean(V) w/ C penalty",
}
"""`weight_type` of the nodes before 2024-03-23 is what became the scaling."""
_LEAST, _WEAK, _NEITHER = 0.05, 0.2, 0.1


@dataclass(frozen=True)
class Asked:
    """What a node asks for. `weight`: one number, or one a latent.

    `composition` is the weight of the blocks of composition where a type sets them apart; `boost`
    that of what the precise types show the negative side (None: the weight). `layers` is text,
    "t:x, t:x": the blocks in place of a type's.
    """

    weight_type: str = "linear"
    weight: float | Sequence[float] = 1.0
    composition: float = 1.0
    boost: float | None = None
    layers: str = ""
    scaling: str = V_ONLY


@dataclass
class _Table:
    """λ of block t: `factor` times the weight, plus `constant`; `itself` as in `LayerFolding`."""

    factor: dict[int, float]
    constant: dict[int, float] = field(default_factory=dict)
    itself: frozenset[int] = frozenset()


def foldings(
    asked: Asked, layers: Sequence[LayerKey], sdxl: bool, middle: bool = True
) -> list[tuple[LayerFolding, list[float] | None]]:
    """Return λ of the layers, as one or two parts that add up, with the weights of the latents.

    `sdxl`: whether the adapter is for SDXL; `middle`: whether the middle block acts. A second part
    holds what no weight of a latent changes.

    Raises:
        ValueError: A weight or the text of layers cannot be read.
    """
    weight, several = asked.weight, not isinstance(asked.weight, int | float)
    table = _table(asked, layers, sdxl)
    if several:
        latents = [float(x) for x in weight]  # type: ignore[union-attr]
        parts = [(table.factor, latents), (table.constant, None)]
    else:
        number = float(weight)  # type: ignore[arg-type]
        both = {t: number * x for t, x in table.factor.items()}
        for t, x in table.constant.items():
            both[t] = both.get(t, 0.0) + x
        parts = [(both, None)]
    order = list(dict.fromkeys(layer[:2] for layer in forward(layers)))
    made: list[tuple[LayerFolding, list[float] | None]] = []
    for by_block, latents_of in parts:
        numbers = [order.index(layer[:2]) for layer in layers]
        weights = [
            by_block.get(t, 0.0) if middle or layer[0] != "middle" else 0.0
            for t, layer in zip(numbers, layers, strict=True)
        ]
        itself = tuple(t in table.itself for t in numbers)
        positive = tuple(
            0.0 if own else weight for own, weight in zip(itself, weights, strict=True)
        )
        if any(weights) or not made:
            folding = LayerFolding(positive, tuple(weights), itself, asked.scaling)
            made.append((folding, latents_of))
    return made


def _table(asked: Asked, layers: Sequence[LayerKey], sdxl: bool) -> _Table:
    layout = LAYOUTS["sdxl" if sdxl else "sd15"]
    order = _numbered(layout.blocks)
    style = {order.index(block): weight for block, weight in layout.style.items()}
    composition = {order.index(block): weight for block, weight in layout.composition.items()}
    count = 11 if sdxl else 16
    every = range(len({layer[:2] for layer in layers}))
    sides = [block[0] for block in _numbered({layer[:2] for layer in layers})]
    type_ = ONCE_CALLED.get(asked.weight_type, asked.weight_type)
    rest = {t: style.get(t, _NEITHER) for t in every if t not in composition}
    away: dict[str, tuple[Mapping[int, float], Mapping[int, float]]] = {
        "style transfer precise": (style, composition),
        "composition precise": (composition, rest),
    }
    if asked.layers:
        named = _named(asked.layers)
        shown = away.get(type_, ({}, {}))[1]
        return _Table(named, itself=frozenset(shown))
    if type_ in away:
        kept, shown = away[type_]
        if asked.boost is None:
            return _Table({**kept, **shown}, itself=frozenset(shown))
        constant = {t: asked.boost * x for t, x in shown.items()}
        return _Table({**kept}, constant, frozenset(shown))
    if type_ == "style transfer":
        return _Table(style)
    if type_ == "composition":
        return _Table(composition)
    others = {t: 1.0 for t in every if t not in composition}
    if type_ == "strong style transfer":
        return _Table(others)
    if type_ == "style and composition":
        return _Table(style, {t: asked.composition * x for t, x in composition.items()})
    if type_ == "strong style and composition":
        return _Table(others, dict.fromkeys(composition, asked.composition))
    half = count / 2
    ramps = {
        "ease in": lambda t: 1 - t / count,
        "ease out": lambda t: t / count,
        "ease in-out": lambda t: 1 - abs(t - half) / half,
        "reverse in-out": lambda t: abs(t - half) / half,
    }
    if type_ in ramps:
        return _Table({t: _LEAST + (1 - _LEAST) * ramps[type_](t) for t in every})
    weak = {
        "weak input": ("input",),
        "weak middle": ("middle",),
        "weak output": ("output",),
        "strong middle": ("input", "output"),
    }.get(type_, ())
    return _Table({t: _WEAK if sides[t] in weak else 1.0 for t in every})


def _numbered(blocks: Sequence[Block] | set[Block] | frozenset[Block]) -> list[Block]:
    """Return blocks in the order in which the UNet runs, so that their place is t."""
    return [layer[:2] for layer in forward([(*block, 0) for block in blocks])]


def _named(text: str) -> dict[int, float]:
    """Read "t:x, t:x"; blocks that are not named get 0."""
    named = {}
    for entry in filter(str.strip, text.split(",")):
        number, _, weight = entry.partition(":")
        try:
            named[int(number)] = float(weight)
        except ValueError as error:
            raise ValueError(
                f"layer_weights has {entry.strip()!r}; expected the number of a block and its "
                "weight, as in '3:0.8, 6:0.35'. Blocks that are not named get 0."
            ) from error
    if not all(map(math.isfinite, named.values())):
        raise ValueError(f"layer_weights holds {text!r}; expected finite weights.")
    return named
