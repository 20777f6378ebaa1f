"""What else an image prompt does on the miniature, with sets of references and noises of their own.

Several references, structure, other bases, regions, layer weights, the attention map: each function
draws with the shipped workflows and returns plain figures; `evaluate.py` collects them.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from miniature import assemble, concatenated
from miniature.metrics import (
    SceneClassifier,
    Similarity,
    displacement,
    distance,
    overlap,
    seen,
    shade_error,
    share,
    whiteness_of_outlines,
)
from miniature.scenes import KINDS, Scenes, outlines, render, scenes, to_tensor
from miniature.through_comfyui import APART, Drawer
from miniature.workflows import SECOND, SIDE, Api, given
from tools import reference_images

STRUCTURES = 1 << 22  # of the shown stream: what gives structures their edges
LOOKS = ("colour", "background")
Figures = dict[str, Any]


def every(draw: Drawer, classify: SceneClassifier, alike: Similarity) -> Figures:
    """Return the figures of every experiment."""
    base, alone = (draw(name, adapter="base")[:, 0] for name in ("text_and_image", "image_only"))
    with torch.inference_mode():
        toolbox = {
            "regions": regions(draw, classify),
            "style": style(draw, classify, alike),
            "attention_map": attention_map(draw),
        }
    return {
        "seed": draw.task.seeds[0] // APART,
        "variants": variants(draw, alike, base, alone),
        "several_references": several_references(draw, classify, alike),
        "toolbox": toolbox,
        "structure": structure(draw, classify, alone),
        "another_base": another_base(draw, classify, base),
    }


def partners(rows: Scenes) -> Tensor:
    """Return for each scene one that is `unlike` it, `(N,)`."""
    return unlike(rows, [[number] for number in range(len(rows))])


def unlike(rows: Scenes, groups: Sequence[Sequence[int]]) -> Tensor:
    """Return for each group the next scene after its first that shares no color or background.

    Raises ValueError where there is none.
    """
    count = len(rows)

    def fits(other: int, group: Sequence[int]) -> bool:
        return not any(
            rows.colour[other] == rows.colour[one] or rows.background[other] == rows.background[one]
            for one in group
        )

    found = []
    for group in groups:
        others = ((group[0] + step) % count for step in range(1, count))
        chosen = next((other for other in others if fits(other, group)), None)
        if chosen is None:
            raise ValueError(
                f"None of {count} scenes differs in colour and background from those numbered "
                f"{', '.join(map(str, group))}; take more references, 16 or so."
            )
        found.append(chosen)
    return torch.tensor(found)


def of_two(api: Api) -> Api:
    """Return a workflow for three references, a latent for each perhaps, with two."""
    changed = copy.deepcopy(api)
    for node in changed.values():
        node["inputs"].pop("images.image2", None)
        if node["inputs"].get("batch_size") == 3:
            node["inputs"]["batch_size"] = 2
    return changed


def several_references(draw: Drawer, classify: SceneClassifier, alike: Similarity) -> Figures:
    """Combine in each way two references that share neither color nor background."""
    rows, images = draw.task.rows, draw.task.images
    second = partners(rows)
    strangers = unlike(rows, [*enumerate(second.tolist())])
    names = [draw.names[number] for number in second.tolist()]
    found: Figures = {}
    for combine in ("concat", "average"):
        drawn = draw(f"several_images_{combine}", others=names, change=of_two)[:, 0]
        shown = classify(drawn)
        of_either = {}
        for kind in LOOKS:
            values = getattr(rows, kind)
            either = (shown[kind] == values) | (shown[kind] == values[second])
            of_either[f"{kind}_of_either"] = float(either.float().mean())
        found[combine] = of_either | {
            "image_similarity": [
                float(alike(drawn, reference).mean()) for reference in (images, images[second])
            ],
            "image_similarity_of_strangers": float(alike(drawn, images[strangers]).mean()),
        }
    drawn = draw("several_images_per_latent", others=names, change=of_two)
    shown, other = (classify(drawn[:, latent]) for latent in (0, 1))
    found["per_latent"] = {}
    for kind in LOOKS:
        values = getattr(rows, kind)
        own = share(shown[kind], values) + share(other[kind], values[second])
        swapped = share(shown[kind], values[second]) + share(other[kind], values)
        found["per_latent"] |= {f"{kind}_of_own": own / 2, f"{kind}_of_other": swapped / 2}
    return found


def _shares(shown: dict[str, Tensor], rows: Scenes, kinds: Sequence[str] = LOOKS) -> Figures:
    """Return how often each kind is that of the references."""
    return {kind: share(shown[kind], getattr(rows, kind)) for kind in kinds}


def structure(draw: Drawer, classify: SceneClassifier, without: Tensor) -> Figures:
    """Let edges say where and what shape, or an image to begin from; the reference the colors.

    There is no text. `without`: images of the references alone.
    """
    task = draw.task
    rows = scenes(assemble.SHOWN, len(task.rows), STRUCTURES + task.seeds[0])
    names = draw.write_inputs("structure", rows)
    covered = outlines(rows, SIDE)
    with_edges = draw("controlnet", others=names)[:, 0]
    from_image, unprompted = (
        draw("image_to_image", weight, others=names)[:, 0] for weight in (1.0, 0.0)
    )
    shown, plain = classify(with_edges), _shares(classify(unprompted), task.rows)
    return {
        "shape_of_edges": share(shown["shape"], rows.shape),
        "overlap": overlap(with_edges, covered),
        "overlap_without": overlap(without, covered),
        **_shares(shown, task.rows),
        "image_to_image": {
            "overlap": overlap(from_image, covered),
            "overlap_of_start": overlap(render(rows, SIDE), covered),
            "overlap_without": overlap(without, covered),
            **_shares(classify(from_image), task.rows),
            **{f"{kind}_without": value for kind, value in plain.items()},
        },
    }


def variants(draw: Drawer, alike: Similarity, base: Tensor, alone: Tensor) -> Figures:
    """Measure how near each kind of adapter comes to what is asked for.

    Under a text that is the reference with the text's shape, with none the reference. `base` and
    `alone`: the base adapter's images. "strangers": what another reference asks for.
    """
    task = draw.task
    asked = {
        "text_and_image": render(replace(task.rows, shape=task.shapes), SIDE),
        "image_only": task.images,
    }

    def likeness(drawn: dict[str, Tensor]) -> Figures:
        return {
            name: {
                "image_similarity": float(alike(images, asked[name]).mean()),
                "distance": distance(images, asked[name]),
                "displacement": displacement(images, asked[name]),
                "shade_error": shade_error(images, asked[name]),
                "seen": seen(images),
            }
            for name, images in drawn.items()
        }

    texts = {"text_and_image": task.texts, "image_only": [""] * len(task.rows)}
    return {
        "base": likeness({"text_and_image": base, "image_only": alone}),
        "fine_grained": likeness(
            {name: draw(name, adapter="fine-grained")[:, 0] for name in asked}
        ),
        "strangers": likeness({name: images.roll(1, 0) for name, images in asked.items()}),
        "concatenated": likeness(
            {name: concatenated.draw(task, words) for name, words in texts.items()}
        ),
    }


def another_base(draw: Drawer, classify: SceneClassifier, first: Tensor) -> Figures:
    """Use the adapter on the fine-tuned base; `first`: what the first one draws of the same."""

    def on_second(api: Api) -> Api:
        return given(api, CheckpointLoaderSimple={"ckpt_name": SECOND})

    drawn = draw("text_and_image", change=on_second)[:, 0]
    shown = classify(drawn)
    return {
        **_shares(shown, draw.task.rows),
        "shape_kept": share(shown["shape"], draw.task.shapes),
        "whiteness_of_outlines": whiteness_of_outlines(drawn),
        "whiteness_on_the_first_base": whiteness_of_outlines(first),
    }


def regions(draw: Drawer, classify: SceneClassifier) -> Figures:
    """Use one reference within the disc, where shapes are, and another everywhere else; no text."""
    inner, second = draw.task.rows, partners(draw.task.rows)
    names = [draw.names[number] for number in second.tolist()]
    shown = classify(draw("regions", others=names)[:, 0])
    sides = {"inner": _shares(shown, inner), "outer": _shares(shown, inner[second])}
    return {f"{kind}_of_{side}": sides[side][kind] for kind in LOOKS for side in sides}


def style(draw: Drawer, classify: SceneClassifier, alike: Similarity) -> Figures:
    """Use uniform weights, half of them and each preset, with a fine-grained adapter and no text.

    So all that is shown is either the reference's or by chance.
    """
    task = draw.task
    found: Figures = {}
    for name, preset, weight in (
        ("uniform", "uniform", 1.0),
        ("weaker", "uniform", 0.5),
        ("style", "style", 1.0),
        ("composition", "composition", 1.0),
    ):

        def with_preset(api: Api, preset: str = preset) -> Api:
            return given(api, IPA_LayerWeights={"preset": preset})

        texts = [""] * len(task.rows)
        drawn = draw("style_transfer", weight, "fine-grained", texts=texts, change=with_preset)
        drawn = drawn[:, 0]
        found[name] = {
            **_shares(classify(drawn), task.rows, [*KINDS]),
            "displacement": displacement(drawn, task.images),
            "overlap": overlap(drawn, outlines(task.rows, SIDE)),
            "image_similarity": float(alike(drawn, task.images).mean()),
        }
    return found


def mask() -> Tensor:
    """Return the workflows' mask, a disc, as booleans `(SIDE, SIDE)`."""
    return to_tensor(reference_images.draw("mask.png").resize((SIDE, SIDE)))[0] > 0.5


def attention_map(draw: Drawer) -> Figures:
    """Map the attention to an image prompt that acts within the disc alone.

    `overlap`: of the disc with what is warmer than half of the warmest.
    """

    def map_alone(api: Api) -> Api:
        changed = copy.deepcopy(api)
        (node,) = (i for i, n in changed.items() if n["class_type"] == "IPA_AttentionMap")
        changed["map"] = {"class_type": "MaskToImage", "inputs": {"mask": [node, 1]}}
        return given(changed, SaveImage={"images": ["map", 0]})

    maps = draw("attention_map", change=map_alone)[:, 0, 0]
    disc = mask()
    warm = maps > maps.amax((1, 2), keepdim=True) / 2
    union = (warm | disc).sum((1, 2))
    return {
        "inside": float(maps[:, disc].mean()),
        "outside": float(maps[:, ~disc].mean()),
        "overlap": float(((warm & disc).sum((1, 2)) / union).mean()),
    }
