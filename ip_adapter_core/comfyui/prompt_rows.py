"""Image prompts as part of ComfyUI's conditionings.

A conditioning carries `CompiledPrompt`s (see conditioning.py); when sampling starts they become
`PromptRows`, which ComfyUI slices, repeats and concatenates like everything else there
(and tells the area, for masks), so that its rows always lie beside the right latents.

A run of two texts and two latents, one image prompt, per latent: OUTER_SAMPLE gives the positive
text rows [0, 1] with (K'₀V'₀, K'₁V'₁), the negative one rows [0, 1] with the zero image's. A
context window of the second latent makes both [1]. At a step outside the prompt's window both
entries are taken out. Inside, ComfyUI concatenates them for one UNet call of two texts, which gets
[K'₁V'₁, zero K'V'] beside [latent 1 with the positive text, latent 1 with the negative one].
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import comfy.conds
import comfy.utils
import torch
from torch import Tensor

from ..packing import Packed
from ..variants import CROSS_ATTENTION, Place
from .layers import Layer
from .masks import Area, Deal, MaskRows, Masks, PreparedMasks, Size
from .schedule import Moment, PreparedSchedule, Schedule


@dataclass(frozen=True, eq=False)
class CompiledPrompt:
    """One image prompt on one side of guidance, ready for any number of runs.

    `packed` on the CPU, one row or one an image, `deal`t out to the latents; `layer_dims` of the
    model it is for, at the `place` where its adapter acts.
    """

    packed: Packed
    masks: Masks | None
    schedule: Schedule
    layer_dims: tuple[int, ...]
    deal: Deal = "in turn"
    place: Place = CROSS_ATTENTION

    def scaled(self, weight: float) -> CompiledPrompt:
        """Return the same prompt with λ times `weight`."""
        if weight == 1:
            return self
        return replace(self, packed=self.packed.scaled(weight, self.layer_dims))

    def prepare(self, run: SamplingRun) -> PreparedPrompt:
        """Move to the run's device and check against its model and batch."""
        dims = tuple(layer.dim for layer in run.layers[self.place])
        if dims != self.layer_dims:
            raise ValueError(
                f"The conditioning carries an image prompt for a model of {len(self.layer_dims)} "
                f"{self.place} layers, but the sampled model has {len(dims) or 'none'}"
                f"{' of other widths' if dims else ''}. Apply the adapter to the model that is "
                "sampled."
            )
        packed, masks = self.packed, self.masks
        numbers = run.per_latent(len(packed.tensor), "images", self.deal)
        if numbers is not None:
            packed = packed[numbers]
        if masks is not None and packed.fixed is not None:  # λ is in K' too
            weights = run.latent_weights(masks)
            packed, masks = packed.scaled(weights[:, None, None], dims), masks.unweighted
        packed = packed.to(run.device, run.dtype)
        _check_finite(packed.tensor)
        schedule = run.schedule(self.schedule)
        prepared = None if masks is None else run.masks(masks)
        if schedule.table is None:
            return PreparedPrompt(self, packed.tensor, prepared, schedule)
        fixed, linear = packed.line(dims)
        return PreparedPrompt(self, fixed, prepared, schedule, linear)


def _check_finite(packed: Tensor) -> None:
    """Raise ValueError for values that are not finite; waits for the device, once a run."""
    if not packed.isfinite().all():
        raise ValueError(
            f"The image prompt's keys and values are not finite in the model's {packed.dtype}. "
            "Lower weight and layer_weights, whose product is too large for it; if they are of "
            "usual size, the adapter's file is damaged: download it again."
        )


