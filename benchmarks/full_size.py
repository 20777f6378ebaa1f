"""Models of SD1.5's and SDXL's full size with random weights, and sampling with them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from tests.support import checkpoint_layouts as layouts
from tests.support import faces
from tests.support.checkpoint_layouts import SD15, UNet
from tests.support.random_models import fill, weights
from tools.comfyui import install as host

EMBED, STATES = 1024, 1280  # of ViT-H


@dataclass(frozen=True)
class Setup:
    """A model of the host, an adapter and an image prompt for it; latents are `side`²."""

    size: UNet
    side: int
    model: Any
    adapter: Any
    prompt: Any

    @classmethod
    def build(cls, size: UNet = SD15, side: int = 64, dtype: torch.dtype = torch.float32) -> Setup:
        """Boot the host and make all of it."""
        host.boot(host.require())
        host.load_pack()
        return cls(size, side, _model(size, dtype), _adapter(size), _prompt())

    def of_faces(self) -> Setup:
        """Return the same with a FaceID adapter, its LoRA included, and a prompt of a face."""
        adapter = _loaded(faces.tensors("faceid", self.size.widths, self.size.context))
        return replace(self, adapter=adapter, prompt=_face_prompt())

    def apply(self, model: Any, **settings: Any) -> Any:
        """Apply `IPA_Apply` to `model`, λ = 1 unless `settings` say otherwise."""
        from comfyui_ip_adapter.nodes.apply import ApplyIPAdapter

        defaults = {"weight": 1.0, "start_at": 0.0, "end_at": 1.0, "combine": "concat"}
        inputs = {"adapter": self.adapter, "image_prompt": self.prompt, **defaults, **settings}
        return ApplyIPAdapter.execute(model=model, **inputs).args[0]

    @torch.no_grad()  # inference mode would take composite operations apart
    def sample(
        self, model: Any, steps: int = 1, after_step: Callable[..., None] | None = None
    ) -> torch.Tensor:
        """Sample with Euler and guidance over two conditionings; return the final latents."""
        import comfy.samplers

        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(1, 4, self.side, self.side, generator=generator)
        states = torch.randn(2, 1, 77, self.size.context, generator=generator)
        pooled = {"pooled_output": torch.zeros(1, layouts.POOLED)} if self.size.sdxl else {}
        positive, negative = ([[s, pooled]] for s in states)
        sampler = comfy.samplers.KSampler(model, steps, model.load_device, "euler", "normal", 1.0)
        return sampler.sample(
            noise,
            positive,
            negative,
            7.5,
            latent_image=torch.zeros_like(noise),
            callback=after_step,
            disable_pbar=True,
            seed=0,
        )

    def variants(self, apply: Callable[..., Any] | None = None) -> dict[str, Any]:
        """Return models with one prompt, one with a mask, three, and three with masks.

        Args:
            apply: Another pack's node in place of ours: a model and perhaps a mask to a model.
        """
        masks = thirds()

        def in_a_row(*of: torch.Tensor | None) -> Any:
            patched = self.model
            for mask in of:
                patched = (apply or self.apply)(patched, mask=mask)
            return patched

        return {
            "one": in_a_row(None),
            "mask": in_a_row(masks[0]),
            "three": in_a_row(None, None, None),
            "three_masks": in_a_row(*masks),
        }


def thirds() -> list[torch.Tensor]:
    """Return three masks side by side, which together cover the image."""
    masks = [torch.zeros(1, 512, 512) for _ in range(3)]
    for i, mask in enumerate(masks):
        mask[..., 171 * i : 171 * (i + 1)] = 1
    return masks


def _model(size: UNet, dtype: torch.dtype) -> Any:
    from comfy import model_management, model_patcher, supported_models

    config = (supported_models.SDXL if size.sdxl else supported_models.SD15)({})
    config.unet_config = {**size.comfy_config(), "dtype": dtype}
    config.manual_cast_dtype = None
    model = config.get_model({}, device=torch.device("cpu"))
    fill(model.diffusion_model, seed=0)
    return model_patcher.CoreModelPatcher(
        model,
        load_device=model_management.get_torch_device(),
        offload_device=model_management.unet_offload_device(),
    )


def _adapter(size: UNet) -> Any:
    """Make a base adapter."""
    projection = layouts.linear_projection(EMBED, size.context)
    layout = layouts.ip_adapter(projection, size.widths, size.context)
    return _loaded(weights(layout, seed=1, dtype=torch.float16))


def _loaded(state: dict[str, torch.Tensor]) -> Any:
    """Return an adapter through a file and the host's memory management."""
    from comfyui_ip_adapter.ip_adapter_core.comfyui.loaders import load_adapter
    from safetensors.torch import save_file

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "adapter.safetensors"
        save_file(state, path)
        return load_adapter(path)


def _prompt() -> Any:
    from comfyui_ip_adapter.ip_adapter_core.image_prompt import ImageFeatures, ImagePrompt

    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(2, 1, 257, STATES, generator=generator)
    image = ImageFeatures(torch.randn(1, EMBED, generator=generator), hidden[0])
    return ImagePrompt(image, ImageFeatures(torch.zeros(1, EMBED), hidden[1]), "random features")


def _face_prompt() -> Any:
    from comfyui_ip_adapter.ip_adapter_core.image_prompt import bare

    face = torch.randn(1, 512, generator=torch.Generator().manual_seed(3))
    return bare("face_embeds", face, torch.zeros_like(face))
