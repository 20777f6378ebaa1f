"""What the miniature has to show, and whether an evaluation shows it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any

FOLLOWS = {"colour": 0.9, "background": 0.9, "texture": 0.8}  # of the reference, at λ = 1
SHAPE_KEPT = 0.85  # of the text, at λ = 1
SHAPE_ALONE = 0.5  # of the reference, where there is no text
TRUSTED = 0.98  # of the judge's verdicts on drawn pictures that are right
TRUSTED_OUTLINED = 0.95  # the same of the second base's style
ONE_OF_TWO = 0.8  # of pictures show one of two references, or each latent or region its own
UNCHANGED = 0.8  # of colours, backgrounds and shapes on a base that the adapter never saw
WHITER = 0.1  # by how much that base's outlines are whiter
OVERLAP = 0.1  # by how much edges move shapes to where they are asked
BRINGS = 0.1  # by how much more often an image prompt brings its colour to another picture
LEAVES = 0.1  # by how much less often the style preset brings the background
ASTRAY = 0.5  # pixels by which shapes lie farther from the reference's with the style preset
DRAWN = 0.9  # of pictures have a shape at all
Figures = Mapping[str, Any]


@dataclass(frozen=True)
class Demand:
    """One figure, and between what it has to lie: `low` and `high` are allowed, `above` is not.
    NaN, for what was not measured, meets nothing."""

    name: str
    value: float
    low: float = -math.inf
    high: float = math.inf
    above: float = -math.inf

    @property
    def met(self) -> bool:
        return self.low <= self.value <= self.high and self.value > self.above

    def __str__(self) -> str:
        bounds = {"≥": self.low, "≤": self.high, ">": self.above}
        asked = ", ".join(f"{sign} {x:.3g}" for sign, x in bounds.items() if math.isfinite(x))
        found = "not measured" if math.isnan(self.value) else f"{self.value:.3f}"
        return f"{'ok  ' if self.met else 'MISS'} {self.name}: {found} ({asked})"


def demands(found: Figures) -> Iterator[Demand]:
    """Of an evaluation as miniature.json has it, and of its findings in each set."""
    for kind, low in FOLLOWS.items():
        yield Demand(f"{kind} follows the reference at λ = 1", found[f"{kind}_follows"], low)
    yield Demand("the text's shape is kept at λ = 1", found["shape_kept"], SHAPE_KEPT)
    for kind in FOLLOWS:
        chance = found["chance"][kind]
        name = f"{kind} is at chance at λ = 0"
        yield Demand(name, found[f"{kind}_at_zero"], chance["low"], chance["high"])
    for (before, lower), (weight, higher) in itertools.pairwise(found["image_similarity"].items()):
        yield Demand(f"likeness rises from λ = {before} to {weight}", higher - lower, above=0)
    alone = found["image_only"]
    for kind, low in FOLLOWS.items():
        yield Demand(f"{kind} follows the image alone", alone[kind], low)
    yield Demand("shape follows the image alone", alone["shape_of_reference"], SHAPE_ALONE)
    yield Demand(
        "fine-grained is more like what is asked than base",
        found["fine_grained_over_base"],
        above=0,
    )
    if "concatenated" in found:
        name = "decoupled attention over concatenation"
        yield Demand(f"{name}: likeness", found["decoupled_over_concatenated"], above=0)
        kept = found["shape_kept"] - found["concatenated"]["shape"]
        yield Demand(f"{name}: the text's shape is kept", kept, above=0)
    for kind, right in found["judge_accuracy"].items():
        yield Demand(f"the judge knows {kind}", right, TRUSTED)
    for kind, right in found["judge_accuracy_outlined"].items():
        yield Demand(f"the judge knows {kind} of outlined shapes", right, TRUSTED_OUTLINED)
    sets = found.get("findings", {}).get("sets", ())
    if not sets:
        yield _missing("findings")
    for one in sets:
        for demand in _of_findings(one):
            name = f"set {one['seed']}: {demand.name}"
            yield Demand(name, demand.value, demand.low, demand.high, demand.above)
    if sets:  # of all sets together: one's shapes lie astray by chance too
        styles = [one["toolbox"]["style"] for one in sets]
        away = fmean(
            one["style"]["displacement"] - one["uniform"]["displacement"] for one in styles
        )
        yield Demand("style leaves the reference's place more than uniform weights", away, ASTRAY)


def _missing(what: str) -> Demand:
    return Demand(what, math.nan, above=0)


def _of_findings(one: Figures) -> Iterator[Demand]:
    for setting in ("text_and_image", "image_only"):
        fine, base = (one["variants"][kind][setting] for kind in ("fine_grained", "base"))
        name = f"fine-grained is closer to what is asked than base, {setting}"
        yield Demand(f"{name}, in levels", base["distance"] - fine["distance"], above=0)
        nearer = base["displacement"] - fine["displacement"]
        yield Demand(f"{name}, in pixels of displacement", nearer, above=0)
        for kind, figures in (("fine-grained", fine), ("base", base)):
            yield Demand(f"{kind} draws a shape, {setting}", figures["seen"], DRAWN)
    yield from _of_concatenation(one["variants"])
    yield from _of_several(one["several_references"])
    yield from _of_structure(one["structure"]) if "structure" in one else [_missing("structure")]
    if second := one.get("another_base"):
        for kind in ("colour", "background", "shape_kept"):
            yield Demand(f"another base: {kind}", second[kind], UNCHANGED)
        whiter = second["whiteness_of_outlines"] - second["whiteness_on_the_first_base"]
        yield Demand("another base: its outlines are whiter", whiter, WHITER)
    else:
        yield _missing("another base")
    yield from _of_toolbox(one["toolbox"])


def _of_concatenation(variants: Figures) -> Iterator[Demand]:
    name = "decoupled attention over concatenation"
    if "concatenated" not in variants:
        yield _missing(name)
        return
    for setting in ("text_and_image", "image_only"):
        ours, theirs = (variants[kind][setting] for kind in ("base", "concatenated"))
        more = ours["image_similarity"] - theirs["image_similarity"]
        yield Demand(f"{name}, {setting}: likeness to what is asked", more, above=0)
        closer = theirs["distance"] - ours["distance"]
        yield Demand(f"{name}, {setting}: closer to it, in levels", closer, above=0)


def _of_several(two: Figures) -> Iterator[Demand]:
    for kind in ("colour", "background"):
        yield Demand(f"concat: {kind} of either", two["concat"][f"{kind}_of_either"], ONE_OF_TWO)
        own, other = (two["per_latent"][f"{kind}_of_{whose}"] for whose in ("own", "other"))
        yield Demand(f"one per latent: {kind} of its own", own, ONE_OF_TWO)
        yield Demand(f"one per latent: {kind} of the other", other, high=1 - ONE_OF_TWO)
    for combine in ("concat", "average"):
        figures = two[combine]
        more = min(figures["image_similarity"]) - figures["image_similarity_of_strangers"]
        yield Demand(f"{combine}: like each of the two more than a stranger", more, above=0)


def _of_structure(shown: Figures) -> Iterator[Demand]:
    moved = shown["overlap"] - shown["overlap_without"]
    yield Demand("edges and image: shapes lie on the edges", moved, OVERLAP)
    for kind in ("colour", "background"):
        yield Demand(f"edges and image: {kind} of the image", shown[kind], UNCHANGED)
    start = shown["image_to_image"]
    more = start["colour"] - start["colour_without"]
    yield Demand("image to image: the prompt brings its colour", more, BRINGS)


def _of_toolbox(one: Figures) -> Iterator[Demand]:
    regions = one["regions"]
    for kind, own, other in (("colour", "inner", "outer"), ("background", "outer", "inner")):
        yield Demand(f"regions: {kind} of its own", regions[f"{kind}_of_{own}"], ONE_OF_TWO)
        strange = regions[f"{kind}_of_{other}"]
        yield Demand(f"regions: {kind} of the other", strange, high=1 - ONE_OF_TWO)
    style, uniform, weaker, composition = (
        one["style"][name] for name in ("style", "uniform", "weaker", "composition")
    )
    for name, other in (("uniform weights", uniform), ("half of them", weaker)):
        less = other["background"] - style["background"]
        yield Demand(f"style leaves the reference's background more than {name}", less, LEAVES)
    yield Demand("style brings the texture", style["texture"], FOLLOWS["texture"])
    more = style["texture"] - composition["texture"]
    yield Demand("style brings the texture more than composition", more, above=0)
    heat = one["attention_map"]
    yield Demand(
        "the map is twice as warm inside the mask", heat["inside"] - 2 * heat["outside"], above=0
    )
