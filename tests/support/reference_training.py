"""The reference's training step, derived anew; it shares nothing with ours.

What tencent-ailab/IP-Adapter's tutorial_train.py and tutorial_train_sdxl.py do, with the parts of
diffusers and transformers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor
from torch.nn import Parameter
from torch.nn.functional import mse_loss
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPVisionModelWithProjection

from tests.support.random_models import sections

TIMESTEPS = 1000


class ReferenceStep:
    """Models of a base, an image encoder and an adapter.

    `start`: the adapter's weights, keys as `IPAdapter.state_dict` has them.
    """

    def __init__(self, base: str, image_encoder: str, start: Mapping[str, Tensor], sdxl: bool):
        self.unet = UNet2DConditionModel.from_pretrained(base, subfolder="unet")
        self.vae = AutoencoderKL.from_pretrained(base, subfolder="vae")
        self.texts = [CLIPTextModel.from_pretrained(base, subfolder="text_encoder")]
        if sdxl:
            second = CLIPTextModelWithProjection.from_pretrained(base, subfolder="text_encoder_2")
            self.texts.append(second)
        self.vision = CLIPVisionModelWithProjection.from_pretrained(image_encoder).eval()
        for frozen in (self.unet, self.vae, self.vision, *self.texts):
            frozen.requires_grad_(False)
        state = {key: value.clone() for key, value in start.items()}
        self.unet._load_ip_adapter_weights([sections(state)])
        self.trained: dict[str, Parameter] = {
            name: parameter.requires_grad_(True)
            for name, parameter in self.unet.named_parameters()
            if "_ip." in name or name.startswith("encoder_hid_proj.")
        }
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, TIMESTEPS, dtype=torch.float64) ** 2
        self.signal = torch.cumprod(1 - betas, 0).float()

    def text(self, tokens: Sequence[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the UNet's text and, for SDXL, what else it is given; tokens for each encoder."""
        if len(self.texts) == 1:
            return self.texts[0](tokens[0]).last_hidden_state, {}
        outputs: list[Any] = [
            encoder(ids, output_hidden_states=True)
            for encoder, ids in zip(self.texts, tokens, strict=True)
        ]
        states = torch.cat([out.hidden_states[-2] for out in outputs], -1)
        return states, {"text_embeds": outputs[1].text_embeds}

    def latents(self, pixels: Tensor, noise: Tensor | None = None) -> Tensor:
        """Sample the VAE's latents, with `noise` if it is not to be drawn here."""
        posterior = self.vae.encode(pixels).latent_dist
        noise = torch.randn_like(posterior.mean) if noise is None else noise
        return (posterior.mean + posterior.std * noise) * self.vae.config.scaling_factor

    def loss(
        self, batch: Mapping[str, Any], latents: Tensor, noise: Tensor, timestep: Tensor
    ) -> Tensor:
        """Return a batch's loss; `tokens` are the empty text's where it is dropped."""
        signal = self.signal[timestep].view(-1, 1, 1, 1)
        noisy = signal.sqrt() * latents + (1 - signal).sqrt() * noise
        states, added = self.text(batch["tokens"])
        if added:
            added["time_ids"] = batch["time_ids"]
        embeds = self.vision(batch["reference"]).image_embeds
        embeds = torch.where(batch["drop_image"][:, None], 0.0, embeds)
        conditions: dict[str, Any] = {**added, "image_embeds": [embeds[:, None]]}
        predicted = self.unet(noisy, timestep, states, added_cond_kwargs=conditions).sample
        return mse_loss(predicted, noise)


def dropped(tokens: Sequence[Tensor], empty: Sequence[Tensor], drop: Tensor) -> list[Tensor]:
    """Return every encoder's tokens, the empty text's in the rows that `drop` their text."""
    return [torch.where(drop[:, None], e[None], t) for t, e in zip(tokens, empty, strict=True)]
