"""Image prompts as part of the host's conditionings.

`AttachedPrompts` is what a node writes into a conditioning's `model_conds`; when sampling starts
it becomes `PromptRows`, which the host slices, repeats and concatenates like everything else there
(and tells the area, for masks), so that its rows always lie beside the right latents.

A run of two texts and two latents, one image prompt, per latent: OUTER_SAMPLE gives the positive
text rows [0, 1] with (K'₀V'₀, K'₁V'₁), the negative one rows [0, 1] with the zero image's. A
context window of the second latent makes both [1]. At a step outside the prompt's window both
entries are taken out. Inside, the host concatenates them for one UNet call of two texts, which gets
[K'₁V'₁, zero K'V'] beside [latent 1 with the positive text, latent 1 with the negative one].
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import comfy.conds
import comfy.utils
import torch
from torch import Tensor

from ..prompt import split_values
from .layers import Layer
from .masks import mask_levels
from .schedule import Moment, PreparedSchedule, Schedule

KEY = "ip_adapter"


@dataclass(frozen=True, eq=False)
class CompiledPrompt:
    """One image prompt on one side of guidance, ready for any number of runs.

    `packed (R, T, 2·Σ widths)` on the CPU, R = 1 or one row an image; `mask (M, H, W)`;
    `layer_dims` of the model it is for.
    """

    packed: Tensor
    mask: Tensor | None
    schedule: Schedule
    layer_dims: tuple[int, ...]

    def prepare(self, run: Run) -> PreparedPrompt:
        """Move to the run's device and check against its model and batch."""
        dims = tuple(layer.dim for layer in run.layers)
        if dims != self.layer_dims:
            raise ValueError(
                f"The conditioning carries an image prompt for a model of {len(self.layer_dims)} "
                f"cross-attention layers, but the sampled model has {len(dims)} of other widths. "
                "Apply the adapter to the model that is sampled."
            )
        mask = None if self.mask is None else run.per_latent(self.mask, "masks or latent weights")
        packed = run.per_latent(self.packed, "images").to(run.device, run.dtype)
        schedule = run.schedule(self.schedule)
        parts = None if schedule.table is None else split_values(packed, self.layer_dims)
        return PreparedPrompt(packed, mask, run.latent, schedule, parts)


