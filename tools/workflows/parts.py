"""The stretches of graph that the example workflows share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tools.workflows.graph import Graph, Node, Output
from tools.workflows.notes import NOTES
from tools.workflows.public import BASE, SD15, VIT_H, Weights

SEED = 42
QUALITY = "best quality, high quality"
DEFECTS = "monochrome, lowres, bad anatomy, worst quality, low quality"
"""The texts of the authors' own code."""


@dataclass(frozen=True)
class Models:
    """The three loaders that every workflow starts with."""

    checkpoint: Node
    vision: Node
    adapter: Node


def task(name: str) -> Graph:
    """An empty graph with the note of that name."""
    return Graph(name, NOTES[name])


def load(
    graph: Graph, checkpoint: Weights = SD15, vision: Weights = VIT_H, adapter: Weights = BASE
) -> Models:
    """Checkpoint, image encoder and adapter."""
    return Models(
        graph.add("CheckpointLoaderSimple", ckpt_name=checkpoint.name),
        graph.add("CLIPVisionLoader", clip_name=vision.name),
        graph.add("IPA_LoadAdapter", adapter_name=adapter.name),
    )


def picture(graph: Graph, file: str, title: str) -> Output:
    """A picture from the input folder."""
    return graph.add("LoadImage", title, image=file)["IMAGE"]


def texts(graph: Graph, models: Models, positive: str, negative: str) -> tuple[Output, Output]:
    """The positive and the negative text."""
    clip = models.checkpoint["CLIP"]
    return (
        graph.add("CLIPTextEncode", "Positive Prompt", text=positive, clip=clip)["CONDITIONING"],
        graph.add("CLIPTextEncode", "Negative Prompt", text=negative, clip=clip)["CONDITIONING"],
    )


def encode(graph: Graph, models: Models, image: Output) -> Output:
    """Pictures as an image prompt."""
    node = graph.add(
        "IPA_EncodeImage", clip_vision=models.vision["CLIP_VISION"], image=image, crop="center"
    )
    return node["image_prompt"]


def apply(
    graph: Graph,
    models: Models,
    image_prompt: Output,
    *,
    model: Output | None = None,
    weight: float | Output = 1.0,
    start_at: float | Output = 0.0,
    combine: str = "concat",
    **optional: Output | None,
) -> Output:
    """The model that follows the image prompt; `model` stands in for the checkpoint's."""
    more: dict[str, Any] = {k: output for k, output in optional.items() if output is not None}
    node = graph.add(
        "IPA_Apply",
        model=model or models.checkpoint["MODEL"],
        adapter=models.adapter["adapter"],
        image_prompt=image_prompt,
        weight=weight,
        start_at=start_at,
        end_at=1.0,
        combine=combine,
        **more,
    )
    return node["model"]


def empty(graph: Graph, width: int = 512, height: int = 512, batch: int = 1) -> Output:
    """Nothing but noise to start from."""
    node = graph.add("EmptyLatentImage", width=width, height=height, batch_size=batch)
    return node["LATENT"]


def fitted(graph: Graph, image: Output, step: str, title: str | None = None) -> Output:
    """The picture cropped and scaled to SD1.5's 512 x 512."""
    node = graph.add(
        "ImageScale",
        title,
        step,
        image=image,
        upscale_method="bicubic",
        width=512,
        height=512,
        crop="center",
    )
    return node["IMAGE"]


def sample(
    graph: Graph,
    models: Models,
    model: Output,
    texts: tuple[Output, Output],
    latent: Output,
    denoise: float = 1.0,
) -> Output:
    """The picture that the paper's sampling makes."""
    return decode(graph, models, latents(graph, model, texts, latent, denoise))


def latents(
    graph: Graph,
    model: Output,
    texts: tuple[Output, Output],
    latent: Output,
    denoise: float = 1.0,
) -> Output:
    """The paper's sampling: DDIM, 50 steps, guidance 7.5."""
    node = graph.add(
        "KSampler",
        model=model,
        seed=SEED,
        steps=50,
        cfg=7.5,
        sampler_name="ddim",
        scheduler="ddim_uniform",
        positive=texts[0],
        negative=texts[1],
        latent_image=latent,
        denoise=denoise,
    )
    return node["LATENT"]


def decode(graph: Graph, models: Models, samples: Output) -> Output:
    """The picture of latents."""
    return graph.add("VAEDecode", samples=samples, vae=models.checkpoint["VAE"])["IMAGE"]


def save(graph: Graph, image: Output) -> Graph:
    """The last node, and the finished graph."""
    graph.add("SaveImage", images=image, filename_prefix=f"ip_adapter/{graph.name}")
    return graph
