"""Where image prompts act: their share in each cross-attention layer while a picture is sampled.

A layer's output is text + Σ image. At a place of the picture the share of prompt p is
‖image_p‖ / (‖text‖ + Σ ‖image‖), norms over the channels: 0 where it adds nothing, whatever λ and
mask are. Only the positive rows are looked at.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from ..attention import add
from ..presets import Block, block_name
from .conditioning import Run
from .layers import Layer
from .patch import RECORD, DecoupledAttention, Model, with_wrappers

_MOST = 64  # blocks of a side
POSITIVE = 0  # the host's number for it in cond_or_uncond


@dataclass(frozen=True, eq=False)
class Share:
    """Of one block at one evaluation: `maps (B, prompts, height, width)`, the mean of the block's
    layers, for the latents `frames`, at the sigma `(1,)`."""

    sigma: Tensor
    block: Block
    frames: tuple[int, ...]
    maps: Tensor
    layers: int = 1


@dataclass(eq=False)
class Record:
    """What the last run that it watched left: filled while sampling, empty before."""

    shares: list[Share] = field(default_factory=list)
    latent: tuple[int, int] = (0, 0)
    model_sampling: Any = None

    def begin(self, run: Run) -> None:
        """A run starts; the one before is forgotten. Keeps nothing of it that is on the device."""
        self.shares, self.latent, self.model_sampling = [], run.latent, run.model_sampling

    def end(self) -> None:
        """The maps leave the device."""
        self.shares = [
            Share(s.sigma.cpu(), s.block, s.frames, s.maps.float().cpu() / s.layers)
            for s in self.shares
        ]

    def watched(
        self, attention: DecoupledAttention, layer: Layer, options: dict[str, Any]
    ) -> Callable[..., Tensor]:
        """The same attention, bit for bit, with its images' shares written down."""
        chunks = options["cond_or_uncond"]

        def attend(q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Tensor:
            text = out = attention.text(q, k, v, options)
            norms = []
            for image, mask in attention.images(q, options):
                out = add(out, image, mask)
                norms.append((image if mask is None else image * mask).float().norm(dim=-1))
            self._add(text.float().norm(dim=-1), torch.stack(norms, 1), layer, chunks, options)
            return out

        return attend

    def _add(
        self, text: Tensor, images: Tensor, layer: Layer, chunks: list[int], options: dict[str, Any]
    ) -> None:
        """Norms `text (rows, L)`, `images (rows, prompts, L)` of one layer."""
        height, width = options["activations_shape"][-2:]
        share = images / (text[:, None] + images.sum(1, keepdim=True)).clamp(min=1e-12)
        parts = share.unflatten(-1, (height, width)).chunk(len(chunks))
        positive = [part for part, kind in zip(parts, chunks, strict=True) if kind == POSITIVE]
        if not positive or not self._whole(options):
            return
        maps, block = torch.stack(positive).mean(0), layer.key[:2]
        last = self.shares[-1] if self.shares else None
        if last is not None and layer.key[2] > 0 and last.block == block:
            # Another transformer of the block that was just written down.
            self.shares[-1] = Share(
                last.sigma, block, last.frames, last.maps + maps, last.layers + 1
            )
            return
        frames = _frames(options.get("context_window"), len(maps))
        self.shares.append(Share(options["sigmas"][:1].clone(), block, frames, maps))

    def _whole(self, options: dict[str, Any]) -> bool:
        """Whether the rows show all of the picture; those of an area show a part."""
        shape = options.get("original_shape")
        return shape is None or tuple(shape[-2:]) == self.latent

    def heat(
        self, blocks: Collection[Block] | None, start: float, end: float, prompt: int
    ) -> Tensor:
        """The mean share over these blocks (None: all) and the steps between the two fractions of
        the schedule: `(latents, height, width)` at the latent's size.

        `prompt`: its number from 1, in the order of application; 0 for all together. Raises
        ValueError if nothing was recorded, or nothing of what is asked for.
        """
        if not self.shares:
            raise ValueError(
                "Nothing has been recorded: no image prompt was in force in a run of this record. "
                "Connect the model output of 'Record Image Attention' to the sampler that makes "
                "the picture, after 'Apply IP-Adapter', with a weight other than 0. (Prompts "
                "that are limited to an area cannot be recorded.)"
            )
        sampling = self.model_sampling
        first, last = sampling.percent_to_sigma(start), sampling.percent_to_sigma(end)
        own = [s for s in self.shares if last <= float(s.sigma[0]) <= first]
        if not own:
            raise ValueError(
                f"No step with an image prompt lies between {start:g} and {end:g} of the schedule. "
                "Widen start_at … end_at."
            )
        known = list(dict.fromkeys(share.block for share in own))
        chosen = known if blocks is None else [block for block in known if block in blocks]
        if not chosen:
            raise ValueError(
                "None of the blocks asked for was recorded; expected some of "
                f"{', '.join(map(block_name, known))}."
            )
        prompts = max(share.maps.shape[1] for share in own)
        if prompt > prompts:
            raise ValueError(
                f"image_prompt is {prompt}, but {prompts} were in force: give a number up to "
                f"{prompts}, or 0 for all together."
            )
        return self._mean([share for share in own if share.block in chosen], prompt)

    def _mean(self, shares: Sequence[Share], prompt: int) -> Tensor:
        height, width = self.latent
        total: dict[int, Tensor] = defaultdict(lambda: torch.zeros(height, width))
        count: dict[int, int] = defaultdict(int)
        for share in shares:
            own = share.maps if prompt == 0 else share.maps[:, prompt - 1 : prompt]
            maps = interpolate(own.sum(1, keepdim=True), (height, width), mode="bilinear")[:, 0]
            for frame, one in zip(share.frames, maps, strict=True):
                total[frame] = total[frame] + one
                count[frame] += 1
        return torch.stack([total[frame] / count[frame] for frame in sorted(total)])


def _frames(window: Any, count: int) -> tuple[int, ...]:
    """Which latents the rows are: all, or those of the host's context window."""
    if window is None:
        return tuple(range(count))
    anchor = getattr(window, "causal_anchor_index", None)
    return (*(() if anchor is None else (anchor,)), *window.index_list)


def blocks_of(text: str) -> Collection[Block] | None:
    """ "all", or blocks and sides, "input 8, output": None, or the blocks meant. Raises ValueError
    for what is neither."""
    entries = [entry.strip().lower() for entry in re.split("[,;\n]", text) if entry.strip()]
    if not entries or "all" in entries:
        return None
    found: set[Block] = set()
    for entry in entries:
        match = re.fullmatch(r"(input|middle|output)(?:\s+(\d+))?", entry)
        if match is None:
            raise ValueError(
                f"blocks has {entry!r}; expected all, input, middle, output, or single blocks such "
                "as 'input 8, output 1'."
            )
        numbers = range(_MOST) if match[2] is None else [int(match[2])]
        found |= {(match[1], number) for number in numbers}
    return found


def recording(model: Model) -> tuple[Model, Record]:
    """A clone of the model whose runs are watched, and what they leave."""
    record = Record()
    patched = with_wrappers(model)
    patched.set_attachments(RECORD, record)
    return patched, record