@dataclass(frozen=True, eq=False)
class Run:
    """What a sampling run tells the prompts: where, what, how many and how large."""

    layers: tuple[Layer, ...]
    device: torch.device
    dtype: torch.dtype
    batch: int
    latent: tuple[int, int]
    model_sampling: Any
    sigmas: Tensor | None = None
    _prepared: dict[CompiledPrompt, PreparedPrompt] = field(default_factory=dict)
    _schedules: dict[Schedule, PreparedSchedule] = field(default_factory=dict)

    def schedule(self, asked: Schedule) -> PreparedSchedule:
        """Both sides of a prompt share one."""
        if asked not in self._schedules:
            self._schedules[asked] = asked.prepare(
                self.model_sampling, self.sigmas, self.device, self.dtype
            )
        return self._schedules[asked]

    def per_latent(self, rows: Tensor, name: str) -> Tensor:
        """One row, or one for each latent of the batch; raises ValueError if that cannot be."""
        if len(rows) == 1:
            return rows
        if self.batch % len(rows):
            raise ValueError(
                f"{len(rows)} {name} cannot be dealt out to a batch of {self.batch} latents: give "
                f"one, or a number that divides the batch (per_latent: latent i takes number "
                f"i mod {len(rows)})."
            )
        return rows.repeat(self.batch // len(rows), *[1] * (rows.ndim - 1))

    def rows(self, prompts: Sequence[CompiledPrompt]) -> PromptRows:
        """The prompts beside the whole batch; each is moved once, however many share it."""
        for prompt in prompts:
            if prompt not in self._prepared:
                self._prepared[prompt] = prompt.prepare(self)
        latents = torch.arange(self.batch, device=self.device)
        return PromptRows(latents, tuple(self._prepared[prompt] for prompt in prompts))


@dataclass(frozen=True, eq=False)
class PreparedPrompt:
    """A prompt for the length of one run: on the device, in the UNet's dtype, in sigmas. `parts`:
    K' alone and V' alone, where a curve changes λ."""

    packed: Tensor
    mask: Tensor | None
    latent: tuple[int, int]
    schedule: PreparedSchedule
    parts: tuple[Tensor, Tensor] | None = None
    _levels: dict[tuple[int, ...] | None, Tensor] = field(default_factory=dict)

    def at(self, moment: Moment) -> PreparedPrompt | None:
        """The prompt as it is in force at that moment; None where it is not."""
        if self.schedule.windowed and not self.schedule.includes(moment.sigma):
            return None
        factor = moment.factor(self.schedule)
        if factor is None or self.parts is None:
            return self
        keys, values = self.parts
        return replace(self, packed=torch.addcmul(keys, values, factor))

    def mask_levels(self, area: tuple[int, ...] | None) -> Tensor | None:
        """`(M, Σ tokens, 1)`; computed once for each area of the run."""
        if self.mask is None:
            return None
        if area not in self._levels:
            self._levels[area] = mask_levels(self.mask, self.latent, area).to(self.packed)
        return self._levels[area]


class AttachedPrompts(comfy.conds.CONDRegular):
    """Prompts of a conditioning before sampling; `cond` is a tuple of `CompiledPrompt`."""

    def process_cond(self, batch_size: int, **kwargs: Any) -> AttachedPrompts:
        raise RuntimeError(
            "This conditioning carries an image prompt, but the sampled model does not know of "
            "it. Connect the MODEL output of 'Apply IP-Adapter (Conditioning)' to the sampler; if "
            "it is, give nodes that evaluate texts of their own (Perp-Neg) one without a prompt."
        )


class PromptRows(comfy.conds.CONDRegular):
    """Prompts of a conditioning while sampling.

    `cond (B,)` numbers the latents that the rows stand beside. Being a tensor of the batch's
    length it is sliced by whoever slices the batch, context windows for example.
    """

    def __init__(
        self,
        cond: Tensor,
        prompts: tuple[PreparedPrompt, ...],
        area: tuple[int, ...] | None = None,
    ) -> None:
        super().__init__(cond)
        self.prompts = prompts
        self.area = area

    def _copy_with(self, cond: Tensor) -> PromptRows:
        return PromptRows(cond, self.prompts, self.area)

    @property
    def changing(self) -> bool:
        """Whether a prompt is not the same at every step."""
        schedules = [prompt.schedule for prompt in self.prompts]
        return any(schedule.windowed or schedule.table is not None for schedule in schedules)

    def at(self, moment: Moment) -> PromptRows:
        """Only the prompts in force at that moment, as they are then."""
        prompts = (prompt.at(moment) for prompt in self.prompts)
        return PromptRows(self.cond, tuple(prompt for prompt in prompts if prompt is not None))

    def process_cond(
        self, batch_size: int, area: Sequence[int] | None = None, **kwargs: Any
    ) -> PromptRows:
        rows = comfy.utils.repeat_to_batch_size(self.cond, batch_size)
        return PromptRows(rows, self.prompts, None if area is None else tuple(area))

    def can_concat(self, other: Any) -> bool:
        return isinstance(other, PromptRows)

    def size(self) -> list[int]:
        return [len(self.cond)]

    def concat(self, others: Sequence[PromptRows]) -> list[Tensor | None]:
        """What the UNet gets: packed K'/V' and mask levels in turn, row-aligned.

        Conditionings of different prompts share a call: a prompt fills the next slot of its
        number of tokens, and rows without one get K' = V' = 0, which adds exactly nothing.
        """
        blocks = [self, *others]
        tables = [block._by_slot() for block in blocks]
        out: list[Tensor | None] = []
        for slot in dict.fromkeys(slot for table in tables for slot in table):
            prompts = [table.get(slot) for table in tables]
            some = next(p for p in prompts if p is not None)
            out.append(
                torch.cat([b._packed(p, some) for b, p in zip(blocks, prompts, strict=True)])
            )
            masked = next((p for p in prompts if p is not None and p.mask is not None), None)
            if masked is None:
                out.append(None)
            else:
                rows = [b._mask(p, masked) for b, p in zip(blocks, prompts, strict=True)]
                out.append(torch.cat(rows))
        return out

    def _by_slot(self) -> dict[tuple[int, int], PreparedPrompt]:
        seen: Counter[int] = Counter()
        table = {}
        for prompt in self.prompts:
            tokens = prompt.packed.shape[1]
            table[tokens, seen[tokens]] = prompt
            seen[tokens] += 1
        return table

    def _packed(self, prompt: PreparedPrompt | None, like: PreparedPrompt) -> Tensor:
        if prompt is None:
            return like.packed.new_zeros(len(self.cond), *like.packed.shape[1:])
        return self._rows(prompt.packed)

    def _mask(self, prompt: PreparedPrompt | None, like: PreparedPrompt) -> Tensor:
        levels = None if prompt is None else prompt.mask_levels(self.area)
        if levels is None:
            whole = like.mask_levels(self.area)
            assert whole is not None
            return whole.new_ones(len(self.cond), *whole.shape[1:])
        return self._rows(levels)

    def _rows(self, x: Tensor) -> Tensor:
        return x.expand(len(self.cond), -1, -1) if len(x) == 1 else x[self.cond]
