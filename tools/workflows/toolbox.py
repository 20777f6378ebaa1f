"""The example workflows of what lies beyond Apply: layers, steps, latents, regions, maps, grids."""

from __future__ import annotations

from tools.workflows.graph import Graph, Output
from tools.workflows.parts import (
    DEFECTS,
    QUALITY,
    SEED,
    Models,
    apply,
    decode,
    empty,
    encode,
    latents,
    load,
    picture,
    sample,
    save,
    task,
    texts,
)
from tools.workflows.public import BASE, PLUS, PLUS_FACE, SD15

HAT = f"{QUALITY}, wearing a hat on the beach"


def style_transfer() -> Graph:
    graph = task("style_transfer")
    models = load(graph)
    reference = picture(graph, "reference.png", "Reference picture: its style")
    words = texts(graph, models, f"{QUALITY}, a cat in a garden", DEFECTS)
    weights = graph.add(
        "IPA_LayerWeights", model=models.checkpoint["MODEL"], preset="style", changes=""
    )
    prompt = encode(graph, models, reference)
    model = apply(graph, models, prompt, weight=0.9, layer_weights=weights["layer_weights"])
    return save(graph, sample(graph, models, model, words, empty(graph)))


def weight_curve() -> Graph:
    graph = task("weight_curve")
    models = load(graph)
    reference = picture(graph, "reference.png", "Reference picture")
    words = texts(graph, models, HAT, DEFECTS)
    curve = graph.add(
        "CurveEditor",
        "Weight over the schedule",
        "Image prompt",
        curve={"points": [[0, 1], [0.5, 0.8], [1, 0]], "interpolation": "monotone_cubic"},
    )
    prompt = encode(graph, models, reference)
    model = apply(graph, models, prompt, weight=0.8, weight_curve=curve["curve"])
    return save(graph, sample(graph, models, model, words, empty(graph)))


def weights_per_latent() -> Graph:
    graph = task("weights_per_latent")
    models = load(graph)
    reference = picture(graph, "reference.png", "Reference picture")
    words = texts(graph, models, HAT, DEFECTS)
    weights = graph.add("IPA_LatentWeights", weights="0: 0, 3: 1", count=4)
    prompt = encode(graph, models, reference)
    model = apply(graph, models, prompt, weight=0.9, latent_weights=weights["latent_weights"])
    return save(graph, sample(graph, models, model, words, empty(graph, batch=4)))


def regions() -> Graph:
    graph = task("regions")
    models = load(graph, adapter=PLUS)
    left = picture(graph, "reference.png", "Reference picture in the white part")
    right = picture(graph, "reference_2.png", "Reference picture everywhere else")
    mask = graph.add("LoadImageMask", "Mask", image="mask.png", channel="red")["MASK"]
    words = texts(graph, models, "", "")
    model = _in_regions(graph, models, left, right, mask)
    return save(graph, sample(graph, models, model, words, empty(graph)))


def attention_map() -> Graph:
    graph = task("attention_map")
    models = load(graph, adapter=PLUS)
    reference = picture(graph, "reference.png", "Reference picture in the white part")
    mask = graph.add("LoadImageMask", "Mask", image="mask.png", channel="red")["MASK"]
    words = texts(graph, models, HAT, DEFECTS)
    model = apply(graph, models, encode(graph, models, reference), weight=0.8, mask=mask)
    watched = graph.add("IPA_RecordAttention", model=model)
    samples = latents(graph, watched["model"], words, empty(graph))
    heat = graph.add(
        "IPA_AttentionMap",
        record=watched["record"],
        samples=samples,
        image=decode(graph, models, samples),
        blocks="all",
        start_at=0.0,
        end_at=1.0,
        prompt_number=0,
        opacity=0.6,
    )
    return save(graph, heat["overlay"])


def weight_start_grid() -> Graph:
    graph = task("weight_start_grid")
    models = load(graph)
    reference = picture(graph, "reference.png", "Reference picture")
    words = texts(graph, models, HAT, DEFECTS)
    values = graph.add("IPA_GridValues", weights="0.25, 0.5, 0.75", starts="0, 0.2, 0.4")
    model = apply(
        graph,
        models,
        encode(graph, models, reference),
        weight=values["weight"],
        start_at=values["start_at"],
    )
    images = sample(graph, models, model, words, empty(graph))
    grid = graph.add(
        "IPA_DrawGrid", images=images, weight=values["weight"], start_at=values["start_at"]
    )
    return save(graph, grid["grid"])


