"""What is wrong is told where it is wrong, and the server goes on."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support import standins
from tools.comfyui.client import PromptError


@pytest.fixture
def new(models: Path) -> Iterator[Callable[[str, str], Path]]:
    """Return what gives a file of a new name in a folder of the server; removed after the test."""
    made: list[Path] = []

    def new(folder: str, suffix: str) -> Path:
        made.append(models / folder / f"bad-{uuid.uuid4().hex}{suffix}")
        return made[-1]

    yield new
    for path in made:
        path.unlink(missing_ok=True)


class Hostile:
    """Unpickled, it makes a directory."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.mkdir, (self.path,)


def of_another_family(made: Any, new: Any) -> None:
    standins.ensure("ipadapter/ip-adapter_sdxl.safetensors")
    made.set("IPA_LoadAdapter", adapter_name="ip-adapter_sdxl.safetensors")


def knobs(**values: Any) -> Callable[[Any, Any], object]:
    return lambda made, new: made.set("IPA_Apply", **values)


def images_that_do_not_divide_the_batch(made: Any, new: Any) -> None:
    made.set("EmptyLatentImage", batch_size=4)


def nan_image(made: Any, new: Any) -> None:
    """What a VAE makes of a NaN latent."""
    path = new("input", ".latent")
    latent = torch.full((1, 4, 8, 8), float("nan"))
    save_file({"latent_tensor": latent, "latent_format_version_0": torch.tensor([])}, path)
    samples = made.add("LoadLatent", latent=path.name)
    vae = [made.of("CheckpointLoaderSimple"), 2]
    made.set("IPA_EncodeImage", image=made.add("VAEDecode", samples=samples, vae=vae))


def nan_weight(made: Any, new: Any) -> None:
    path = new("models/ipadapter", ".safetensors")
    state = load_file(standins.path("ipadapter/ip-adapter_sd15.safetensors"))
    state["ip_adapter.1.to_v_ip.weight"][0, 0] = float("nan")
    save_file(state, path)
    made.set("IPA_LoadAdapter", adapter_name=path.name)


def hostile(made: Any, new: Any) -> None:
    path = new("models/ipadapter", ".bin")
    torch.save({"image_proj": Hostile(path.with_suffix(".ran"))}, path)
    made.set("IPA_LoadAdapter", adapter_name=path.name)


# What is wrong, in which node that shows, and what the message says about it.
CASES: dict[str, tuple[Callable[[Any, Any], object], str, str]] = {
    "family": (
        of_another_family,
        "IPA_Apply",
        "ip-adapter_sdxl.safetensors.*made for SDXL.*connected model",
    ),
    "window": (knobs(start_at=0.8, end_at=0.2), "IPA_Apply", "start_at.*after end_at"),
    "λ too large": (knobs(weight=7.0), "IPA_Apply", "7.0 bigger than max of 5.0: weight"),
    "λ infinite": (knobs(weight=float("-inf")), "IPA_Apply", "smaller than min of -5.0: weight"),
    "λ NaN": (knobs(weight=float("nan")), "IPA_Apply", "weight must be a finite number.*nan"),
    "λ no number": (knobs(weight="much"), "IPA_Apply", "FLOAT.*weight.*'much'"),
    "batch": (images_that_do_not_divide_the_batch, "KSampler", "3 images.*4 latents"),
    "NaN pixels": (nan_image, "IPA_EncodeImage", "image contains NaN"),
    "NaN weight": (nan_weight, "IPA_LoadAdapter", r"'bad-\w+\.safetensors'.*NaN"),
    "hostile pickle": (
        hostile,
        "IPA_LoadAdapter",
        r"'bad-\w+\.bin'.*was refused and not opened.*run code",
    ),
}
DAY = ("family", "λ too large", "batch", "NaN pixels", "hostile pickle")  # one of each kind


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=() if case in DAY else pytest.mark.nightly) for case in CASES],
)
def test_an_error_names_its_node_and_the_next_prompt_runs(server, graph, new, models, case):
    spoil, node_class, message = CASES[case]
    made = graph("several_images_per_latent" if case == "batch" else "text_and_image")
    spoil(made, new)
    with pytest.raises(PromptError, match=f"(?s){message}") as refused:
        server.run(made)
    assert refused.value.node_class == node_class
    assert not list(models.rglob("bad-*.ran")), "code in a pickle was run"
    good = graph().set("KSampler", seed=list(CASES).index(case))
    assert good.of("KSampler") in server.run(good).executed
