"""Write an evaluation's figures into the miniature's card, between its two marks.

python -m tools.world.card [output/miniature.json [output/2/miniature.json …]]

The first evaluation is of the build that bears the card; those of further builds are laid beside
it, in a table of their own.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from tools.host import ROOT
from tools.world import files, must

BEGIN, END = "<!-- measured -->", "<!-- end -->"
KINDS = {
    "colour": "colour of the reference",
    "background": "background of the reference",
    "texture": "texture of the reference",
    "shape": "shape of the text",
}
Figures = Mapping[str, Any]


def at(found: Figures, path: str) -> Any:
    """What lies at "a.b.c"."""
    for key in path.split("."):
        found = found[key]
    return found


def measured(found: Figures, others: Sequence[Figures] = ()) -> str:
    """The card's section, in Markdown; `others`: evaluations of builds from other seeds. Raises
    NotAlike for some that cannot be held against `found`."""
    asked = [*must.demands(found)]
    missed = [demand for demand in asked if not demand.met]
    parts = [_follows(found), _likeness(found)]
    if "findings" in found:
        parts.append(_findings(found["findings"]))
    if others:
        parts.append(_builds([found, *others]))
    met = (
        f"Of the {len(asked)} demands in `tools/world/must.py`, {len(asked) - len(missed)} are met."
    )
    lines = [f"- {str(demand).removeprefix('MISS ')}" for demand in missed]
    parts.append(met + (" Missed:\n\n" + "\n".join(lines) if missed else ""))
    return "\n\n".join(parts)


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [[*head], *([*row] for row in rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _follows(found: Figures) -> str:
    beside = [name for name in ("fine_grained", "concatenated") if name in found]
    head = ["", "λ = 0", "λ = 1 (95 %)"]
    head += [f"λ = 1, {name.replace('_', '-')}" for name in beside]
    rows = []
    for kind, name in KINDS.items():
        full = found["by_weight"]["1"][kind]
        low, high = found["intervals"][kind]
        chance = found["chance"][kind]
        rows.append(
            [
                name,
                f"{found[f'{kind}_at_zero']:.2f}",
                f"{full:.2f} ({low:.2f} … {high:.2f})",
                *(f"{found[other][kind]:.2f}" for other in beside),
                f"{chance['mean']:.2f} ({chance['low']:.2f} … {chance['high']:.2f})",
            ]
        )
    return (
        f"Of {found['references']} references that training never saw, each under a text that "
        "names another shape than it shows, drawn by ComfyUI through "
        f"`workflows/api/text_and_image.json` ({found['sampling']['steps']} steps of DDIM, "
        f"guidance {found['sampling']['guidance']:g}; at λ = 0 "
        f"{found['pictures_at_zero'] // found['references']} pictures each; the concatenated "
        "tokens by diffusers with the same noises, steps and guidance), pictures show\n\n"
        + _table([*head, "by chance (99 %)"], rows)
        + "\n\nBy chance: how often the pictures at λ = 0 agree with shuffled references. "
        "Tried on drawn pictures, the judge is right in "
        f"{min(found['judge_accuracy'].values()):.1%} of the kind that it knows least, "
        f"and in {min(found['judge_accuracy_outlined'].values()):.1%} of those in the second "
        "base's style."
    )


def _likeness(found: Figures) -> str:
    rising = ", ".join(f"{x:.2f} at {w}" for w, x in found["image_similarity"].items())
    alone, told = found["image_only"], found["described"]
    asked = {"base": found, "fine-grained": found["fine_grained"]}
    if "concatenated" in found:
        asked["concatenated"] = found["concatenated"]
    nearer = ", ".join(f"{x['similarity_to_asked']:.2f} {name}" for name, x in asked.items())
    return (
        "Likeness to the reference (cosine of image embeddings of the adapters' own encoder) with "
        f"λ: {rising}; two references have {found['image_similarity_of_strangers']:.2f}. "
        f"To what is asked for, the reference with the text's shape, at λ = 1: {nearer}. "
        f"With no text the image alone gives colour {alone['colour']:.2f}, background "
        f"{alone['background']:.2f}, texture {alone['texture']:.2f}, the reference's own shape "
        f"{alone['shape_of_reference']:.2f} and a likeness of {alone['image_similarity']:.2f}. The "
        f"base alone, told all in words, gets colour {told['colour']:.2f}, background "
        f"{told['background']:.2f}, texture {told['texture']:.2f}, shape {told['shape']:.2f}."
    )


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


def _has(found: Figures, path: str) -> bool:
    first, _, rest = path.partition(".")
    return first in found and (not rest or _has(found[first], rest))


def _findings(findings: Figures) -> str:
    sets = findings["sets"]
    rows = [[name, *(_figure(at(one, path), path) for one in sets)] for name, path in _shared(sets)]
    return (
        f"Further, with {findings['references']} references and noises of {len(sets)} other sets "
        "(distance in 8-bit levels, displacement of the shape's centre in pixels, error of the "
        "shape's mean colour in 8-bit levels, and likeness: from or to the picture that is asked "
        "for, the reference with the text's shape; with no text, the reference itself. Presets of "
        "layer weights are shown with no text and the fine-grained adapter, regions with no text)"
        ":\n\n" + _table(["", *(f"set {one['seed']}" for one in sets)], rows)
    )


BUILDS = (  # name, where it lies
    ("colour of the reference at λ = 1", "colour_follows"),
    ("… at λ = 0", "colour_at_zero"),
    ("background of the reference at λ = 1", "background_follows"),
    ("… at λ = 0", "background_at_zero"),
    ("texture of the reference at λ = 1", "texture_follows"),
    ("… at λ = 0", "texture_at_zero"),
    ("shape of the text at λ = 1", "shape_kept"),
    ("… fine-grained", "fine_grained.shape"),
    ("… concatenated", "concatenated.shape"),
    ("with no text: colour of the reference", "image_only.colour"),
    ("… background", "image_only.background"),
    ("… texture", "image_only.texture"),
    ("… shape", "image_only.shape_of_reference"),
    ("likeness to what is asked at λ = 1, base adapter", "similarity_to_asked"),
    ("… fine-grained", "fine_grained.similarity_to_asked"),
    ("… concatenated", "concatenated.similarity_to_asked"),
)


class NotAlike(ValueError):
    """Evaluations that cannot lie in one table."""


def _builds(evaluations: Sequence[Figures]) -> str:
    """What each of several trainings gives: its own evaluation, and the means of its sets. Raises
    NotAlike for evaluations of one build, of several recipes, or of other references."""
    for one in evaluations:
        if not one.get("made") or "findings" not in one:
            lacks = "made" if not one.get("made") else "findings"
            raise NotAlike(
                f"an evaluation has no '{lacks}': measure that build with nox -s evaluate"
            )
    made = [one["made"] for one in evaluations]
    seeds = [one["seed"] for one in made]
    if len(recipes := {one["recipe"] for one in made}) > 1:
        told = ", ".join(sorted(recipes))
        raise NotAlike(f"found builds of the recipes {told}; expected one recipe, several seeds")
    if len({*seeds}) < len(seeds):
        raise NotAlike(f"found builds of the seeds {seeds}; expected one evaluation of each seed")
    for one in evaluations[1:]:
        if (ours := _asked(evaluations[0])) != (theirs := _asked(one)):
            raise NotAlike(
                f"found evaluations of {ours} and of {theirs}; expected both to be asked for the "
                "same: measure one again with the other's options"
            )
    sets = [one["findings"]["sets"] for one in evaluations]
    head = ["", *(f"seed {one['seed']}" for one in made)]
    own = [
        [name, *(_figure(at(one, path), path) for one in evaluations)]
        for name, path in BUILDS
        if not path.startswith("concatenated.") or all("concatenated" in x for x in evaluations)
    ]
    rising = [
        ", ".join(f"{x:.2f}" for x in one["image_similarity"].values()) for one in evaluations
    ]
    own.append(["likeness to the reference as λ rises", *rising])
    means = [
        [name, *(_figure(fmean(at(one, path) for one in some), path) for some in sets)]
        for name, path in _shared(itertools.chain(*sets))
    ]
    asked = [[*must.demands(one)] for one in evaluations]
    met = [f"{sum(demand.met for demand in some)} of {len(some)}" for some in asked]
    means.append(["demands of `tools/world/must.py` met", *met])
    times = "; ".join(f"seed {x['seed']} in {x['minutes']} minutes ({x['on']})" for x in made)
    return (
        f"The same recipe from {len(evaluations)} seeds, every model trained anew: {times}. Of the "
        f"{evaluations[0]['references']} references:\n\n{_table(head, own)}\n\n"
        f"and, as means over the {len(sets[0])} further sets of each:\n\n{_table(head, means)}"
    )


def _asked(found: Figures) -> Figures:
    """What an evaluation was asked for, so that others can be held against it."""
    findings = found["findings"]
    asked = {name: found[name] for name in ("references", "seed", "sampling")}
    sets = [one["seed"] for one in findings["sets"]]
    return {**asked, "findings": findings["references"], "sets": sets}


def _figure(value: float, path: str) -> str:
    """With as many digits as it is worth."""
    digits = 1 if path.endswith(("distance", "displacement", "shade_error")) else 2
    return f"{value:.{digits}f}"


def _shared(sets: Iterable[Figures]) -> list[tuple[str, str]]:
    """The lines of FINDINGS whose models all of the sets have."""
    lacking = {part for one in sets for part in OPTIONAL if not _has(one, part)}
    return [line for line in FINDINGS if not line[1].startswith(tuple(f"{x}." for x in lacking))]


def write(found: Figures, card: Path, others: Sequence[Figures] = ()) -> None:
    """Put the section into the file `card`. Raises ValueError where it lacks the marks, NotAlike as
    `measured` does."""
    text = card.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"{card} needs one line {BEGIN!r} and after it one line {END!r}.")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    card.write_text(
        f"{before}{BEGIN}\n\n{measured(found, others)}\n\n{END}{after}", encoding="utf-8"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    default = ROOT / "output" / "miniature.json"
    parser.add_argument("evaluation", nargs="*", type=Path, default=[default])
    paths = parser.parse_args().evaluation
    for path in paths:
        if not path.is_file():
            parser.error(f"{path} is not there: nox -s evaluate writes one")
    found, *others = (json.loads(path.read_text(encoding="utf-8")) for path in paths)
    if found["build"] != files.checksums():
        parser.error(f"{paths[0]} measured other files than those in {files.FOLDER}")
    try:
        write(found, files.FOLDER / "README.md", others)
    except NotAlike as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
