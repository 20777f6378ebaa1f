"""The reference's training loop around `ReferenceStep`, its data by torchvision.

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
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from transformers import CLIPImageProcessor, CLIPTokenizer

from tests.support.reference_training import TIMESTEPS, ReferenceStep
from training.config import TrainConfig

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
    """The loop with the modules of `settings` and an adapter that starts from `weights`."""

    def __init__(
        self, settings: TrainConfig, pictures: Path, weights: Mapping[str, Tensor]
    ) -> None:
        base, encoder = settings.pretrained_model_name_or_path, str(settings.image_encoder_path)
        self.model = ReferenceStep(base, encoder, weights, sdxl=False)
        self.optimizer = torch.optim.AdamW(
            list(self.model.trained.values()),
            lr=settings.learning_rate,
            weight_decay=settings.adam_weight_decay,
        )
        tokenizer = CLIPTokenizer.from_pretrained(base, subfolder="tokenizer")
        processor = CLIPImageProcessor.from_pretrained(encoder)
        self.dataset = Pictures(pictures, tokenizer, processor, settings.resolution)
        loader = DataLoader(self.dataset, settings.train_batch_size, shuffle=True)
        self.batches = self._batches(loader)

    @staticmethod
    def _batches(loader: DataLoader[Any]) -> Iterator[dict[str, Tensor]]:
        while True:
            yield from loader

    def step(self) -> float:
        """Take one step of training; return its loss."""
        batch = next(self.batches)
        latents = self.model.latents(batch["pixels"])
        timestep = torch.randint(0, TIMESTEPS, (len(latents),))
        given = {**batch, "tokens": [batch["tokens"]]}
        loss = self.model.loss(given, latents, torch.randn_like(latents), timestep)
        value = loss.item()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return value
