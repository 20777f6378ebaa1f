"""What the miniature has to show, and whether an evaluation shows it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

FOLLOWS = {"colour": 0.9, "background": 0.9, "texture": 0.8}  # of the reference, at λ = 1
SHAPE_KEPT = 0.85  # of the text, at λ = 1
SHAPE_ALONE = 0.5  # of the reference, where there is no text
TRUSTED = 0.98  # of the judge's verdicts on drawn pictures that are right
ONE_OF_TWO = 0.8  # of pictures show one of two references, or each latent its own
UNCHANGED = 0.8  # of colours, backgrounds and shapes on a base that the adapter never saw
RESTYLED = 0.1  # by how much whiter that base's outlines are
Figures = Mapping[str, Any]


@dataclass(frozen=True)
class Demand:
    """One figure, and between what it has to lie."""

    name: str
    value: float
    low: float = float("-inf")
    high: float = float("inf")

    @property
    def met(self) -> bool:
        return self.low <= self.value <= self.high

    def __str__(self) -> str:
        bounds = [f"≥ {self.low:.3g}"] * (self.low > float("-inf"))
        bounds += [f"≤ {self.high:.3g}"] * (self.high < float("inf"))
        verdict = "ok  " if self.met else "MISS"
        return f"{verdict} {self.name}: {self.value:.3f} ({', '.join(bounds)})"


def demands(found: Figures) -> Iterator[Demand]:
    """Of an evaluation as miniature.json has it; of its findings, if it has some, in each set."""
    for kind, low in FOLLOWS.items():
        yield Demand(f"{kind} follows the reference at λ = 1", found[f"{kind}_follows"], low)
    yield Demand("the text's shape is kept at λ = 1", found["shape_kept"], SHAPE_KEPT)
    for kind in FOLLOWS:
        chance = found["chance"][kind]
        name = f"{kind} is at chance at λ = 0"
        yield Demand(name, found[f"{kind}_at_zero"], chance["low"], chance["high"])
    likeness = [*found["image_similarity"].items()]
    for (before, lower), (weight, higher) in itertools.pairwise(likeness):
        yield Demand(f"likeness rises from λ = {before} to {weight}", higher - lower, 0)
    alone = found["image_only"]
    for kind, low in FOLLOWS.items():
        yield Demand(f"{kind} follows the image alone", alone[kind], low)
    yield Demand("shape follows the image alone", alone["shape_of_reference"], SHAPE_ALONE)
    for kind, right in found["judge_accuracy"].items():
        yield Demand(f"the judge knows {kind}", right, TRUSTED)
    for number, one in enumerate(found.get("findings", {}).get("seeds", ())):
        for demand in _of_findings(one):
            yield Demand(f"set {number}: {demand.name}", demand.value, demand.low, demand.high)


def _of_findings(one: Figures) -> Iterator[Demand]:
    for setting in ("text_and_image", "image_only"):
        fine, base = (one["variants"][kind][setting] for kind in ("fine_grained", "base"))
        closer = base["distance"] - fine["distance"]
        yield Demand(f"fine-grained is closer to what is asked, {setting}, in levels", closer, 0)
        nearer = base["displacement"] - fine["displacement"]
        yield Demand(f"and puts it nearer to where it is asked, {setting}, in pixels", nearer, 0)
    if "concatenated" in one["variants"]:
        base, other = (one["variants"][kind]["text_and_image"] for kind in ("base", "concatenated"))
        more = base["image_similarity"] - other["image_similarity"]
        yield Demand("decoupled attention is more like the reference than concatenation", more, 0)
    two = one["several_references"]
    for kind in ("colour", "background"):
        yield Demand(f"concat: {kind} of either", two["concat"][f"{kind}_of_either"], ONE_OF_TWO)
        own, other = (two["per_latent"][f"{kind}_of_{whose}"] for whose in ("own", "other"))
        yield Demand(f"one per latent: {kind} of its own", own, ONE_OF_TWO)
        yield Demand(f"one per latent: {kind} of the other", other, high=1 - ONE_OF_TWO)
    blend = two["average"]["image_similarity"]
    strangers = two["average"]["image_similarity_of_strangers"]
    yield Demand("average: like each of the two more than a stranger", min(blend) - strangers, 0)
    if "structure" in one:
        shown = one["structure"]
        yield Demand("edges: shapes lie on them", shown["overlap"] - shown["overlap_without"], 0.1)
        for kind in ("colour", "background"):
            yield Demand(f"edges and image: {kind} of the image", shown[kind], UNCHANGED)
        start = shown["image_to_image"]
        gain = start["overlap"] - start["overlap_without"]
        yield Demand("image to image: shapes stay where they were", gain, 0.1)
        more = start["colour"] - start["colour_without"]
        yield Demand("image to image: the prompt brings its colour", more, 0.1)
    if "another_base" in one:
        second = one["another_base"]
        for kind in ("colour", "background", "shape_kept"):
            yield Demand(f"another base: {kind}", second[kind], UNCHANGED)
        whiter = second["whiteness_of_outlines"] - second["whiteness_on_the_first_base"]
        yield Demand("another base: its outlines are white", whiter, RESTYLED)
    if "toolbox" in one:
        yield from _of_toolbox(one["toolbox"])


def _of_toolbox(one: Figures) -> Iterator[Demand]:
    regions = one["regions"]
    for kind, own, other in (("colour", "inner", "outer"), ("background", "outer", "inner")):
        yield Demand(f"regions: {kind} of its own", regions[f"{kind}_of_{own}"], ONE_OF_TWO)
        strange = regions[f"{kind}_of_{other}"]
        yield Demand(f"regions: {kind} of the other", strange, high=1 - ONE_OF_TWO)
    style, uniform = one["style"]["style"], one["style"]["uniform"]
    away = style["displacement"] - uniform["displacement"]
    yield Demand("style leaves the layout more than uniform weights, in pixels", away, 0)
    yield Demand("style keeps the texture", style["texture"], FOLLOWS["texture"])
    heat = one["attention_map"]
    yield Demand("the map is warmer inside the mask, times", heat["inside"] / heat["outside"], 2)
