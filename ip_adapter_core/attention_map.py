"""Where image prompts acted in a sampling run: means over what was written down of it.

A layer's output is text + Σ image. At a place of the image the share of prompt p is
‖image_p‖ / (‖text‖ + Σ ‖image‖), norms over the channels: between 0, where it adds nothing, and 1,
whatever λ and mask are.

A prompt's mean is one over the evaluations and texts in which it was in force: texts of one
evaluation count alike, whatever strength or mask the conditioning gives them; then evaluations at
one sigma (Heun's) count together as one step; then steps and blocks alike.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from .latent_weights import plain
from .layer_weights import Block, block_name

Wanted: TypeAlias = tuple[str, int | None]
"""A side of the UNet and the number of a block there, None for all of them; ("all", None)."""

_ANEW = "if it is, its result came from the cache: change the seed, so that it samples anew"
KEPT = 32  # runs: lists of latents, and results that the host has cached, are of different ones
LIMIT = 256_000_000  # bytes of their maps: fewer runs where these are larger, but the last one
# From nothing to all, dark to light, so that it reads in grey too.
_COLORS = ((0.00, 0.00, 0.16), (0.36, 0.06, 0.46), (0.78, 0.18, 0.34), (0.98, 0.55, 0.12))
_LIGHTEST = (1.00, 0.97, 0.66)
_NO_AREA = "(A prompt that is limited to an area cannot be recorded.)"


@dataclass(frozen=True, eq=False)
class Share:
    """The shares of one block at one evaluation at `sigma`.

    `maps (texts, frames, slots, height, width)`: the mean of the block's layers. `frames`: which
    latents of the run; `numbers`: for each text the number of the prompt in each slot, from 1, or 0
    for none.
    """

    sigma: float
    block: Block
    frames: tuple[int, ...]
    numbers: tuple[tuple[int, ...], ...]
    maps: Tensor

    def of(self, prompt: int) -> Iterator[Tensor]:
        """Yield `(frames, height, width)` for each text with that prompt in force.

        0: with any prompt, all of its prompts together.
        """
        for numbers, maps in zip(self.numbers, self.maps, strict=True):
            own = [i for i, number in enumerate(numbers) if number and prompt in (0, number)]
            if own:
                yield maps[:, own].sum(1)


@dataclass(frozen=True, eq=False)
class RecordedRun:
    """What one sampling run leaves, on the CPU.

    `samples (N, C, height, width)`: the latents that it made; `size`: (height, width) of a latent;
    `prompts`: how many were applied to the positive side; `sigma_at`: the model's sigma at a
    fraction 0 … 1 of the schedule; `pieces`: whether parts of the image were sampled apart, which
    no share is of.
    """

    samples: Tensor
    prompts: int
    sigma_at: Callable[[float], float]
    shares: Sequence[Share]
    pieces: bool = False

    @property
    def nbytes(self) -> int:
        """Of all maps."""
        return sum(share.maps.nbytes for share in self.shares)

    @property
    def size(self) -> tuple[int, int]:
        return self.samples.shape[-2], self.samples.shape[-1]

    def made(self, samples: Tensor) -> bool:
        """Whether these latents are its result, as the sampler's node hands it over."""
        if samples.shape != self.samples.shape:
            return False
        return torch.equal(self.samples.to(samples.dtype), samples.cpu())

    def heat(self, blocks: Sequence[Wanted], start: float, end: float, prompt: int) -> Tensor:
        """Return the mean share over these blocks and steps: `(N, height, width)`, 0 … 1.

        `start` and `end` are fractions of the schedule. `prompt`: its number from 1, in the order
        of application; 0 for all together. Raises ValueError if nothing was recorded, or nothing of
        what is asked for.
        """
        if not self.shares and self.pieces:
            raise ValueError(
                "The image was sampled in pieces (tiles), of which none shows where in the whole "
                "an image prompt acts. Record a run without the node that cuts it."
            )
        if not self.shares:
            raise ValueError(
                "No image prompt was in force in this sampling run. Connect the sampler to a model "
                "that went through both 'Apply IP-Adapter', with a weight other than 0, and "
                f"'Record Image Attention'. {_NO_AREA}"
            )
        if prompt > self.prompts:
            raise ValueError(
                f"prompt_number is {prompt}, but {self.prompts} were applied: give a number up to "
                f"{self.prompts}, or 0 for all together."
            )
        chosen = self._blocks(blocks)
        found = self._mean([s for s in self._between(start, end) if s.block in chosen], prompt)
        if found is None:
            raise ValueError(
                f"Image prompt {prompt} was not in force between {start:g} and {end:g} of the "
                f"schedule. Widen start_at … end_at. {_NO_AREA}"
            )
        return found

    def _between(self, start: float, end: float) -> list[Share]:
        if start > end:
            raise ValueError(
                f"start_at ({start:g}) lies after end_at ({end:g}). Both are fractions of the "
                "schedule, 0 its first step and 1 its end: swap them."
            )
        first, last = self.sigma_at(start), self.sigma_at(end)
        own = [share for share in self.shares if last <= share.sigma <= first]
        if not own:
            raise ValueError(
                f"No step with an image prompt lies between {start:g} and {end:g} of the schedule. "
                "Widen start_at … end_at."
            )
        return own

    def _blocks(self, wanted: Sequence[Wanted]) -> set[Block]:
        known = dict.fromkeys(share.block for share in self.shares)
        found: set[Block] = set()
        for side, number in wanted:
            own = {b for b in known if side in ("all", b[0]) and number in (None, b[1])}
            if not own:
                asked = side if number is None else f"{side} {number}"
                raise ValueError(
                    f"blocks has {asked!r}, which was not recorded; expected all, or some of "
                    f"{', '.join(map(block_name, known))}."
                )
            found |= own
        return found

    def _mean(self, shares: Sequence[Share], prompt: int) -> Tensor | None:
        """Over the texts and evaluations of each step and block first, then over those."""
        count = len(self.samples)
        totals: dict[tuple[float, Block], Tensor] = defaultdict(
            lambda: torch.zeros(count, *self.size)
        )
        counts: dict[tuple[float, Block], Tensor] = defaultdict(lambda: torch.zeros(count, 1, 1))
        for share in shares:
            frames, place = torch.tensor(share.frames), (share.sigma, share.block)
            for maps in share.of(prompt):
                totals[place].index_add_(0, frames, resize_maps(maps, *self.size))
                counts[place].index_add_(0, frames, torch.ones(len(frames), 1, 1))
        if not totals:
            return None
        return torch.stack([totals[place] / counts[place] for place in totals]).nanmean(0)


