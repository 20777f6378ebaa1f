"""The example workflows, one function a task.

Settings are the paper's (arXiv 2308.06721) where it names them: DDIM, 50 steps, guidance 7.5, and
weight 1 with an empty text where the picture is the whole prompt.
"""

from __future__ import annotations

from tools.workflows.graph import Graph
from tools.workflows.parts import (
    DEFECTS,
    QUALITY,
    apply,
    empty,
    encode,
    fitted,
    load,
    picture,
    sample,
    save,
    task,
    texts,
)
from tools.workflows.public import BASE_SDXL_VIT_H, CANNY, DREAMSHAPER, SD15, SDXL, Weights
from tools.workflows.several import (
    per_prompt,
    several_images_average,
    several_images_concat,
    several_images_masks,
    several_images_per_latent,
)
from tools.workflows.toolbox import (
    attention_map,
    auto_load,
    combined_prompts,
    face,
    load_prompt,
    negative_noise,
    regions,
    save_prompt,
    style_transfer,
    weight_curve,
    weight_start_grid,
    weights_per_latent,
    whole_picture,
)


def text_and_image() -> Graph:
    graph = task("text_and_image")
    models = load(graph)
    reference = picture(graph, "reference.png", "Reference picture")
    words = texts(graph, models, f"{QUALITY}, wearing a hat on the beach", DEFECTS)
    model = apply(graph, models, encode(graph, models, reference), weight=0.6)
    return save(graph, sample(graph, models, model, words, empty(graph)))


def image_only() -> Graph:
    return _image_only(task("image_only"), SD15)


def another_checkpoint() -> Graph:
    return _image_only(task("another_checkpoint"), DREAMSHAPER)


def image_to_image() -> Graph:
    graph = task("image_to_image")
    models = load(graph)
    reference = picture(graph, "reference.png", "Reference picture")
    start = picture(graph, "reference_3.png", "Picture to start from")
    words = texts(graph, models, "", "")
    model = apply(graph, models, encode(graph, models, reference))
    pixels = fitted(graph, start, "Start picture")
    latent = graph.add("VAEEncode", pixels=pixels, vae=models.checkpoint["VAE"])["LATENT"]
    return save(graph, sample(graph, models, model, words, latent, denoise=0.6))


def inpainting() -> Graph:
    graph = task("inpainting")
    models = load(graph)
    reference = picture(graph, "reference.png", "Reference picture")
    start = picture(graph, "reference_3.png", "Picture to repaint")
    hole = picture(graph, "mask.png", "Mask: white is repainted")
    words = texts(graph, models, "", "")
    model = apply(graph, models, encode(graph, models, reference))
    pixels = fitted(graph, start, "Start picture", "Fit the picture")
    hole = fitted(graph, hole, "Start picture", "Fit the mask alike")
    mask = graph.add("ImageToMask", image=hole, channel="red")["MASK"]
    latent = graph.add("VAEEncode", pixels=pixels, vae=models.checkpoint["VAE"])["LATENT"]
    latent = graph.add("SetLatentNoiseMask", samples=latent, mask=mask)["LATENT"]
    painted = sample(graph, models, model, words, latent, denoise=0.7)
    whole = graph.add(
        "ImageCompositeMasked",
        "Keep the rest untouched",
        destination=pixels,
        source=painted,
        x=0,
        y=0,
        resize_source=False,
        mask=mask,
    )
    return save(graph, whole["IMAGE"])


def controlnet() -> Graph:
    graph = task("controlnet")
    models = load(graph)
    control = graph.add("ControlNetLoader", control_net_name=CANNY.name)["CONTROL_NET"]
    reference = picture(graph, "reference.png", "Reference picture")
    structure = picture(graph, "reference_3.png", "Picture whose edges are kept")
    positive, negative = texts(graph, models, "", "")
    model = apply(graph, models, encode(graph, models, reference))
    edges = graph.add(
        "Canny",
        image=fitted(graph, structure, "Structure"),
        low_threshold=0.4,
        high_threshold=0.8,
    )
    guided = graph.add(
        "ControlNetApplyAdvanced",
        positive=positive,
        negative=negative,
        control_net=control,
        image=edges["IMAGE"],
        strength=1.0,
        start_percent=0.0,
        end_percent=1.0,
    )
    words = guided["positive"], guided["negative"]
    return save(graph, sample(graph, models, model, words, empty(graph)))


def sdxl() -> Graph:
    graph = task("sdxl")
    models = load(graph, SDXL, adapter=BASE_SDXL_VIT_H)
    reference = picture(graph, "reference.png", "Reference picture")
    words = texts(graph, models, f"{QUALITY}, wearing a hat on the beach", DEFECTS)
    model = apply(graph, models, encode(graph, models, reference), weight=0.6)
    return save(graph, sample(graph, models, model, words, empty(graph, 1024, 1024)))


TASKS = (
    text_and_image,
    image_only,
    several_images_concat,
    several_images_average,
    several_images_per_latent,
    several_images_masks,
    image_to_image,
    inpainting,
    controlnet,
    another_checkpoint,
    per_prompt,
    sdxl,
    style_transfer,
    weight_curve,
    weights_per_latent,
    regions,
    attention_map,
    weight_start_grid,
    auto_load,
    combined_prompts,
    whole_picture,
    negative_noise,
    save_prompt,
    load_prompt,
    face,
)


def _image_only(graph: Graph, checkpoint: Weights) -> Graph:
    models = load(graph, checkpoint)
    reference = picture(graph, "reference.png", "Reference picture")
    words = texts(graph, models, "", "")
    model = apply(graph, models, encode(graph, models, reference))
    return save(graph, sample(graph, models, model, words, empty(graph)))
