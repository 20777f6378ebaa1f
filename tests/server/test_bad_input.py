"""What is wrong is told where it is wrong, and the server goes on."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support import checkpoint_layouts as layouts
from tests.support import standins
from tests.support.checkpoint_layouts import Layout, dense, norm
from tools.comfyui.client import PromptError

CONTEXT, WIDTHS = standins.SD15.context, standins.SD15.widths
FACE = dense("proj.0", 1024, 512) | dense("proj.2", 4 * CONTEXT, 1024) | norm("norm", CONTEXT)
KOLORS = layouts.resampler(1024, CONTEXT, width=2048)
# No UNet: what the host knows an SD3 by; the rest of it is missing, but it never runs.
SD3 = dense("x_embedder.proj", 64, 16, 2, 2)
SD3 |= dense("joint_blocks.0.context_block.attn.qkv", 192, 64)


class Files:
    """Files in the server's folders, each of a new name, to be removed after the test."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.made: list[Path] = []

    def new(self, folder: str, suffix: str) -> Path:
        path = self.base / folder / f"bad-{uuid.uuid4().hex}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        self.made.append(path)
        return path


@pytest.fixture
def files(models: Path) -> Iterator[Files]:
    made = Files(models)
    yield made
    for path in made.made:
        path.unlink(missing_ok=True)


Case = Callable[[Any, Files], object]  # spoils a graph


