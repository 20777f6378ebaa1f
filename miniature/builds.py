"""Several builds of the miniature side by side: one recipe, from several seeds."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from statistics import fmean

from miniature import thresholds as must
from miniature.lines import Figures, at, figure, shared, table

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


def beside(evaluations: Sequence[Figures]) -> str:
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
        [name, *(figure(at(one, path), path) for one in evaluations)]
        for name, path in BUILDS
        if not path.startswith("concatenated.") or all("concatenated" in x for x in evaluations)
    ]
    rising = [
        ", ".join(f"{x:.2f}" for x in one["image_similarity"].values()) for one in evaluations
    ]
    own.append(["likeness to the reference as λ rises", *rising])
    means = [
        [name, *(figure(fmean(at(one, path) for one in some), path) for some in sets)]
        for name, path in shared(itertools.chain(*sets))
    ]
    asked = [[*must.demands(one)] for one in evaluations]
    met = [f"{sum(demand.met for demand in some)} of {len(some)}" for some in asked]
    means.append(["demands of `miniature/thresholds.py` met", *met])
    times = "; ".join(f"seed {x['seed']} in {x['minutes']} minutes ({x['on']})" for x in made)
    return (
        f"The same recipe from {len(evaluations)} seeds, every model trained anew: {times}. Of the "
        f"{evaluations[0]['references']} references:\n\n{table(head, own)}\n\n"
        f"and, as means over the {len(sets[0])} further sets of each:\n\n{table(head, means)}"
    )


def _asked(found: Figures) -> Figures:
    """What an evaluation was asked for, so that others can be held against it."""
    findings = found["findings"]
    asked = {name: found[name] for name in ("references", "seed", "sampling")}
    sets = [one["seed"] for one in findings["sets"]]
    return {**asked, "findings": findings["references"], "sets": sets}
