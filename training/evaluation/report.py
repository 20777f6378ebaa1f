"""From scores to results.json, a table in Markdown, and curves over λ."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from ip_adapter_core.files.atomic import atomic

from .scores import IMAGE_ONLY, WITH_TEXT, Condition, Found, Score, replace_text

SOURCE = "arXiv 2308.06721, Table 1"
# method, trained parameters in millions, CLIP-T, CLIP-I
PUBLISHED = (
    ("Open unCLIP", 893, 0.608, 0.858),
    ("SD unCLIP", 870, 0.584, 0.810),
    ("SD Image Variations", 860, 0.548, 0.760),
    ("ControlNet Shuffle", 361, 0.421, 0.616),
    ("Uni-ControlNet (global)", 47, 0.506, 0.736),
    ("T2I-Adapter (style)", 39, 0.485, 0.648),
    ("IP-Adapter", 22, 0.588, 0.828),
)


@dataclass(frozen=True)
class Subject:
    """An adapter that is measured. `digest` identifies its file, `name` is for people."""

    name: str
    digest: str
    variant: str
    parameters: int


def conditions(digest: str, weights: Sequence[float]) -> list[Condition]:
    """Image only at λ = 1, as in Table 1, then with text at each of `weights`."""
    texts = [Condition(digest, WITH_TEXT, float(weight)) for weight in sorted({*weights})]
    return [Condition(digest, IMAGE_ONLY, 1.0), *texts]


def results(
    protocol: Mapping[str, Any],
    subjects: Sequence[Subject],
    weights: Sequence[float],
    rows: range,
    names: Mapping[int, str],
    found: Found,
) -> dict[str, Any]:
    """Means over `rows` for every adapter and condition.

    The same numbers whatever the order in which the samples were measured.
    """
    return {
        "protocol": dict(protocol),
        "pictures": len(rows) - sum(row in rows for row in found.broken),
        "broken": {names[row]: why for row, why in sorted(found.broken.items()) if row in rows},
        "adapters": [_measured(subject, weights, rows, found) for subject in subjects],
        "published": {
            "source": SOURCE,
            "rows": [
                {"method": name, "parameters": 1_000_000 * size, "clip_t": text, "clip_i": image}
                for name, size, text, image in PUBLISHED
            ],
        },
    }


def _measured(
    subject: Subject, weights: Sequence[float], rows: range, found: Found
) -> dict[str, Any]:
    alone, *texts = (_mean(x, rows, found) for x in conditions(subject.digest, weights))
    return {
        "name": subject.name,
        "sha256": subject.digest,
        "variant": subject.variant,
        "parameters": subject.parameters,
        IMAGE_ONLY: alone,
        WITH_TEXT: texts,
    }


def _mean(condition: Condition, rows: range, found: Found) -> dict[str, Any]:
    """Return means, and standard errors over images (samples of one are not independent)."""
    by_row: dict[int, list[Score]] = {}
    for key in sorted(k for k in found.scores if k.condition == condition and k.row in rows):
        by_row.setdefault(key.row, []).append(found.scores[key])
    samples = sum(map(len, by_row.values()))
    out: dict[str, Any] = {"weight": condition.weight, "samples": samples}
    for name in Score._fields:
        means = [fmean(getattr(score, name) for score in part) for part in by_row.values()]
        out[name] = fmean(means) if means else None
        if len(means) > 1:
            out[f"{name}_error"] = stdev(means) / math.sqrt(len(means))
    return out


def table(found: Mapping[str, Any]) -> str:
    """Markdown: what was measured here, then what the paper published."""
    protocol = found["protocol"]
    lines = [
        f"Measured here: {found['pictures']} images, {protocol['num_images_per_prompt']} samples "
        f"each, {protocol['clip_model']}; DDIM, {protocol['num_inference_steps']} steps, guidance "
        f"{protocol['guidance_scale']:g}.",
        "",
        "| adapter | parameters | prompt | weight | CLIP-T | CLIP-I |",
        "|---|---|---|---|---|---|",
    ]
    alone = IMAGE_ONLY.replace("_", " ")
    for adapter in found["adapters"]:
        head = f"| {_cell(adapter['name'])} | {adapter['parameters'] / 1e6:.1f}M "
        for entry in (adapter[IMAGE_ONLY], *adapter[WITH_TEXT]):
            prompt = alone if entry is adapter[IMAGE_ONLY] else WITH_TEXT.replace("_", " ")
            scores = f"{_score(entry, 'clip_t')} | {_score(entry, 'clip_i')}"
            lines.append(f"{head}| {prompt} | {entry['weight']:g} | {scores} |")
    lines += [
        "",
        f"Published, not measured here ({SOURCE}; COCO val2017, 5000 images, 4 samples each, "
        "CLIP ViT-L/14):",
        "",
        "| method (published) | parameters | prompt | CLIP-T | CLIP-I |",
        "|---|---|---|---|---|",
    ]
    for name, size, text, image in PUBLISHED:
        lines.append(f"| {name} | {size}M | {alone} | {text:.3f} | {image:.3f} |")
    if found["broken"]:
        named = ", ".join(map(_cell, found["broken"]))
        lines += ["", f"Left out, their images could not be opened: {named}."]
    return "\n".join(lines) + "\n"


def _score(entry: Mapping[str, Any], name: str) -> str:
    if entry[name] is None:
        return "–"
    error = entry.get(f"{name}_error")
    return f"{entry[name]:.3f}" + (f" ± {error:.3f}" if error is not None else "")


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def plot(found: Mapping[str, Any], path: Path) -> None:
    """λ against CLIP-I and CLIP-T with text; the image-only scores as dashed lines."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2)
    for axis, name, label in zip(axes, ("clip_i", "clip_t"), ("CLIP-I", "CLIP-T"), strict=True):
        for number, adapter in enumerate(found["adapters"]):
            colour = f"C{number % 10}"
            texts = [entry for entry in adapter[WITH_TEXT] if entry[name] is not None]
            axis.errorbar(
                [entry["weight"] for entry in texts],
                [entry[name] for entry in texts],
                [entry.get(f"{name}_error", 0.0) for entry in texts],
                marker="o",
                capsize=3,
                color=colour,
                label=adapter["name"],
            )
            alone = adapter[IMAGE_ONLY][name]
            if alone is not None:
                axis.axhline(alone, color=colour, linestyle="--", linewidth=1)
        axis.set(xlabel="weight λ", ylabel=label)
        axis.grid(alpha=0.3)
    handles, labels = axes[0].get_legend_handles_labels()
    title = "with text; dashed: image only, λ = 1"
    figure.legend(handles, labels, title=title, loc="outside lower center", ncols=2)
    with atomic(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")


def write(found: Mapping[str, Any], folder: Path) -> None:
    """results.json, table.md and weights.png."""
    text = json.dumps(found, indent=1, ensure_ascii=False, allow_nan=False)
    replace_text(folder / "results.json", text + "\n")
    replace_text(folder / "table.md", table(found))
    plot(found, folder / "weights.png")
