"""Write an evaluation's figures into the miniature's card, between its two marks.

python -m miniature.model_card [output/miniature.json [output/2/miniature.json …]]

The first evaluation is of the build that bears the card; those of further builds are laid beside
it, in a table of their own.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from miniature import builds, files
from miniature import thresholds as must
from miniature.lines import Figures, at, figure, shared, table
from tools.comfyui.install import ROOT

BEGIN, END = "<!-- measured -->", "<!-- end -->"
KINDS = {
    "colour": "colour of the reference",
    "background": "background of the reference",
    "texture": "texture of the reference",
    "shape": "shape of the text",
}


def measured(found: Figures, others: Sequence[Figures] = ()) -> str:
    """The card's section, in Markdown; `others`: evaluations of builds from other seeds. Raises
    NotAlike for some that cannot be held against `found`."""
    asked = [*must.demands(found)]
    missed = [demand for demand in asked if not demand.met]
    parts = [_follows(found), _likeness(found)]
    if "findings" in found:
        parts.append(_findings(found["findings"]))
    if others:
        parts.append(builds.beside([found, *others]))
    count = f"{len(asked) - len(missed)} are met"
    met = f"Of the {len(asked)} demands in `miniature/thresholds.py`, {count}."
    lines = [f"- {str(demand).removeprefix('MISS ')}" for demand in missed]
    parts.append(met + (" Missed:\n\n" + "\n".join(lines) if missed else ""))
    return "\n\n".join(parts)


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
        + table([*head, "by chance (99 %)"], rows)
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


def _findings(findings: Figures) -> str:
    sets = findings["sets"]
    rows = [[name, *(figure(at(one, path), path) for one in sets)] for name, path in shared(sets)]
    return (
        f"Further, with {findings['references']} references and noises of {len(sets)} other sets "
        "(distance in 8-bit levels, displacement of the shape's centre in pixels, error of the "
        "shape's mean colour in 8-bit levels, and likeness: from or to the picture that is asked "
        "for, the reference with the text's shape; with no text, the reference itself. Presets of "
        "layer weights are shown with no text and the fine-grained adapter, regions with no text)"
        ":\n\n" + table(["", *(f"set {one['seed']}" for one in sets)], rows)
    )


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
    except builds.NotAlike as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
