"""What else an image prompt does on the miniature: several references, structure, other bases.

Each function draws with the shipped workflows and returns plain figures; `evaluate.py` collects
them over several seeds.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

from torch import Tensor

from miniature import concatenated, files, setup, toolbox
from miniature.classifier import Judge
from miniature.drawing import APART, Drawer
from miniature.metrics import (
    Similarity,
    displacement,
    distance,
    overlap,
    seen,
    shade_error,
    share,
    whiteness_of_outlines,
)
from miniature.pairs import partners, unlike
from miniature.scenes import outlines, render, scenes
from miniature.workflows import SECOND, Api, given

STRUCTURES = 1 << 22  # of the shown stream: what gives structures their edges
LOOKS = ("colour", "background")
Figures = dict[str, Any]


def of_two(api: Api) -> Api:
    """A workflow for three references, with two: the third is not wired in, and where there is a
    latent for each, there are two."""
    made = copy.deepcopy(api)
    for node in made.values():
        node["inputs"].pop("images.image2", None)
        if node["inputs"].get("batch_size") == 3:
            node["inputs"]["batch_size"] = 2
    return made


def several_references(draw: Drawer, judged: Judge, alike: Similarity) -> Figures:
    """Two references that share neither colour nor background, combined in each way."""
    task = draw.task
    second = partners(task.rows)
    pictures = task.pictures, task.pictures[second]
    pairs = [[number, other] for number, other in enumerate(second.tolist())]
    strangers = unlike(task.rows, pairs)
    names = [draw.names[number] for number in second.tolist()]
    found: Figures = {}
    for combine in ("concat", "average"):
        made = draw(f"several_images_{combine}", others=names, change=of_two)[:, 0]
        shown = judged(made)
        found[combine] = {
            f"{kind}_of_either": float(
                (
                    (shown[kind] == getattr(task.rows, kind))
                    | (shown[kind] == getattr(task.rows, kind)[second])
                )
                .float()
                .mean()
            )
            for kind in ("colour", "background")
        } | {
            "image_similarity": [float(alike(made, picture).mean()) for picture in pictures],
            "image_similarity_of_strangers": float(alike(made, task.pictures[strangers]).mean()),
        }
    made = draw("several_images_per_latent", others=names, change=of_two)
    both = [judged(made[:, latent]) for latent in (0, 1)]
    found["per_latent"] = {
        f"{kind}_of_{whose}": sum(
            share(both[latent][kind], getattr(task.rows, kind)[rows])
            for latent, rows in enumerate(order)
        )
        / 2
        for kind in ("colour", "background")
        for whose, order in (
            ("own", (slice(None), second)),
            ("other", (second, slice(None))),
        )
    }
    return found


def structure(draw: Drawer, judged: Judge, without: Tensor) -> Figures:
    """Edges say where and what shape, the reference says the colours, and there is no text; or a
    picture to begin from does. `without`: pictures of the references alone."""
    task = draw.task
    rows = scenes(setup.SHOWN, len(task.rows), STRUCTURES + task.seeds[0])
    names = draw.lay("structure", rows)
    covered = outlines(rows, task.pictures.shape[-1])
    with_edges = draw("controlnet", others=names)[:, 0]
    found = judged(with_edges)
    shown = render(rows, task.pictures.shape[-1])
    from_picture, unprompted = (
        draw("image_to_image", weight, others=names)[:, 0] for weight in (1.0, 0.0)
    )
    started, plain = judged(from_picture), judged(unprompted)
    return {
        "shape_of_edges": share(found["shape"], rows.shape),
        "overlap": overlap(with_edges, covered),
        "overlap_without": overlap(without, covered),
        **{kind: share(found[kind], getattr(task.rows, kind)) for kind in LOOKS},
        "image_to_image": {
            "overlap": overlap(from_picture, covered),
            "overlap_of_start": overlap(shown, covered),
            "overlap_without": overlap(without, covered),
            **{kind: share(started[kind], getattr(task.rows, kind)) for kind in LOOKS},
            **{f"{kind}_without": share(plain[kind], getattr(task.rows, kind)) for kind in LOOKS},
        },
    }


def variants(draw: Drawer, alike: Similarity, base: Tensor, alone: Tensor) -> Figures:
    """How near each kind of adapter comes to what is asked for: under texts that name another shape
    the reference with that shape, with no text the reference. `base` and `alone`: the base
    adapter's; "strangers" has the figures of what another reference asks for."""
    task = draw.task
    side = task.pictures.shape[-1]
    asked = {
        "text_and_image": render(replace(task.rows, shape=task.told), side),
        "image_only": task.pictures,
    }

    def likeness(made: dict[str, Tensor]) -> Figures:
        return {
            name: {
                "image_similarity": float(alike(pictures, asked[name]).mean()),
                "distance": distance(pictures, asked[name]),
                "displacement": displacement(pictures, asked[name]),
                "shade_error": shade_error(pictures, asked[name]),
                "seen": seen(pictures),
            }
            for name, pictures in made.items()
        }

    found = {
        "base": likeness({"text_and_image": base, "image_only": alone}),
        "fine_grained": likeness(
            {name: draw(name, adapter="fine-grained")[:, 0] for name in asked}
        ),
        "strangers": likeness({name: pictures.roll(1, 0) for name, pictures in asked.items()}),
    }
    if files.CONCATENATED in files.manifest()["files"]:
        texts = {"text_and_image": task.texts, "image_only": [""] * len(task.rows)}
        made = {name: concatenated.draw(task, told) for name, told in texts.items()}
        found["concatenated"] = likeness(made)
    return found


def another_base(draw: Drawer, judged: Judge, first: Tensor) -> Figures:
    """The adapter on the fine-tuned base; `first`: what the first one draws of the same."""

    def on_second(api: Api) -> Api:
        return given(api, CheckpointLoaderSimple={"ckpt_name": SECOND})

    made = draw("text_and_image", change=on_second)[:, 0]
    shown, rows = judged(made), draw.task.rows
    return {
        **{kind: share(shown[kind], getattr(rows, kind)) for kind in LOOKS},
        "shape_kept": share(shown["shape"], draw.task.told),
        "whiteness_of_outlines": whiteness_of_outlines(made),
        "whiteness_on_the_first_base": whiteness_of_outlines(first),
    }


def of(draw: Drawer, judged: Judge, alike: Similarity) -> Figures:
    """Every finding for which the miniature has the models."""
    shipped = files.manifest()["files"]
    base, alone = (draw(name, adapter="base")[:, 0] for name in ("text_and_image", "image_only"))
    found = {
        "seed": draw.task.seeds[0] // APART,
        "variants": variants(draw, alike, base, alone),
        "several_references": several_references(draw, judged, alike),
        "toolbox": toolbox.of(draw, judged, alike),
    }
    if files.CONTROL in shipped:
        found["structure"] = structure(draw, judged, alone)
    if files.RESTYLED in shipped:
        found["another_base"] = another_base(draw, judged, base)
    return found
