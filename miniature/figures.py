"""The figures of an evaluation: what follows the reference as λ grows, and what that looks like."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image
from torch import Tensor

from miniature.scenes import KINDS, caption
from miniature.setup import as_image
from tools.demo import DemoRow, Render, draw_sheet

if TYPE_CHECKING:
    from miniature.drawing import Task

SHOWN = 6  # references on the sheet


def draw(
    found: Mapping[str, Any], drawn: Mapping[str, Tensor], task: Task, folder: Path
) -> list[Path]:
    """Write miniature-curves.png and miniature-sheet.png into `folder`; returns their paths."""
    curves, sheet = folder / "miniature-curves.png", folder / "miniature-sheet.png"
    _curves(found, curves)
    _sheet(drawn, task).save(sheet)
    return [curves, sheet]


def _curves(found: Mapping[str, Any], path: Path) -> None:
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
    shares.set(xlabel="λ", ylabel="share of pictures", ylim=(0, 1.02))
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


def _sheet(drawn: Mapping[str, Tensor], task: Task) -> Image.Image:
    columns = [name for name in drawn if name.startswith("text ")]
    rows, pictures = [], []
    for number in range(min(SHOWN, len(task.rows))):
        text = caption(int(task.told[number]))
        shots = tuple(Render(float(name.split()[1]), text) for name in columns)
        reference = as_image(task.pictures[number])
        rows.append(DemoRow(f'"{text}"', "", reference, shots))
        pictures.append([as_image(drawn[name][number, 0]) for name in columns])
    return draw_sheet(rows, pictures)
