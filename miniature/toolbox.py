"""What regions, layer weights and the attention map do on the miniature."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from miniature.classifier import Judge
from miniature.drawing import Drawer, as_tensor
from miniature.metrics import Similarity, displacement, overlap, share
from miniature.pairs import partners
from miniature.scenes import KINDS, outlines
from miniature.workflows import SIDE, Api, given
from tools import reference_images

Figures = dict[str, Any]


def mask() -> Tensor:
    """The workflows' mask, a disc, as booleans `(SIDE, SIDE)`."""
    drawn = reference_images.draw("mask.png").resize((SIDE, SIDE))
    return as_tensor(drawn)[0] > 0.5


def regions(draw: Drawer, judged: Judge) -> Figures:
    """One reference within the disc, where shapes are, and another everywhere else, with no text:
    how often the shape has the colour of the one, and the background is that of the other."""
    inner, second = draw.task.rows, partners(draw.task.rows)
    names = [draw.names[number] for number in second.tolist()]
    seen = judged(draw("regions", others=names)[:, 0])
    outer = inner[second]
    return {
        "colour_of_inner": share(seen["colour"], inner.colour),
        "colour_of_outer": share(seen["colour"], outer.colour),
        "background_of_inner": share(seen["background"], inner.background),
        "background_of_outer": share(seen["background"], outer.background),
    }


def style(draw: Drawer, judged: Judge, alike: Similarity) -> Figures:
    """With uniform weights, with half of them and with each preset, a fine-grained adapter and no
    text, so that all that is shown is either the reference's or by chance: what of the shape's look
    comes through (colour, texture), and what else of the picture (the shape itself, its place, the
    background behind it)."""
    task = draw.task
    found: Figures = {}
    for name, preset, weight in (
        ("uniform", "uniform", 1.0),
        ("weaker", "uniform", 0.5),
        ("style", "style", 1.0),
        ("composition", "composition", 1.0),
    ):

        def chosen(api: Api, preset: str = preset) -> Api:
            return given(api, IPA_LayerWeights={"preset": preset})

        texts = [""] * len(task.rows)
        made = draw("style_transfer", weight, "fine-grained", texts=texts, change=chosen)[:, 0]
        seen = judged(made)
        found[name] = {
            **{kind: share(seen[kind], getattr(task.rows, kind)) for kind in KINDS},
            "displacement": displacement(made, task.pictures),
            "overlap": overlap(made, outlines(task.rows, SIDE)),
            "image_similarity": float(alike(made, task.pictures).mean()),
        }
    return found


def heat(draw: Drawer) -> Figures:
    """The attention map of an image prompt that is let act within the disc alone: its mean inside
    and outside, and the overlap of the disc with what is warmer than half of the warmest."""

    def map_alone(api: Api) -> Api:
        made = copy.deepcopy(api)
        (node,) = (i for i, n in made.items() if n["class_type"] == "IPA_AttentionMap")
        made["map"] = {"class_type": "MaskToImage", "inputs": {"mask": [node, 1]}}
        return given(made, SaveImage={"images": ["map", 0]})

    maps = draw("attention_map", change=map_alone)[:, 0, 0]
    disc = mask()
    warm = maps > maps.amax((1, 2), keepdim=True) / 2
    union = (warm | disc).sum((1, 2))
    return {
        "inside": float(maps[:, disc].mean()),
        "outside": float(maps[:, ~disc].mean()),
        "overlap": float(((warm & disc).sum((1, 2)) / union).mean()),
    }


def of(draw: Drawer, judged: Judge, alike: Similarity) -> Figures:
    with torch.inference_mode():
        return {
            "regions": regions(draw, judged),
            "style": style(draw, judged, alike),
            "attention_map": heat(draw),
        }