def _in_regions(graph: Graph, models: Models, white: Output, rest: Output, mask: Output) -> Output:
    """The model that follows one picture in the mask, and the other outside."""
    node = graph.add(
        "IPA_ApplyRegions",
        model=models.checkpoint["MODEL"],
        adapter=models.adapter["adapter"],
        image_prompts__image_prompt0=encode(graph, models, white),
        image_prompts__image_prompt1=encode(graph, models, rest),
        masks__mask0=mask,
        overlap="normalize",
        weight=1.0,
        start_at=0.0,
        end_at=1.0,
        combine="concat",
    )
    return node["model"]


def auto_load() -> Graph:
    graph = task("auto_load")
    checkpoint = graph.add("CheckpointLoaderSimple", ckpt_name=SD15.name)
    found = graph.add("IPA_AutoLoad", model=checkpoint["MODEL"], preset="standard")
    models = Models(checkpoint, found, found)
    reference = picture(graph, "reference.png", "Reference picture")
    words = texts(graph, models, HAT, DEFECTS)
    prompt = graph.add(
        "IPA_EncodeImage", clip_vision=found["clip_vision"], image=reference, crop="center"
    )
    model = apply(graph, models, prompt["image_prompt"], weight=0.6)
    return save(graph, sample(graph, models, model, words, empty(graph)))


def combined_prompts() -> Graph:
    graph = task("combined_prompts")
    models = load(graph)
    prompts = [
        encode(graph, models, picture(graph, file, f"Reference picture {number}"))
        for number, file in enumerate(("reference.png", "reference_2.png"), 1)
    ]
    words = texts(graph, models, "", "")
    both = graph.add(
        "IPA_CombinePrompts",
        prompts__prompt0=prompts[0],
        prompts__prompt1=prompts[1],
        method="average",
        weights="0.7, 0.3",
    )
    model = apply(graph, models, both["image_prompt"])
    return save(graph, sample(graph, models, model, words, empty(graph)))


def whole_picture() -> Graph:
    graph = task("whole_picture")
    models = load(graph, adapter=PLUS)
    wide = picture(graph, "reference_3.png", "Wide or large picture")
    words = texts(graph, models, "", "")
    tiles = graph.add(
        "IPA_PrepareImage",
        image=wide,
        clip_vision=models.vision["CLIP_VISION"],
        crop="tiles",
        x=0.5,
        y=0.5,
        grid=2,
    )
    model = apply(graph, models, encode(graph, models, tiles["image"]))
    return save(graph, sample(graph, models, model, words, empty(graph)))


def negative_noise() -> Graph:
    graph = task("negative_noise")
    models = load(graph)
    reference = picture(graph, "reference.png", "Reference picture")
    noise = graph.add(
        "IPA_NegativeNoise", image=reference, kind="gaussian", strength=0.5, blur=0.0, seed=SEED
    )
    words = texts(graph, models, HAT, DEFECTS)
    prompt = graph.add(
        "IPA_EncodeImage",
        clip_vision=models.vision["CLIP_VISION"],
        image=reference,
        crop="center",
        negative_image=noise["image"],
    )
    model = apply(graph, models, prompt["image_prompt"], weight=0.6)
    return save(graph, sample(graph, models, model, words, empty(graph)))


def save_prompt() -> Graph:
    graph = task("save_prompt")
    models = load(graph)
    reference = picture(graph, "reference.png", "Reference picture")
    words = texts(graph, models, "", "")
    prompt = encode(graph, models, reference)
    graph.add("IPA_SavePrompt", image_prompt=prompt, filename_prefix="image_prompts/prompt")
    model = apply(graph, models, prompt)
    return save(graph, sample(graph, models, model, words, empty(graph)))


def load_prompt() -> Graph:
    """With the file that the first run of `save_prompt` writes."""
    graph = task("load_prompt")
    checkpoint = graph.add("CheckpointLoaderSimple", ckpt_name=SD15.name)
    adapter = graph.add("IPA_LoadAdapter", adapter_name=BASE.name)
    models = Models(checkpoint, adapter, adapter)
    words = texts(graph, models, "", "")
    saved = graph.add(
        "IPA_LoadPrompt", prompt_name="image_prompts/prompt_00001_.safetensors [output]"
    )
    model = apply(graph, models, saved["image_prompt"])
    return save(graph, sample(graph, models, model, words, empty(graph)))


def face() -> Graph:
    graph = task("face")
    models = load(graph, adapter=PLUS_FACE)
    reference = picture(graph, "reference.png", "Reference picture: a face")
    words = texts(graph, models, HAT, DEFECTS)
    square = graph.add(
        "IPA_PrepareImage",
        image=reference,
        clip_vision=models.vision["CLIP_VISION"],
        crop="point",
        x=0.5,
        y=0.5,
        grid=1,
    )
    model = apply(graph, models, encode(graph, models, square["image"]), weight=0.6)
    return save(graph, sample(graph, models, model, words, empty(graph)))
