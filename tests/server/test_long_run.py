"""One server, many prompts: no growing memory, and errors that leave it able to go on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import save_file

from tools.client import Client, PromptError
from tools.workflows.smaller import smaller

API = Path(__file__).parents[2] / "workflows" / "api"
PROMPTS = 100
GROWTH = 48 * 2**20  # bytes over the second half; one leaked prompt in each would be 50 × 0.2 MB+


class Graph(dict):
    """A workflow for the server, its nodes found by class."""

    def of(self, class_type: str) -> str:
        return next(k for k, node in self.items() if node["class_type"] == class_type)

    def set(self, class_type: str, **inputs: Any) -> Graph:
        self[self.of(class_type)]["inputs"].update(inputs)
        return self


def graph(name: str = "text_and_image") -> Graph:
    """The workflow at one step and 64 px, ending in latents: the decoder takes longest."""
    made = Graph(smaller(json.loads((API / f"{name}.json").read_text()), steps=1, side=64))
    for class_type in ("SaveImage", "VAEDecode"):
        del made[made.of(class_type)]
    sampled = [made.of("KSampler"), 0]
    made["latent"] = {
        "class_type": "SaveLatent",
        "inputs": {"samples": sampled, "filename_prefix": "test"},
    }
    return made


def resident(client: Client) -> int:
    """Bytes of the server's process."""
    port = int(client.address.rsplit(":", 1)[1])
    for process in psutil.Process().children(recursive=True):
        if any(c.laddr.port == port for c in process.net_connections("tcp") if c.laddr):
            return process.memory_info().rss
    raise AssertionError("the server's process was not found")


def test_a_hundred_prompts_leave_no_growing_memory(server):
    sizes = []
    for number in range(PROMPTS):
        made = graph().set("IPA_Apply", weight=0.05 + number / PROMPTS, end_at=0.999)
        result = server.run(made)
        if number:
            assert made.of("IPA_EncodeImage") in result.cached
            assert made.of("IPA_LoadAdapter") in result.cached
        sizes.append(resident(server))
    half = PROMPTS // 2
    assert np.mean(sizes[-10:]) - np.mean(sizes[half - 10 : half]) < GROWTH, sizes


def adapter_without(models: Path, name: str, change: Any) -> str:
    """A damaged copy of the base adapter in the server's folder."""
    from safetensors.torch import load_file

    folder = models / "models" / "ipadapter"
    weights = load_file(folder / "ip-adapter_sd15.safetensors")
    change(weights)
    save_file(weights, folder / name)
    return name


def drop_layer(weights: dict[str, torch.Tensor]) -> None:
    del weights["ip_adapter.3.to_k_ip.weight"]


def make_nan(weights: dict[str, torch.Tensor]) -> None:
    weights["ip_adapter.1.to_v_ip.weight"][0, 0] = float("nan")


REFUSALS = {
    "family": ("IPA_Apply", "ip-adapter_sdxl.safetensors.*made for SDXL.*connected model"),
    "window": ("IPA_Apply", "start_at.*after end_at"),
    "batch": ("KSampler", "3 images.*4 latents"),
    "missing tensor": ("IPA_LoadAdapter", "broken.safetensors.*missing"),
    "nan": ("IPA_LoadAdapter", "broken.safetensors.*NaN"),
    "truncated": ("IPA_LoadAdapter", "broken.safetensors.*cut short"),
}


def broken(case: str, models: Path) -> Graph:
    made = graph("several_images_per_latent" if case == "batch" else "text_and_image")
    if case == "family":
        return made.set("IPA_LoadAdapter", adapter_name="ip-adapter_sdxl.safetensors")
    if case == "window":
        return made.set("IPA_Apply", start_at=0.8, end_at=0.2)
    if case == "batch":
        return made.set("EmptyLatentImage", batch_size=4)
    name = "broken.safetensors"
    change = make_nan if case == "nan" else drop_layer
    adapter_without(models, name, change)
    if case == "truncated":
        file = models / "models" / "ipadapter" / name
        file.write_bytes(file.read_bytes()[:5000])
    return made.set("IPA_LoadAdapter", adapter_name=name)


@pytest.fixture
def tidy(models, models_sdxl):
    yield
    (models / "models" / "ipadapter" / "broken.safetensors").unlink(missing_ok=True)


@pytest.mark.parametrize("case", REFUSALS)
def test_an_error_names_its_node_and_the_next_prompt_runs(server, models, tidy, case):
    node_class, message = REFUSALS[case]
    made = broken(case, models)
    with pytest.raises(PromptError, match=f"(?s){message}") as refused:
        server.run(made)
    assert refused.value.node_class == node_class
    good = graph().set("IPA_Apply", weight=0.123 + list(REFUSALS).index(case) / 100)
    assert good.of("KSampler") in server.run(good).executed
