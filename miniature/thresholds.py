"""The figures of an evaluation: what the card calls each, and what the miniature has to show.

`EVALUATION` and `SETS` are the one table of them, in the card's order; `model_card.py` prints its
labels, `demands` checks its bounds.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from miniature.scenes import KINDS

FOLLOWS = {"colour": 0.9, "background": 0.9, "texture": 0.8}  # of the reference, at λ = 1
SHAPE_KEPT = 0.85  # of the text, at λ = 1
SHAPE_ALONE = 0.5  # of the reference, where there is no text
TRUSTED = 0.98  # of the classifier's answers on images drawn by rule that are right
TRUSTED_OUTLINED = 0.95  # the same of the second base's style
ONE_OF_TWO = 0.8  # of images show one of two references, or each latent or region its own
UNCHANGED = 0.8  # of colors, backgrounds and shapes on a base that the adapter never saw
WHITER = 0.1  # by how much that base's outlines are whiter
OVERLAP = 0.1  # by how much edges move shapes to where they are asked
BRINGS = 0.1  # by how much more often an image prompt brings its color to another image
LEAVES = 0.1  # by how much less often the style preset brings the background
ASTRAY = 0.5  # pixels by which shapes lie farther from the reference's with the style preset
DRAWN = 0.9  # of images have a shape at all
Figures = Mapping[str, Any]


def at(found: Figures, path: str) -> Any:
    """Return what lies at "a.b.c"."""
    for key in path.split("."):
        found = found[key]
    return found


@dataclass(frozen=True)
class Demand:
    """One value, and between what it has to lie: `low` and `high` are allowed, `above` is not.

    NaN, for what was not measured, meets nothing.
    """

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


@dataclass(frozen=True)
class Figure:
    """Where a figure lies, its label on the card, and what is demanded of it; either may lack.

    `path`: "a.b", or "a.b - c.d" for a difference; of several numbers the least counts. Bounds are
    numbers, or paths of numbers.
    """

    path: str
    label: str = ""
    demand: str = ""
    low: float | str = -math.inf
    high: float | str = math.inf
    above: float = -math.inf

    def value(self, found: Figures) -> float:
        """Return it in an evaluation. Raises KeyError where it is not measured."""
        terms = [at(found, term) for term in self.path.split(" - ")]
        first, *less = (min(term) if isinstance(term, list) else term for term in terms)
        return first - sum(less)

    def text(self, value: float) -> str:
        """Write a value with as many digits as it is worth."""
        coarse = self.path.endswith(("distance", "displacement", "shade_error"))
        return f"{value:.{1 if coarse else 2}f}"

    def demanded(self, found: Figures, prefix: str = "") -> Demand:
        """Hold an evaluation against the bounds."""
        low, high = (at(found, x) if isinstance(x, str) else x for x in (self.low, self.high))
        return Demand(prefix + self.demand, self.value(found), low, high, self.above)


def _evaluation() -> Iterator[Figure]:
    for kind, low in FOLLOWS.items():
        demand = f"{kind} follows the reference at λ = 1"
        yield Figure(f"{kind}_follows", f"{kind} of the reference at λ = 1", demand, low)
        chance = f"chance.{kind}.low", f"chance.{kind}.high"
        yield Figure(f"{kind}_at_zero", "… at λ = 0", f"{kind} is at chance at λ = 0", *chance)
    kept = "the text's shape is kept at λ = 1"
    yield Figure("shape_kept", "shape of the text at λ = 1", kept, SHAPE_KEPT)
    yield Figure("fine_grained.shape", "… fine-grained")
    yield Figure("concatenated.shape", "… concatenated")
    for kind, low in FOLLOWS.items():
        label = "with no text: colour of the reference" if kind == "colour" else f"… {kind}"
        yield Figure(f"image_only.{kind}", label, f"{kind} follows the image alone", low)
    alone = "image_only.shape_of_reference"
    yield Figure(alone, "… shape", "shape follows the image alone", SHAPE_ALONE)
    yield Figure("similarity_to_asked", "likeness to what is asked at λ = 1, base adapter")
    yield Figure("fine_grained.similarity_to_asked", "… fine-grained")
    yield Figure("concatenated.similarity_to_asked", "… concatenated")
    more = "fine-grained is more like what is asked than base"
    yield Figure("fine_grained_over_base", "", more, above=0)
    over = "decoupled attention over concatenation"
    yield Figure("decoupled_over_concatenated", "", f"{over}: likeness", above=0)
    path = "shape_kept - concatenated.shape"
    yield Figure(path, "", f"{over}: the text's shape is kept", above=0)
    for kind in KINDS:
        yield Figure(f"judge_accuracy.{kind}", "", f"the classifier knows {kind}", TRUSTED)
        name = f"the classifier knows {kind} of outlined shapes"
        yield Figure(f"judge_accuracy_outlined.{kind}", "", name, TRUSTED_OUTLINED)


def _variants() -> Iterator[Figure]:
    for setting, figure, name in (
        ("text_and_image", "distance", "distance from what is asked"),
        ("text_and_image", "displacement", "displacement"),
        ("text_and_image", "shade_error", "error of the shade"),
        ("image_only", "distance", "distance with no text"),
        ("image_only", "displacement", "displacement with no text"),
        ("image_only", "shade_error", "error of the shade with no text"),
        ("text_and_image", "image_similarity", "likeness"),
        ("image_only", "image_similarity", "likeness with no text"),
    ):
        yield Figure(f"variants.base.{setting}.{figure}", f"{name}, base adapter")
        yield Figure(f"variants.fine_grained.{setting}.{figure}", "… fine-grained")
        yield Figure(f"variants.concatenated.{setting}.{figure}", "… concatenated")
        if setting == "text_and_image" and figure != "image_similarity":
            yield Figure(f"variants.strangers.{setting}.{figure}", "… a stranger's")
    closer = "fine-grained is closer to what is asked than base"
    over = "decoupled attention over concatenation"
    for setting in ("text_and_image", "image_only"):
        base, fine, theirs = (
            f"variants.{kind}.{setting}" for kind in ("base", "fine_grained", "concatenated")
        )
        for figure, unit in (("distance", "levels"), ("displacement", "pixels of displacement")):
            name = f"{closer}, {setting}, in {unit}"
            yield Figure(f"{base}.{figure} - {fine}.{figure}", "", name, above=0)
        yield Figure(f"{fine}.seen", "", f"fine-grained draws a shape, {setting}", DRAWN)
        yield Figure(f"{base}.seen", "", f"base draws a shape, {setting}", DRAWN)
        path = f"{base}.image_similarity - {theirs}.image_similarity"
        yield Figure(path, "", f"{over}, {setting}: likeness to what is asked", above=0)
        path = f"{theirs}.distance - {base}.distance"
        yield Figure(path, "", f"{over}, {setting}: closer to it, in levels", above=0)


def _under(prefix: str, *rows: tuple[Any, ...], **last: float) -> Iterator[Figure]:
    """Give figures below one path: path, label, demand and lower bound of each."""
    for path, *rest in rows:
        yield Figure(" - ".join(f"{prefix}.{term}" for term in path.split(" - ")), *rest, **last)  # type: ignore[arg-type]


def _several() -> Iterator[Figure]:
    two = "several_references"
    for kind, label in (
        ("colour", "two references, concat: colour"),
        ("background", "… background"),
    ):
        demand = f"concat: {kind} of either"
        yield Figure(f"{two}.concat.{kind}_of_either", f"{label} of either", demand, ONE_OF_TWO)
    yield Figure(f"{two}.average.colour_of_either", "average: colour of either")
    yield Figure(f"{two}.average.image_similarity_of_strangers", "… likeness to a stranger")
    for combine in ("concat", "average"):
        name = f"{combine}: like each of the two more than a stranger"
        path = "image_similarity - image_similarity_of_strangers"
        yield from _under(f"{two}.{combine}", (path, "", name), above=0)
    own, other = "one per latent: {} of its own", "one per latent: {} of the other"
    shown = {"colour": (own.format("colour"), "… colour of the other"), "background": ("", "")}
    for kind, labels in shown.items():
        path = f"{two}.per_latent.{kind}_of"
        yield Figure(f"{path}_own", labels[0], own.format(kind), ONE_OF_TWO)
        yield Figure(f"{path}_other", labels[1], other.format(kind), high=1 - ONE_OF_TWO)


def _structure_and_base() -> Iterator[Figure]:
    edges, start, base = "edges and image", "image to image", "another base"
    yield from _under(
        "structure",
        ("overlap", f"{edges}: overlap of the shapes"),
        ("overlap_without", "… without the edges"),
        ("overlap - overlap_without", "", f"{edges}: shapes lie on the edges", OVERLAP),
        ("colour", "… colour of the image", f"{edges}: colour of the image", UNCHANGED),
        ("background", "… background of the image", f"{edges}: background of the image", UNCHANGED),
    )
    yield from _under(
        "structure.image_to_image",
        ("overlap", f"{start}: overlap with the start"),
        ("overlap_without", "… with none"),
        ("colour", "… colour of the image"),
        ("colour_without", "… without the prompt"),
        ("colour - colour_without", "", f"{start}: the prompt brings its colour", BRINGS),
    )
    white, before = "whiteness_of_outlines", "whiteness_on_the_first_base"
    yield from _under(
        "another_base",
        ("colour", "second base: colour", f"{base}: colour", UNCHANGED),
        ("background", "… background", f"{base}: background", UNCHANGED),
        ("shape_kept", "… shape of the text", f"{base}: shape_kept", UNCHANGED),
        (white, "… whiteness of its outlines"),
        (before, "… on the first base"),
        (f"{white} - {before}", "", f"{base}: its outlines are whiter", WHITER),
    )


def _toolbox() -> Iterator[Figure]:
    regions, own, other = "toolbox.regions", "regions: {} of its own", "regions: {} of the other"
    inside, low, high = "two regions: colour of the one inside", ONE_OF_TWO, 1 - ONE_OF_TWO
    outside = "… of the one outside", "… background of the one outside"
    yield Figure(f"{regions}.colour_of_inner", inside, own.format("colour"), low)
    yield Figure(f"{regions}.colour_of_outer", outside[0], other.format("colour"), high=high)
    yield Figure(f"{regions}.background_of_inner", "", other.format("background"), high=high)
    yield Figure(f"{regions}.background_of_outer", outside[1], own.format("background"), low)
    presets = {
        "style": "style preset",
        "uniform": "uniform weights",
        "weaker": "half of them",
        "composition": "composition preset",
    }
    for preset, name in presets.items():
        prefix = f"toolbox.style.{preset}"
        yield Figure(f"{prefix}.colour", f"{name}: colour")
        demand = ("style brings the texture", FOLLOWS["texture"]) if preset == "style" else ()
        yield Figure(f"{prefix}.texture", "… texture", *demand)
        for figure in ("shape", "background", "displacement"):
            yield Figure(f"{prefix}.{figure}", f"… {figure}")
    for preset in ("uniform", "weaker"):
        name = f"style leaves the reference's background more than {presets[preset]}"
        path = f"{preset}.background - style.background"
        yield from _under("toolbox.style", (path, "", name, LEAVES))
    name = "style brings the texture more than composition"
    path = "style.texture - composition.texture"
    yield from _under("toolbox.style", (path, "", name), above=0)
    yield from _under(
        "toolbox.attention_map",
        ("inside", "attention map: inside the mask"),
        ("outside", "… outside"),
        ("inside - outside - outside", "", "the map is twice as warm inside the mask"),
        above=0,
    )


EVALUATION = (*_evaluation(),)
"""Of an evaluation as miniature.json has it."""
SETS = (*_variants(), *_several(), *_structure_and_base(), *_toolbox())
"""Of its further experiments, in each set of references."""


def demands(found: Figures) -> Iterator[Demand]:
    """Hold an evaluation against every bound, and the experiments of each of its sets."""
    yield from (figure.demanded(found) for figure in EVALUATION if figure.demand)
    for (before, lower), (weight, higher) in itertools.pairwise(found["image_similarity"].items()):
        yield Demand(f"likeness rises from λ = {before} to {weight}", higher - lower, above=0)
    sets = found.get("findings", {}).get("sets", ())
    if not sets:
        yield Demand("findings", math.nan, above=0)
        return
    for one in sets:
        prefix = f"set {one['seed']}: "
        yield from (figure.demanded(one, prefix) for figure in SETS if figure.demand)
    # Of all sets together: one's shapes lie astray by chance too.
    styles = [one["toolbox"]["style"] for one in sets]
    away = fmean(one["style"]["displacement"] - one["uniform"]["displacement"] for one in styles)
    yield Demand("style leaves the reference's place more than uniform weights", away, ASTRAY)