class Hostile:
    """Unpickled, it makes a directory."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.mkdir, (self.path,)


def without_a_layer(path: Path) -> None:
    state = load_file(path)
    del state["ip_adapter.3.to_k_ip.weight"]
    save_file(state, path)


def with_nan(path: Path) -> None:
    state = load_file(path)
    state["ip_adapter.1.to_v_ip.weight"][0, 0] = float("nan")
    save_file(state, path)


def with_a_narrow_tensor(path: Path) -> None:
    state = load_file(path)
    key = "ip_adapter.5.to_v_ip.weight"
    save_file({**state, key: state[key][:, 1:].contiguous()}, path)


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:5000])


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def hostile(path: Path) -> None:
    torch.save({"image_proj": Hostile(path.with_suffix(".ran"))}, path)


def of(projection: Layout) -> Callable[[Path], None]:
    """Return what writes an adapter of that projection, with layers that fit."""
    layout = layouts.ip_adapter(projection, WIDTHS, CONTEXT)
    return lambda path: save_file(standins.half(layout, 0), path)


def file(change: Callable[[Path], None], suffix: str = ".safetensors") -> Case:
    """Return the case of a bad adapter: `change` is given the path of a good one."""

    def case(made: Any, files: Files) -> None:
        path = files.new("models/ipadapter", suffix)
        path.write_bytes(standins.path("ipadapter/ip-adapter_sd15.safetensors").read_bytes())
        change(path)
        made.set("IPA_LoadAdapter", adapter_name=path.name)

    return case


def knobs(**values: Any) -> Case:
    return lambda made, files: made.set("IPA_Apply", **values)


def of_another_family(made: Any, files: Files) -> None:
    standins.ensure("ipadapter/ip-adapter_sdxl.safetensors")
    made.set("IPA_LoadAdapter", adapter_name="ip-adapter_sdxl.safetensors")


def model_without_cross_attention(made: Any, files: Files) -> None:
    path = files.new("models/diffusion_models", ".safetensors")
    save_file(standins.half(SD3, 0), path)
    model = made.add("UNETLoader", unet_name=path.name, weight_dtype="default")
    made.set("IPA_Apply", model=model)


def nan_pixels(made: Any, files: Files) -> list[Any]:
    """Return the link to what a VAE makes of a NaN latent."""
    path = files.new("input", ".latent")
    latent = torch.full((1, 4, 8, 8), float("nan"))
    save_file({"latent_tensor": latent, "latent_format_version_0": torch.tensor([])}, path)
    samples = made.add("LoadLatent", latent=path.name)
    return made.add("VAEDecode", samples=samples, vae=[made.of("CheckpointLoaderSimple"), 2])


def nan_image(made: Any, files: Files) -> None:
    made.set("IPA_EncodeImage", image=nan_pixels(made, files))


def nan_mask(made: Any, files: Files) -> None:
    mask = made.add("ImageToMask", image=nan_pixels(made, files), channel="red")
    made.set("IPA_Apply", mask=mask)


def mask_without_pixels(made: Any, files: Files) -> None:
    whole = made.add("SolidMask", value=1.0, width=64, height=64)
    beside = made.add("CropMask", mask=whole, x=64, y=0, width=64, height=64)
    made.set("IPA_Apply", mask=beside)


def images_that_do_not_divide_the_batch(made: Any, files: Files) -> None:
    made.set("EmptyLatentImage", batch_size=4)


# What is wrong, in which node that shows, and what the message says about it.
CASES: dict[str, tuple[Case, str, str]] = {
    "family": (
        of_another_family,
        "IPA_Apply",
        "ip-adapter_sdxl.safetensors.*made for SDXL.*connected model",
    ),
    "no cross-attention": (
        model_without_cross_attention,
        "IPA_Apply",
        r"connected model \(SD3\) has no UNet cross-attention layers",
    ),
    "encoder": (
        file(of(layouts.linear_projection(1280, CONTEXT))),
        "IPA_Apply",
        "1280.*768",
    ),
    "window": (knobs(start_at=0.8, end_at=0.2), "IPA_Apply", "start_at.*after end_at"),
    "λ too large": (knobs(weight=7.0), "IPA_Apply", "7.0 bigger than max of 5.0: weight"),
    "λ infinite": (knobs(weight=float("-inf")), "IPA_Apply", "smaller than min of -5.0: weight"),
    "λ NaN": (knobs(weight=float("nan")), "IPA_Apply", "weight must be a finite number.*nan"),
    "λ no number": (knobs(weight="much"), "IPA_Apply", "FLOAT.*weight.*'much'"),
    "batch": (images_that_do_not_divide_the_batch, "KSampler", "3 images.*4 latents"),
    "NaN pixels": (nan_image, "IPA_EncodeImage", "image contains NaN"),
    "NaN mask": (nan_mask, "IPA_Apply", "mask contains NaN"),
    "empty mask": (mask_without_pixels, "IPA_Apply", r"mask has shape \[1, 64, 0\]"),
    "missing tensor": (file(without_a_layer), "IPA_LoadAdapter", "BAD.*missing"),
    "wrong shape": (file(with_a_narrow_tensor), "IPA_LoadAdapter", r"BAD.*shape \[320, 767\]"),
    "NaN weight": (file(with_nan), "IPA_LoadAdapter", "BAD.*NaN"),
    "cut short": (file(cut_short), "IPA_LoadAdapter", "BAD.*cut short"),
    "empty": (file(emptied), "IPA_LoadAdapter", "BAD.*is empty"),
    "hostile pickle": (file(hostile, ".bin"), "IPA_LoadAdapter", "BAD.*was refused.*run code"),
    "FaceID": (file(of(FACE)), "IPA_LoadAdapter", "BAD.*is a FaceID.*not support"),
    "Kolors": (file(of(KOLORS)), "IPA_LoadAdapter", "BAD.*is a Kolors.*not support"),
}


DAY = ("family", "λ too large", "batch", "NaN pixels", "hostile pickle")  # one of each kind


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=() if case in DAY else pytest.mark.nightly) for case in CASES],
)
def test_an_error_names_its_node_and_the_next_prompt_runs(server, graph, files, case):
    spoil, node_class, message = CASES[case]
    made = graph("several_images_per_latent" if case == "batch" else "text_and_image")
    spoil(made, files)
    message = message.replace("BAD", r"'bad-\w+\.(safetensors|bin)'")
    with pytest.raises(PromptError, match=f"(?s){message}") as refused:
        server.run(made)
    assert refused.value.node_class == node_class
    assert not list(files.base.rglob("bad-*.ran")), "code in a pickle was run"
    good = graph().set("KSampler", seed=list(CASES).index(case))
    assert good.of("KSampler") in server.run(good).executed
