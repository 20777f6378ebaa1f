"""A full-size SD1.5 UNet and adapter with random weights, and sampling with them."""

from __future__ import annotations

import asyncio
import importlib
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tools.comfyui import install as host

# SD1.5's UNet as ComfyUI configures it (comfy/supported_models.py, model_detection.py).
SD15 = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 320,
    "num_res_blocks": [2, 2, 2, 2],
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
    "transformer_depth_middle": 1,
    "channel_mult": [1, 2, 4, 4],
    "use_linear_in_transformer": False,
    "context_dim": 768,
    "num_heads": 8,
    "num_head_channels": -1,
    "use_spatial_transformer": True,
    "legacy": False,
    "use_temporal_attention": False,
    "adm_in_channels": None,
}


def random_weights(module: torch.nn.Module, seed: int) -> dict[str, torch.Tensor]:
    """Weights that keep activations near unit size, for a module on the meta device."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, like in module.state_dict().items():
        noise = torch.randn(like.shape, generator=generator)
        if like.ndim > 1:
            weights[name] = noise / like[0].numel() ** 0.5
        else:
            weights[name] = (1.0 if name.endswith("weight") else 0.0) + 0.05 * noise
    return weights


@dataclass(frozen=True)
class World:
    """A model of the host, the pack's nodes by id, and inputs for them."""

    model: Any
    nodes: dict[str, Any]
    adapter: Any
    prompt: Any

    @classmethod
    def build(cls) -> World:
        host.boot(host.require())
        pack = host.load_pack()
        extension = asyncio.run(pack.comfy_entrypoint())
        classes = asyncio.run(extension.get_node_list())
        nodes = {node.GET_SCHEMA().node_id: node for node in classes}
        model = _model()
        return cls(model, nodes, _adapter(pack, model), _prompt())

    def apply(self, model: Any, **settings: Any) -> Any:
        """`IPA_Apply` on `model`, λ = 1 unless told otherwise."""
        defaults = {"weight": 1.0, "start_at": 0.0, "end_at": 1.0, "combine": "concat"}
        node = self.nodes["IPA_Apply"]
        inputs = {"adapter": self.adapter, "image_prompt": self.prompt, **defaults, **settings}
        return node.execute(model=model, **inputs).args[0]


def thirds() -> list[torch.Tensor]:
    """Three masks side by side, which together cover the picture."""
    masks = [torch.zeros(1, 512, 512) for _ in range(3)]
    for i, mask in enumerate(masks):
        mask[..., 171 * i : 171 * (i + 1)] = 1
    return masks


@torch.no_grad()  # inference mode would take composite operations apart
def sample(model: Any, steps: int, size: int, batch: int = 1) -> torch.Tensor:
    """Euler with guidance over two conditionings, latents of `size`²; the final latents."""
    samplers = importlib.import_module("comfy.samplers")
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(batch, 4, size, size, generator=generator)
    states = torch.randn(2, 1, 77, 768, generator=generator)
    positive, negative = ([[s, {}]] for s in states)
    sampler = samplers.KSampler(model, steps, torch.device("cpu"), "euler", "normal", 1.0)
    latent = torch.zeros_like(noise)
    return sampler.sample(
        noise, positive, negative, 7.5, latent_image=latent, disable_pbar=True, seed=0
    )


def _model() -> Any:
    ops = importlib.import_module("comfy.ops")
    sd = importlib.import_module("comfy.sd")
    openai = importlib.import_module("comfy.ldm.modules.diffusionmodules.openaimodel")
    unet = openai.UNetModel(
        **SD15, device="meta", dtype=torch.float32, operations=ops.disable_weight_init
    )
    return sd.load_diffusion_model_state_dict(random_weights(unet, seed=0))


def _adapter(pack: Any, model: Any) -> Any:
    """A base adapter, through a file and the host's memory management as `IPA_LoadAdapter`."""
    name = f"{pack.__name__}.ip_adapter_core"
    core = importlib.import_module(f"{name}.adapter")
    layers = importlib.import_module(f"{name}.comfyui.layers")
    widths = [x.dim for x in layers.cross_attention_layers(model.model.diffusion_model)]
    sizes = (("feature_dim", 1024), ("cross_attention_dim", 768), ("tokens", 4))
    spec = core.AdapterSpec("base", sizes, tuple(widths))
    module = core.IPAdapter(spec, device="meta")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "adapter.safetensors"
        save_file = importlib.import_module("safetensors.torch").save_file
        save_file({k: v.half() for k, v in random_weights(module, seed=1).items()}, path)
        return importlib.import_module(f"{name}.comfyui.adapter").load_adapter(path)


def _prompt() -> Any:
    prompt = importlib.import_module(f"{host.PACK}.ip_adapter_core.image_prompt")
    generator = torch.Generator().manual_seed(2)
    image = prompt.ImageFeatures(
        torch.randn(1, 1024, generator=generator), torch.randn(1, 257, 1280, generator=generator)
    )
    empty = prompt.ImageFeatures(
        torch.zeros(1, 1024), torch.randn(1, 257, 1280, generator=generator)
    )
    return prompt.ImagePrompt(image, empty, "random features")
