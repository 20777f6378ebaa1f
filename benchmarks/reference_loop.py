"""The reference's training loop, derived anew: what tencent-ailab/IP-Adapter's tutorial_train.py
does in a step, with the parts of diffusers, transformers and torchvision.

Every step reads pictures in this process and encodes them, drawing its numbers as it goes; AdamW in
torch's default form; the loss is read at once. Its accelerator is left out: in one process in
float32 it only costs time.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from PIL import Image
from torch import Tensor
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from transformers import (
    CLIPImageProcessor,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
)

from training.config import Settings

DROP = 0.05  # each of: image, text, both


class Pictures(Dataset[dict[str, Any]]):
    """Rows of a folder's metadata.jsonl, all in memory."""

    def __init__(self, folder: Path, tokenizer: Any, processor: Any, size: int) -> None:
        lines = (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
        self.rows = [json.loads(line) for line in lines]
        self.folder, self.tokenizer, self.processor = folder, tokenizer, processor
        self.transform = transforms.Compose(
            [
                transforms.Resize(size),
                transforms.CenterCrop(size),
                transforms.ToTensor(),
                transforms.Normalize([0.5], [0.5]),
            ]
        )

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[index]
        picture = Image.open(self.folder / row["file_name"])
        dropped = random.choices(("", "image", "text", "both"), (1 - 3 * DROP, DROP, DROP, DROP))[0]
        text = "" if dropped in ("text", "both") else row["text"]
        tokens = self.tokenizer(
            text, padding="max_length", truncation=True, max_length=77, return_tensors="pt"
        )
        return {
            "pixels": self.transform(picture.convert("RGB")),
            "reference": self.processor(picture, return_tensors="pt").pixel_values[0],
            "tokens": tokens.input_ids[0],
            "drop_image": dropped in ("image", "both"),
        }


class Reference:
    """The loop with the modules of `settings` and an adapter that starts from `weights`, keys as
    `IPAdapter.state_dict` has them."""

    def __init__(self, settings: Settings, pictures: Path, weights: Mapping[str, Tensor]) -> None:
        base, encoder = settings.base, settings.image_encoder
        self.unet = UNet2DConditionModel.from_pretrained(base, subfolder="unet")
        self.vae = AutoencoderKL.from_pretrained(base, subfolder="vae")
        self.text = CLIPTextModel.from_pretrained(base, subfolder="text_encoder")
        self.vision = CLIPVisionModelWithProjection.from_pretrained(encoder)
        self.schedule = DDPMScheduler.from_pretrained(base, subfolder="scheduler")
        for part in (self.unet, self.vae, self.text, self.vision):
            part.requires_grad_(False)
        parts: dict[str, dict[str, Tensor]] = {"image_proj": {}, "ip_adapter": {}}
        for key, value in weights.items():
            part, name = key.split(".", 1)
            parts[part][name] = value.clone()
        self.unet._load_ip_adapter_weights([parts])
        trained = [
            parameter.requires_grad_(True)
            for name, parameter in self.unet.named_parameters()
            if "_ip." in name or name.startswith("encoder_hid_proj.")
        ]
        self.optimizer = torch.optim.AdamW(
            trained, lr=settings.learning_rate, weight_decay=settings.weight_decay
        )
        tokenizer = CLIPTokenizer.from_pretrained(base, subfolder="tokenizer")
        processor = CLIPImageProcessor.from_pretrained(encoder)
        self.dataset = Pictures(pictures, tokenizer, processor, settings.size)
        self.batches = self._batches(DataLoader(self.dataset, settings.batch_size, shuffle=True))

    @staticmethod
    def _batches(loader: DataLoader[Any]) -> Iterator[dict[str, Tensor]]:
        while True:
            yield from loader

    def step(self) -> float:
        """One step of training; its loss."""
        loss = self.loss(next(self.batches))
        value = loss.item()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return value

    def loss(
        self, batch: Mapping[str, Tensor], drawn: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """`drawn`: `latent_noise`, `noise` and `timestep`, if not to be drawn here."""
        with torch.no_grad():
            posterior = self.vae.encode(batch["pixels"]).latent_dist
        if drawn is None:
            drawn = self._draw(posterior.mean)
        latents = posterior.mean + posterior.std * drawn["latent_noise"]
        noise, timestep = drawn["noise"], drawn["timestep"]
        noisy = self.schedule.add_noise(latents * self.vae.config.scaling_factor, noise, timestep)
        with torch.no_grad():
            embeds = self.vision(batch["reference"]).image_embeds
            embeds = torch.where(batch["drop_image"][:, None], 0.0, embeds)
            states = self.text(batch["tokens"]).last_hidden_state
        predicted = self.unet(
            noisy, timestep, states, added_cond_kwargs={"image_embeds": [embeds[:, None]]}
        ).sample
        return mse_loss(predicted, noise)

    def _draw(self, like: Tensor) -> dict[str, Tensor]:
        return {
            "latent_noise": torch.randn_like(like),
            "noise": torch.randn_like(like),
            "timestep": torch.randint(0, self.schedule.config.num_train_timesteps, (len(like),)),
        }