def of_samples(runs: Sequence[RecordedRun], samples: Tensor) -> RecordedRun:
    """Return the last of these runs that made the latents.

    Raises ValueError if none did.
    """
    if not runs:
        raise ValueError(
            "Nothing has been recorded. Connect the model output of 'Record Image Attention' to "
            f"the sampler that makes the samples; {_ANEW}."
        )
    for run in reversed(runs):
        if run.made(samples):
            return run
    raise ValueError(
        f"samples are of none of the {len(runs)} sampling runs that this record holds (the last "
        f"ones are kept, at most {KEPT}: of a longer list of latents, record some at a time). "
        "Connect the LATENT output of the sampler that uses the recorded model, unchanged; "
        f"{_ANEW}."
    )


def blocks_of(text: str) -> list[Wanted]:
    """Parse "all", or blocks and sides as in "input 8, output"; "" is all.

    Raises ValueError for what is neither.
    """
    entries = [entry.strip().lower() for entry in re.split("[,;\n]", plain(text)) if entry.strip()]
    found: list[Wanted] = []
    for entry in entries or ["all"]:
        match = re.fullmatch(r"(all)|(input|middle|output|double|single)(?:\s+(\d+))?", entry)
        if match is None:
            raise ValueError(
                f"blocks has {entry!r}; expected all, input, middle, output, or single blocks such "
                "as 'input 8, output 1' (of a Flux: double, single, 'double 3')."
            )
        found.append((match[1] or match[2], int(match[3]) if match[3] else None))
    return found


def resize_maps(maps: Tensor, height: int, width: int) -> Tensor:
    """Resize maps `(N, h, w)` to an image's size, `(N, height, width)`."""
    return interpolate(maps[:, None], (height, width), mode="bilinear")[:, 0]


def check_images(images: Tensor, maps: Tensor) -> None:
    """Raise ValueError unless `images (N, H, W, C)` can be those of `maps (N, h, w)`.

    They are as many, and of the same shape but for the size, to 2 percent.
    """
    if len(images) != len(maps):
        raise ValueError(
            f"image holds {len(images)} pictures, but samples {len(maps)} latents. Connect the "
            "pictures decoded from these samples, all of them."
        )
    (height, width), (rows, columns) = images.shape[1:3], maps.shape[1:]
    if abs(width * rows - height * columns) > 0.02 * height * columns:
        raise ValueError(
            f"image is {width}×{height} pixels, but samples {columns}×{rows} latents: expected a "
            "picture of the same proportions. Connect the one decoded from these samples, uncut."
        )


def colorize(maps: Tensor) -> Tensor:
    """Return maps `(N, H, W)` as colors, `(N, H, W, 3)`.

    The colors go from 0 to the largest value among all maps, so that a map that stays below 0.001
    looks like one that reaches 0.5.
    """
    table = torch.tensor([*_COLORS, _LIGHTEST])
    place = maps / maps.max().clamp(min=1e-12) * (len(table) - 1)
    low = place.floor().long().clamp(0, len(table) - 2)
    part = (place - low)[..., None]
    return torch.lerp(table[low], table[low + 1], part)


def overlay(images: Tensor, maps: Tensor, opacity: float) -> Tensor:
    """Lay the colors of `maps (N, H, W)` over `images (N, H, W, C)`: `(N, H, W, 3)`.

    The first three channels count. `opacity`: 0 for the image alone, 1 for the map alone.
    """
    return torch.lerp(images[..., :3], colorize(maps).to(images), opacity)
