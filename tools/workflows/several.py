"""The example workflows with several pictures: together, in turn, in places, or by prompt."""

from __future__ import annotations

from tools.workflows.graph import Graph, Node, Output
from tools.workflows.parts import (
    DEFECTS,
    QUALITY,
    apply,
    empty,
    encode,
    load,
    picture,
    sample,
    save,
    task,
    texts,
)
from tools.workflows.public import PLUS


def several_images_concat() -> Graph:
    return _several(task("several_images_concat"), "concat")


def several_images_average() -> Graph:
    return _several(task("several_images_average"), "average")


def several_images_per_latent() -> Graph:
    return _several(task("several_images_per_latent"), "per_latent", latents=3)


def several_images_masks() -> Graph:
    graph = task("several_images_masks")
    models = load(graph, adapter=PLUS)
    first = picture(graph, "reference.png", "Reference picture in the white part")
    second = picture(graph, "reference_2.png", "Reference picture in the black part")
    white = graph.add("LoadImageMask", "Mask", image="mask.png", channel="red")["MASK"]
    black = graph.add("InvertMask", mask=white)["MASK"]
    words = texts(graph, models, "", "")
    model = apply(graph, models, encode(graph, models, first), mask=white)
    model = apply(graph, models, encode(graph, models, second), model=model, mask=black)
    return save(graph, sample(graph, models, model, words, empty(graph)))


def per_prompt() -> Graph:
    graph = task("per_prompt")
    models = load(graph, adapter=PLUS)
    pictures = [
        picture(graph, "reference.png", "Reference picture, left"),
        picture(graph, "reference_2.png", "Reference picture, right"),
    ]
    clip = models.checkpoint["CLIP"]
    words = [
        graph.add("CLIPTextEncode", f"Positive Prompt, {side}", text=QUALITY, clip=clip)
        for side in ("left", "right")
    ]
    negative = graph.add("CLIPTextEncode", "Negative Prompt", text=DEFECTS, clip=clip)
    model = models.checkpoint["MODEL"]
    halves: list[Output] = []
    applied: list[Node] = []
    for text, image in zip(words, pictures, strict=True):
        node = graph.add(
            "IPA_ApplyConditioning",
            model=model,
            positive=text["CONDITIONING"],
            negative=negative["CONDITIONING"],
            adapter=models.adapter["adapter"],
            image_prompt=encode(graph, models, image),
            weight=0.8,
            start_at=0.0,
            end_at=1.0,
            combine="concat",
        )
        model = node["model"]
        applied.append(node)
    for node, x in zip(applied, (0.0, 0.5), strict=True):
        half = graph.add(
            "ConditioningSetAreaPercentage",
            "Right half" if x else "Left half",
            conditioning=node["positive"],
            width=0.5,
            height=1.0,
            x=x,
            y=0.0,
            strength=1.0,
        )
        halves.append(half["CONDITIONING"])
    both = graph.add("ConditioningCombine", conditioning_1=halves[0], conditioning_2=halves[1])
    prompts = both["CONDITIONING"], applied[0]["negative"]
    return save(graph, sample(graph, models, model, prompts, empty(graph, width=768)))


def _several(graph: Graph, combine: str, latents: int = 1) -> Graph:
    models = load(graph)
    batch = _three_pictures(graph)
    words = texts(graph, models, "", "")
    model = apply(graph, models, encode(graph, models, batch), combine=combine)
    return save(graph, sample(graph, models, model, words, empty(graph, batch=latents)))


def _three_pictures(graph: Graph) -> Output:
    first, second, third = (
        picture(graph, file, f"Reference picture {number}")
        for number, file in enumerate(("reference.png", "reference_2.png", "reference_3.png"), 1)
    )
    batch = graph.add(
        "BatchImagesNode", images__image0=first, images__image1=second, images__image2=third
    )
    return batch["IMAGE"]
