"""Lines of the miniature's card: what each is called, where an evaluation has it, and tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

Figures = Mapping[str, Any]


def at(found: Figures, path: str) -> Any:
    """What lies at "a.b.c"."""
    for key in path.split("."):
        found = found[key]
    return found


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [[*head], *([*row] for row in rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


FINDINGS = (  # name, where it lies
    ("distance from what is asked, base adapter", "variants.base.text_and_image.distance"),
    ("… fine-grained", "variants.fine_grained.text_and_image.distance"),
    ("… concatenated", "variants.concatenated.text_and_image.distance"),
    ("… a stranger's", "variants.strangers.text_and_image.distance"),
    ("displacement, base adapter", "variants.base.text_and_image.displacement"),
    ("… fine-grained", "variants.fine_grained.text_and_image.displacement"),
    ("… concatenated", "variants.concatenated.text_and_image.displacement"),
    ("… a stranger's", "variants.strangers.text_and_image.displacement"),
    ("error of the shade, base adapter", "variants.base.text_and_image.shade_error"),
    ("… fine-grained", "variants.fine_grained.text_and_image.shade_error"),
    ("… concatenated", "variants.concatenated.text_and_image.shade_error"),
    ("… a stranger's", "variants.strangers.text_and_image.shade_error"),
    ("distance with no text, base adapter", "variants.base.image_only.distance"),
    ("… fine-grained", "variants.fine_grained.image_only.distance"),
    ("… concatenated", "variants.concatenated.image_only.distance"),
    ("displacement with no text, base adapter", "variants.base.image_only.displacement"),
    ("… fine-grained", "variants.fine_grained.image_only.displacement"),
    ("… concatenated", "variants.concatenated.image_only.displacement"),
    ("error of the shade with no text, base adapter", "variants.base.image_only.shade_error"),
    ("… fine-grained", "variants.fine_grained.image_only.shade_error"),
    ("… concatenated", "variants.concatenated.image_only.shade_error"),
    ("likeness, base adapter", "variants.base.text_and_image.image_similarity"),
    ("… fine-grained", "variants.fine_grained.text_and_image.image_similarity"),
    ("… concatenated", "variants.concatenated.text_and_image.image_similarity"),
    ("likeness with no text, base adapter", "variants.base.image_only.image_similarity"),
    ("… fine-grained", "variants.fine_grained.image_only.image_similarity"),
    ("… concatenated", "variants.concatenated.image_only.image_similarity"),
    ("two references, concat: colour of either", "several_references.concat.colour_of_either"),
    ("… background of either", "several_references.concat.background_of_either"),
    ("average: colour of either", "several_references.average.colour_of_either"),
    ("… likeness to a stranger", "several_references.average.image_similarity_of_strangers"),
    ("one per latent: colour of its own", "several_references.per_latent.colour_of_own"),
    ("… colour of the other", "several_references.per_latent.colour_of_other"),
    ("edges and image: overlap of the shapes", "structure.overlap"),
    ("… without the edges", "structure.overlap_without"),
    ("… colour of the image", "structure.colour"),
    ("… background of the image", "structure.background"),
    ("image to image: overlap with the start", "structure.image_to_image.overlap"),
    ("… with none", "structure.image_to_image.overlap_without"),
    ("… colour of the image", "structure.image_to_image.colour"),
    ("… without the prompt", "structure.image_to_image.colour_without"),
    ("second base: colour", "another_base.colour"),
    ("… background", "another_base.background"),
    ("… shape of the text", "another_base.shape_kept"),
    ("… whiteness of its outlines", "another_base.whiteness_of_outlines"),
    ("… on the first base", "another_base.whiteness_on_the_first_base"),
    ("two regions: colour of the one inside", "toolbox.regions.colour_of_inner"),
    ("… of the one outside", "toolbox.regions.colour_of_outer"),
    ("… background of the one outside", "toolbox.regions.background_of_outer"),
    ("style preset: colour", "toolbox.style.style.colour"),
    ("… texture", "toolbox.style.style.texture"),
    ("… shape", "toolbox.style.style.shape"),
    ("… background", "toolbox.style.style.background"),
    ("… displacement", "toolbox.style.style.displacement"),
    ("uniform weights: colour", "toolbox.style.uniform.colour"),
    ("… texture", "toolbox.style.uniform.texture"),
    ("… shape", "toolbox.style.uniform.shape"),
    ("… background", "toolbox.style.uniform.background"),
    ("… displacement", "toolbox.style.uniform.displacement"),
    ("half of them: colour", "toolbox.style.weaker.colour"),
    ("… texture", "toolbox.style.weaker.texture"),
    ("… shape", "toolbox.style.weaker.shape"),
    ("… background", "toolbox.style.weaker.background"),
    ("… displacement", "toolbox.style.weaker.displacement"),
    ("composition preset: colour", "toolbox.style.composition.colour"),
    ("… texture", "toolbox.style.composition.texture"),
    ("… shape", "toolbox.style.composition.shape"),
    ("… background", "toolbox.style.composition.background"),
    ("… displacement", "toolbox.style.composition.displacement"),
    ("attention map: inside the mask", "toolbox.attention_map.inside"),
    ("… outside", "toolbox.attention_map.outside"),
)
OPTIONAL = ("variants.concatenated", "structure", "another_base")  # need further models


def has(found: Figures, path: str) -> bool:
    first, _, rest = path.partition(".")
    return first in found and (not rest or has(found[first], rest))


def figure(value: float, path: str) -> str:
    """With as many digits as it is worth."""
    digits = 1 if path.endswith(("distance", "displacement", "shade_error")) else 2
    return f"{value:.{digits}f}"


def shared(sets: Iterable[Figures]) -> list[tuple[str, str]]:
    """The lines of FINDINGS whose models all of the sets have."""
    lacking = {part for one in sets for part in OPTIONAL if not has(one, part)}
    return [line for line in FINDINGS if not line[1].startswith(tuple(f"{x}." for x in lacking))]
