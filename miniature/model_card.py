"""Write an evaluation's figures into the miniature's card, between its two marks.

python -m miniature.model_card [output/miniature.json [output/2/miniature.json …]]

The first evaluation is of the build that bears the card; those of further builds are laid beside
it, in a table of their own.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from PIL import Image
from torch import Tensor

from miniature import files
from miniature.scenes import KINDS, caption, to_pil
from miniature.thresholds import EVALUATION, SETS, Figure, Figures, demands
from tools.comfyui.install import ROOT

if TYPE_CHECKING:
    from miniature.through_comfyui import Task

BEGIN, END = "<!-- measured -->", "<!-- end -->"
SHOWN = 6  # references on the sheet


class NotComparable(ValueError):
    """Evaluations that cannot lie in one table."""


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Format a table in Markdown."""
    lines = [[*head], *([*row] for row in rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def section(found: Figures, others: Sequence[Figures] = ()) -> str:
    """Write the section of the build that bears the card, and of `others` from other seeds.

    Raises NotComparable if those cannot be held against it.
    """
    asked = [*demands(found)]
    missed = [demand for demand in asked if not demand.met]
    parts = [_follows(found), _likeness(found)]
    if "findings" in found:
        parts.append(_sets(found["findings"]))
    if others:
        parts.append(_builds([found, *others]))
    met = f"{len(asked) - len(missed)} are met"
    count = f"Of the {len(asked)} demands in `miniature/thresholds.py`, {met}."
    lines = [f"- {str(demand).removeprefix('MISS ')}" for demand in missed]
    parts.append(count + (" Missed:\n\n" + "\n".join(lines) if missed else ""))
    return "\n\n".join(parts)


def _follows(found: Figures) -> str:
    head = ["", "λ = 0", "λ = 1 (95 %)", "λ = 1, fine-grained", "λ = 1, concatenated"]
    rows = []
    for kind in ("colour", "background", "texture", "shape"):
        low, high = found["intervals"][kind]
        chance = found["chance"][kind]
        rows.append(
            [
                "shape of the text" if kind == "shape" else f"{kind} of the reference",
                f"{found[f'{kind}_at_zero']:.2f}",
                f"{found['by_weight']['1'][kind]:.2f} ({low:.2f} … {high:.2f})",
                *(f"{found[other][kind]:.2f}" for other in ("fine_grained", "concatenated")),
                f"{chance['mean']:.2f} ({chance['low']:.2f} … {chance['high']:.2f})",
            ]
        )
    return (
        f"Of {found['references']} references that training never saw, each under a text that "
        "names another shape than it shows, drawn by ComfyUI through "
        f"`workflows/api/text_and_image.json` ({found['sampling']['steps']} steps of DDIM, "
        f"guidance {found['sampling']['guidance']:g}; at λ = 0 "
        f"{found['pictures_at_zero'] // found['references']} images each; the concatenated "
        "tokens by diffusers with the same noises, steps and guidance), images show\n\n"
        + table([*head, "by chance (99 %)"], rows)
        + "\n\nBy chance: how often the images at λ = 0 agree with shuffled references. "
        "Tried on drawn images, the classifier is right in "
        f"{min(found['judge_accuracy'].values()):.1%} of the kind that it knows least, "
        f"and in {min(found['judge_accuracy_outlined'].values()):.1%} of those in the second "
        "base's style."
    )


def _likeness(found: Figures) -> str:
    rising = ", ".join(f"{x:.2f} at {w}" for w, x in found["image_similarity"].items())
    alone, described = found["image_only"], found["described"]
    asked = {"base": found, "fine-grained": found["fine_grained"]}
    asked["concatenated"] = found["concatenated"]
    nearer = ", ".join(f"{x['similarity_to_asked']:.2f} {name}" for name, x in asked.items())

    def looks(of: Figures) -> str:
        return ", ".join(f"{kind} {of[kind]:.2f}" for kind in ("colour", "background", "texture"))

    return (
        "Likeness to the reference (cosine of image embeddings of the adapters' own encoder) with "
        f"λ: {rising}; two references have {found['image_similarity_of_strangers']:.2f}. "
        f"To what is asked for, the reference with the text's shape, at λ = 1: {nearer}. "
        f"With no text the image alone gives {looks(alone)}, the reference's own shape "
        f"{alone['shape_of_reference']:.2f} and a likeness of {alone['image_similarity']:.2f}. The "
        f"base alone, told all in words, gets {looks(described)}, shape {described['shape']:.2f}."
    )


def _rows(figures: Iterable[Figure], columns: Sequence[Sequence[Figures]]) -> list[list[str]]:
    """Return the labelled figures' rows; of several sets in a column, the means."""
    return [
        [figure.label, *(figure.text(fmean(map(figure.value, some))) for some in columns)]
        for figure in figures
        if figure.label
    ]


def _sets(findings: Figures) -> str:
    sets = findings["sets"]
    rows = _rows(SETS, [[one] for one in sets])
    return (
        f"Further, with {findings['references']} references and noises of {len(sets)} other sets "
        "(distance in 8-bit levels, displacement of the shape's centre in pixels, error of the "
        "shape's mean colour in 8-bit levels, and likeness: from or to the image that is asked "
        "for, the reference with the text's shape; with no text, the reference itself. Presets of "
        "layer weights are shown with no text and the fine-grained adapter, regions with no text)"
        ":\n\n" + table(["", *(f"set {one['seed']}" for one in sets)], rows)
    )


def _builds(evaluations: Sequence[Figures]) -> str:
    """Lay side by side what each of several trainings gives, and the means of its sets."""
    _check_comparable(evaluations)
    made = [one["made"] for one in evaluations]
    sets = [one["findings"]["sets"] for one in evaluations]
    head = ["", *(f"seed {one['seed']}" for one in made)]
    own = _rows(EVALUATION, [[one] for one in evaluations])
    rising = [
        ", ".join(f"{x:.2f}" for x in one["image_similarity"].values()) for one in evaluations
    ]
    own.append(["likeness to the reference as λ rises", *rising])
    means = _rows(SETS, sets)
    asked = [[*demands(one)] for one in evaluations]
    met = [f"{sum(demand.met for demand in some)} of {len(some)}" for some in asked]
    means.append(["demands of `miniature/thresholds.py` met", *met])
    times = "; ".join(f"seed {x['seed']} in {x['minutes']} minutes ({x['on']})" for x in made)
    return (
        f"The same recipe from {len(evaluations)} seeds, every model trained anew: {times}. Of the "
        f"{evaluations[0]['references']} references:\n\n{table(head, own)}\n\n"
        f"and, as means over the {len(sets[0])} further sets of each:\n\n{table(head, means)}"
    )


def _check_comparable(evaluations: Sequence[Figures]) -> None:
    for one in evaluations:
        for needed in ("made", "findings"):
            if not one.get(needed):
                raise NotComparable(
                    f"an evaluation has no '{needed}': measure that build with nox -s evaluate"
                )
    recipes = {one["made"]["recipe"] for one in evaluations}
    if len(recipes) > 1:
        named = ", ".join(sorted(recipes))
        raise NotComparable(
            f"found builds of the recipes {named}; expected one recipe, several seeds"
        )
    seeds = [one["made"]["seed"] for one in evaluations]
    if len({*seeds}) < len(seeds):
        raise NotComparable(
            f"found builds of the seeds {seeds}; expected one evaluation of each seed"
        )
    first, *others = (_asked(one) for one in evaluations)
    for other in others:
        if other != first:
            raise NotComparable(
                f"found evaluations of {first} and of {other}; expected both to be asked for the "
                "same: measure one again with the other's options"
            )


def _asked(found: Figures) -> Figures:
    """Return what an evaluation was asked for, so that others can be held against it."""
    findings = found["findings"]
    asked = {name: found[name] for name in ("references", "seed", "sampling")}
    sets = [one["seed"] for one in findings["sets"]]
    return {**asked, "findings": findings["references"], "sets": sets}


def plot(found: Figures, path: Path) -> None:
    """Draw what follows the reference as λ grows, and how like the images are to it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (shares, alike) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    weights = [float(weight) for weight in found["by_weight"]]
    for kind in KINDS:
        values = [row[kind] for row in found["by_weight"].values()]
        label = "shape of the text" if kind == "shape" else f"{kind} of the reference"
        (line,) = shares.plot(weights, values, marker="o", label=label)
        shares.axhline(found["chance"][kind]["mean"], color=line.get_color(), ls=":", lw=1)
    shares.set(xlabel="λ", ylabel="share of images", ylim=(0, 1.02))
    shares.set_title(f"What follows ({found['references']} references; dotted: chance)")
    shares.legend(loc="center right", fontsize=8)
    similarity = [*found["image_similarity"].values()]
    alike.plot(weights, similarity, marker="o", label="base, with text")
    alike.plot([1], [found["fine_grained"]["image_similarity"]], "s", label="fine-grained")
    alike.plot([1], [found["image_only"]["image_similarity"]], "^", label="base, no text")
    alike.axhline(found["image_similarity_of_strangers"], color="grey", ls=":", lw=1)
    alike.set(xlabel="λ", ylabel="cosine of image embeddings")
    alike.set_title("Likeness to the reference (dotted: two references)")
    alike.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def references_sheet(drawn: Mapping[str, Tensor], task: Task) -> Image.Image:
    """Draw some references, and beside each its images as λ grows."""
    from tools.demo import draw_sheet
    from tools.demo_request import DemoRow, Render

    columns = [name for name in drawn if name.startswith("text ")]
    rows, images = [], []
    for number in range(min(SHOWN, len(task.rows))):
        text = caption(int(task.shapes[number]))
        renders = tuple(Render(float(name.split()[1]), text) for name in columns)
        rows.append(DemoRow(f'"{text}"', "", to_pil(task.images[number]), renders))
        images.append([to_pil(drawn[name][number, 0]) for name in columns])
    return draw_sheet(rows, images)


def write(found: Figures, card: Path, others: Sequence[Figures] = ()) -> None:
    """Put the section into the file `card`. Raises ValueError if it lacks the marks."""
    text = card.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"{card} needs one line {BEGIN!r} and after it one line {END!r}.")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    card.write_text(
        f"{before}{BEGIN}\n\n{section(found, others)}\n\n{END}{after}", encoding="utf-8"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    default = ROOT / "output" / "miniature.json"
    parser.add_argument("evaluation", nargs="*", type=Path, default=[default])
    paths = parser.parse_args().evaluation
    for path in paths:
        if not path.is_file():
            parser.error(f"{path} is not there: nox -s evaluate writes one")
    evaluations: list[dict[str, Any]] = [json.loads(path.read_text("utf-8")) for path in paths]
    if evaluations[0]["build"] != files.checksums():
        parser.error(f"{paths[0]} measured other files than those in {files.FOLDER}")
    try:
        write(evaluations[0], files.FOLDER / "README.md", evaluations[1:])
    except NotComparable as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