@dataclass(frozen=True, eq=False)
class SamplingRun:
    """What a sampling run tells the prompts: where, what, how many and how large."""

    layers: Mapping[Place, tuple[Layer, ...]]
    device: torch.device
    dtype: torch.dtype
    batch: int
    latent: tuple[int, int]
    model_sampling: Any
    sigmas: Tensor | None = None
    _prepared: dict[CompiledPrompt, PreparedPrompt] = field(default_factory=dict)
    _masks: dict[Masks, PreparedMasks] = field(default_factory=dict)
    _schedules: dict[Schedule, PreparedSchedule] = field(default_factory=dict)

    def schedule(self, asked: Schedule) -> PreparedSchedule:
        """Both sides of a prompt share one."""
        if asked not in self._schedules:
            self._schedules[asked] = asked.prepare(
                self.model_sampling, self.sigmas, self.device, self.dtype
            )
        return self._schedules[asked]

    def masks(self, given: Masks) -> PreparedMasks:
        """Deal masks out to the batch, once for both sides of a prompt.

        Raises ValueError if that cannot be.
        """
        if given not in self._masks:
            self._masks[given] = self._dealt(given)
        return self._masks[given]

    def _dealt(self, given: Masks) -> PreparedMasks:
        masks = 1 if given.masks is None else len(given.masks)
        numbers = self.per_latent(masks, "masks", given.deal)
        numbers = torch.zeros(1, dtype=torch.long) if numbers is None else numbers
        where = self.latent, self.device, self.dtype, given.resampling
        return PreparedMasks(given.masks, numbers, self.latent_weights(given), *where)

    def latent_weights(self, given: Masks) -> Tensor:
        """Return one weight a latent, or one for all. Raises ValueError for more than latents."""
        weights = given.weights
        if len(weights) > self.batch and given.deal == "in turn":
            raise ValueError(
                f"There are {len(weights)} latent_weights for a batch of {self.batch} "
                "latents: give as many as latents, or fewer, then the last one holds for the rest."
            )
        if len(weights) == 1:
            return weights
        return weights[torch.arange(self.batch).clamp(max=len(weights) - 1)]

    def per_latent(self, rows: int, name: str, deal: Deal) -> Tensor | None:
        """Return the number of each latent's row, `(B,)`, or None where there is one for all.

        Raises ValueError if they cannot be dealt out.
        """
        if rows == 1:
            return None
        latents = torch.arange(self.batch)
        if deal == "last repeated":
            return latents.clamp(max=rows - 1)
        if self.batch % rows:
            raise ValueError(
                f"{rows} {name} cannot be dealt out to a batch of {self.batch} latents: give "
                f"one, or a number that divides the batch (per_latent: latent i takes number "
                f"i mod {rows})."
            )
        return latents % rows

    def rows(self, prompts: Sequence[CompiledPrompt], positive: bool = False) -> PromptRows:
        """Lay the prompts beside the whole batch; each is moved once, however many share it."""
        for prompt in prompts:
            if prompt not in self._prepared:
                self._prepared[prompt] = prompt.prepare(self)
        latents = torch.arange(self.batch, device=self.device)
        prepared = tuple(self._prepared[prompt] for prompt in prompts)
        return PromptRows(latents, prepared, positive=positive)


@dataclass(frozen=True, eq=False)
class PreparedPrompt:
    """A prompt for the length of one run: on the device, in the UNet's dtype, in sigmas.

    Where a curve changes λ, `packed` is the part that λ leaves as it is, `linear` the other, and
    `factor (1,)` the curve's at the moment.
    """

    source: CompiledPrompt
    packed: Tensor
    mask: PreparedMasks | None
    schedule: PreparedSchedule
    linear: Tensor | None = None
    factor: Tensor | None = None

    def at_step(self, moment: Moment) -> PreparedPrompt | None:
        """Return the prompt as it is in force at that moment; None where it is not."""
        if self.schedule.windowed and not self.schedule.includes(moment.sigma):
            return None
        return replace(self, factor=moment.factor(self.schedule))

    def rows(self, latents: Tensor) -> Tensor:
        """Packed K'/V' beside these latents, given by their numbers `(B,)`."""
        packed = _beside(self.packed, latents)
        if self.linear is not None and self.factor is not None:
            packed = torch.addcmul(packed, _beside(self.linear, latents), self.factor)
        return packed.expand(len(latents), -1, -1)


