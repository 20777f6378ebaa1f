"""The drawings of a set in memory, with their subjects, hands and splits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2.functional import gaussian_blur

from training.data.image import open_image
from training.recipes.emoji.drawings import HANDS, caption

BLUR, SHARPEST, BLUNTEST, NOISE = 9, 0.3, 1.5, 0.03  # of what the judges learn from


class Pictures:
    """Rows of these lists in `folder`, every drawing once: `pixels (N, 3, h, w)`, 8 bits."""

    def __init__(self, folder: Path, *lists: str) -> None:
        self.folder = folder
        rows: list[dict[str, Any]] = []
        for name in lists:
            lines = (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
            rows += [json.loads(line) | {"list": name} for line in lines]
        self.rows = rows
        self.hands = [hand.package for hand in HANDS]
        self.subjects = sorted({row["subject"] for row in rows})
        number = {subject: i for i, subject in enumerate(self.subjects)}
        self.hand = torch.tensor([self.hands.index(row["hand"]) for row in rows])
        self.subject = torch.tensor([number[row["subject"]] for row in rows])
        self.every = torch.arange(len(rows))
        held = torch.tensor([row["list"] == "held_out" for row in rows])
        self.trained, self.held_out = self.every[~held], self.every[held]
        names = {hand.package: hand.name for hand in HANDS}
        self.descriptions = [f"{caption(r['subject'])}, {names[r['hand']]}" for r in rows]
        pictures = folder / "pictures"
        self.pixels = torch.stack([_pixels(pictures / row["file_name"]) for row in rows])

    def images(self, numbers: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return images `(N, 3, h, w)`, 0 … 1; with a generator half of them mirrored."""
        images = self.pixels[numbers].float() / 255
        if generator is None:
            return images
        turned = torch.rand(len(images), generator=generator) < 0.5
        return torch.where(turned[:, None, None, None], images.flip(-1), images)

    def held_out_for(self, why: str) -> Tensor:
        """Return the numbers of what is held out as a "subject", a "hand" or a "drawing"."""
        return torch.tensor([n for n, row in enumerate(self.rows) if row.get("held_out") == why])

    def labels(self, kind: str) -> tuple[Tensor, Tensor]:
        """Return each drawing's class, and the numbers of those to learn from.

        Hands are learnt from subjects that are not held out, subjects from all drawings.
        """
        if kind == "hands":
            held = self.subject[self.held_out_for("subject")]
            return self.hand, self.every[~torch.isin(self.subject, held)]
        return self.subject, self.every


def _pixels(path: Path) -> Tensor:
    return torch.from_numpy(np.array(open_image(path))).permute(2, 0, 1)


def blurred(images: Tensor) -> Tensor:
    """Return images as a decoder may give them: half of them blurred, all with a little noise."""
    half = len(images) // 2
    sigma = float(SHARPEST + (BLUNTEST - SHARPEST) * torch.rand(()))
    images = torch.cat([gaussian_blur(images[:half], BLUR, sigma), images[half:]])
    return images + NOISE * torch.randn_like(images)
