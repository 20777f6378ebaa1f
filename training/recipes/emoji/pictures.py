"""The drawings of a set in memory, with their subjects, hands and splits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from training.data.image import open_image
from training.recipes.emoji.drawings import HANDS, number

MOVED = 4  # pixels at most, across and down


class Pictures:
    """Rows of plain.jsonl and held_out.jsonl in `folder`: `pixels (N, 3, h, w)`, 8 bits.

    The autoencoder learns from all of them, the encoder from `trained`, the judge of hands from all
    but the subjects held out; the base is `taught` so many of the subjects, which texts name.
    """

    def __init__(self, folder: Path, seed: int = 0, taught: int | None = None) -> None:
        self.folder = folder
        rows: list[dict[str, Any]] = []
        for name in ("plain", "held_out"):
            lines = (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
            rows += [json.loads(line) | {"list": name} for line in lines]
        self.rows = rows
        self.hands = [hand.package for hand in HANDS]
        self.subjects = sorted({row["subject"] for row in rows})
        index = {subject: n for n, subject in enumerate(self.subjects)}
        self.hand = torch.tensor([self.hands.index(row["hand"]) for row in rows])
        self.subject = torch.tensor([index[row["subject"]] for row in rows])
        self.every = torch.arange(len(rows))
        held = torch.tensor([row["list"] == "held_out" for row in rows])
        self.trained = self.every[~held]
        known = {rows[int(n)]["subject"] for n in self.trained}
        first = sorted(known, key=lambda subject: number(seed, "taught", subject))[:taught]
        self.taught = sorted(first)
        place = {subject: n for n, subject in enumerate(self.taught)}
        self.taught_subject = torch.tensor([place.get(row["subject"], -1) for row in rows])
        pictures = folder / "pictures"
        self.pixels = torch.stack([_pixels(pictures / row["file_name"]) for row in rows])

    def images(self, numbers: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return images `(N, 3, h, w)`, 0 … 1; with a generator moved, by halves mirrored."""
        images = self.pixels[numbers].float() / 255
        if generator is None:
            return images
        turned = torch.rand(len(images), generator=generator) < 0.5
        images = torch.where(turned[:, None, None, None], images.flip(-1), images)
        side = images.shape[-1]
        around = torch.nn.functional.pad(images, (MOVED,) * 4, value=1.0)
        places = torch.randint(2 * MOVED + 1, (2, len(images)), generator=generator)
        return torch.stack(
            [
                image[:, y : y + side, x : x + side]
                for image, y, x in zip(around, *places.tolist(), strict=True)
            ]
        )

    def described(self, numbers: Tensor, generator: torch.Generator) -> list[str]:
        """Return what drawings show and whose hand drew them, of half of them the hand alone.

        In a batch hardly any subject occurs twice: named by the whole alone, hands would decide
        nothing.
        """
        alone = torch.rand(len(numbers), generator=generator) < 0.5
        names = [HANDS[int(hand)].name for hand in self.hand[numbers]]
        texts = [self.rows[int(n)]["text"] for n in numbers]
        return [
            name if hand else f"{text}, {name}"
            for name, text, hand in zip(names, texts, alone, strict=True)
        ]

    def held_out_for(self, why: str) -> Tensor:
        """Return the numbers of what is held out as a "subject", a "hand" or a "drawing"."""
        return torch.tensor([n for n, row in enumerate(self.rows) if row.get("held_out") == why])

    def of_taught(self, numbers: Tensor) -> Tensor:
        """Return those of the numbers whose subjects the base is taught."""
        return numbers[self.taught_subject[numbers] >= 0]

    def labels(self, kind: str) -> tuple[Tensor, Tensor]:
        """Return each drawing's class, and the numbers of those to learn from.

        Hands are learnt from subjects that are not held out, taught subjects from all drawings.
        """
        if kind == "hands":
            held = self.subject[self.held_out_for("subject")]
            return self.hand, self.every[~torch.isin(self.subject, held)]
        return self.taught_subject, self.of_taught(self.every)


def _pixels(path: Path) -> Tensor:
    return torch.from_numpy(np.array(open_image(path))).permute(2, 0, 1)