class PromptRows(comfy.conds.CONDRegular):
    """Prompts of a conditioning while sampling.

    `cond (B,)` numbers the latents that the rows stand beside. Being a tensor of the batch's
    length it is sliced by whoever slices the batch, context windows for example. `area`: the part
    of the image that is sampled; `latent`: the size of the latents that are evaluated.
    `positive`: the guider's name for the conditioning says so.
    """

    def __init__(
        self,
        cond: Tensor,
        prompts: tuple[PreparedPrompt, ...],
        area: Area | None = None,
        positive: bool = False,
        latent: Size | None = None,
    ) -> None:
        super().__init__(cond)
        self.prompts = prompts
        self.area = area
        self.positive = positive
        self.latent = latent

    def _but(self, **changed: Any) -> PromptRows:
        names = ("cond", "prompts", "area", "positive", "latent")
        return PromptRows(**({name: getattr(self, name) for name in names} | changed))

    def _copy_with(self, cond: Tensor) -> PromptRows:
        return self._but(cond=cond)

    @property
    def changing(self) -> bool:
        """Whether a prompt is not the same at every step."""
        schedules = [prompt.schedule for prompt in self.prompts]
        return any(schedule.windowed or schedule.table is not None for schedule in schedules)

    def at_step(self, moment: Moment) -> PromptRows:
        """Only the prompts in force at that moment, as they are then."""
        prompts = (prompt.at_step(moment) for prompt in self.prompts)
        return self._but(prompts=tuple(prompt for prompt in prompts if prompt is not None))

    def for_latents(self, x: Tensor) -> PromptRows:
        """Beside these latents, over which the masks lie."""
        if all(prompt.mask is None for prompt in self.prompts):
            return self
        return self._but(latent=(x.shape[-2], x.shape[-1]))

    def process_cond(
        self, batch_size: int, area: Sequence[int] | None = None, **kwargs: Any
    ) -> PromptRows:
        rows = comfy.utils.repeat_to_batch_size(self.cond, batch_size)
        return self._but(cond=rows, area=None if area is None else tuple(area))

    def can_concat(self, other: Any) -> bool:
        return isinstance(other, PromptRows)

    def size(self) -> list[int]:
        return [len(self.cond)]

    def concat(self, others: Sequence[PromptRows]) -> list[Tensor | MaskRows | Place | None]:
        """Return what the model gets: packed K'/V', mask and place in turn, row-aligned.

        Conditionings of different prompts share a call: a prompt fills the next slot of its place
        and number of tokens, and rows without one get K' = V' = 0, which adds exactly nothing.
        """
        blocks = [self, *others]
        out: list[Tensor | MaskRows | Place | None] = []
        for prompts in slots(blocks):
            some = next(p for p in prompts if p is not None)
            packed = [b._packed(p, some) for b, p in zip(blocks, prompts, strict=True)]
            mask = None
            if any(p is not None and p.mask is not None for p in prompts):
                at = partial(_mask_levels, blocks, prompts)
                mask = MaskRows(at(None), at)
            rows = packed[0] if len(packed) == 1 else torch.cat(packed)
            out += rows, mask, some.source.place
        return out

    def by_slot(self) -> dict[tuple[Place, int, int], PreparedPrompt]:
        """By (place, tokens, how many of so many tokens come before)."""
        seen: Counter[tuple[Place, int]] = Counter()
        table = {}
        for prompt in self.prompts:
            kind = prompt.source.place, prompt.packed.shape[1]
            table[(*kind, seen[kind])] = prompt
            seen[kind] += 1
        return table

    def _packed(self, prompt: PreparedPrompt | None, like: PreparedPrompt) -> Tensor:
        if prompt is None:
            return like.packed.new_zeros(len(self.cond), *like.packed.shape[1:])
        return prompt.rows(self.cond)

    def mask_levels(self, prompt: PreparedPrompt | None, size: Size | None) -> Tensor | None:
        """Return the mask of one of its prompts beside its rows, None where there is none."""
        if prompt is None or prompt.mask is None:
            return None
        levels = prompt.mask.levels(self.latent, self.area, size)
        return _beside(levels, self.cond).expand(len(self.cond), -1, -1)


def _mask_levels(
    blocks: Sequence[PromptRows], prompts: Sequence[PreparedPrompt | None], size: Size | None
) -> Tensor:
    """Return one slot's mask beside the rows of all blocks: 1 where a block has none."""
    found = [b.mask_levels(p, size) for b, p in zip(blocks, prompts, strict=True)]
    some = next(levels for levels in found if levels is not None)
    rows = [
        some.new_ones(len(block.cond), 1, 1) if levels is None else levels
        for block, levels in zip(blocks, found, strict=True)
    ]
    tokens = max(levels.shape[1] for levels in rows)
    return torch.cat([levels.expand(-1, tokens, -1) for levels in rows])


def _beside(rows: Tensor, latents: Tensor) -> Tensor:
    """Return the rows of these latents; the only one, where there is one for all."""
    return rows if len(rows) == 1 else rows[latents]


def slots(blocks: Sequence[PromptRows]) -> list[list[PreparedPrompt | None]]:
    """Of each slot of a call that holds these blocks the prompt that every block has there."""
    tables = [block.by_slot() for block in blocks]
    used = dict.fromkeys(slot for table in tables for slot in table)
    return [[table.get(slot) for table in tables] for slot in used]
