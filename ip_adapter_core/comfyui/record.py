"""Watch image prompts at work while an image is sampled, and write down where they act.

Only conditionings are looked at to which the guider gives a positive name, and each only the first
time that a prediction of the noise evaluates it: what guidance runs once more (PAG, SAG, skipped
layers) is none of the image's own.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ..attention_map import KEPT, LIMIT, RecordedRun, Share, of_samples
from ..layer_weights import Block, LayerKey
from ..variants import Place
from .apply import with_wrappers
from .layers import KEY, RECORD, Conds, Layer, frames_of, layers_of
from .masks import Size, layer_size, whole
from .model_call import Seen
from .prompt_rows import CompiledPrompt, PreparedPrompt, PromptRows, SamplingRun, slots


@dataclass(frozen=True, eq=False)
class _Call:
    """One UNet call at `sigma (1,)`, of `texts` conditionings, of which `looked` count.

    `latent`: height and width; `frames`: which latents the rows of each are, after `skip` that
    ComfyUI discards; `numbers`: see `Share`, of the slots at each place; `evaluated`: what `looked`
    are of, in which of the guider's calls, see `_Watch.known`; `layers`: those that were seen.
    """

    latent: Size
    sigma: Tensor
    texts: int
    looked: tuple[int, ...]
    frames: tuple[int, ...]
    skip: int
    numbers: dict[Place, tuple[tuple[int, ...], ...]]
    evaluated: frozenset[Any]
    number: int
    layers: set[tuple[Place, LayerKey]] = field(default_factory=set)


@dataclass(eq=False)
class _Seen:
    """The sum of `layers` of one block in one call, at one place; `maps` as in `Share`."""

    call: _Call
    place: Place
    block: Block
    maps: Tensor
    layers: int = 1

    def share(self) -> Share:
        sigma, maps = float(self.call.sigma), self.maps.cpu() / self.layers
        numbers = self.call.numbers[self.place]
        return Share(sigma, self.block, self.call.frames, numbers, maps)


@dataclass(eq=False)
class _Watch:
    """A run that goes on.

    `whole`: height and width of its latents at the moment; `rows`: the prompts of each (place in
    the call of the guider, uuid of the conditioning); `known`: what this prediction of the noise
    has evaluated already, (uuid, latents), and in which of the guider's calls; `calls` counts
    those. `pieces`: whether a part of the image was evaluated by itself.
    """

    run: SamplingRun
    numbers: dict[CompiledPrompt, int]
    whole: Size
    rows: dict[tuple[int, Any], PromptRows | None] = field(default_factory=dict)
    known: dict[Any, int] = field(default_factory=dict)
    calls: int = 0
    seen: list[_Seen] = field(default_factory=list)
    pieces: bool = False

    def recorded(self, samples: Tensor) -> RecordedRun:
        """Return what the finished run leaves, off the device."""
        return RecordedRun(
            samples=samples.cpu(),
            prompts=len(self.numbers),
            sigma_at=self.run.model_sampling.percent_to_sigma,
            shares=[seen.share() for seen in self.seen],
            pieces=self.pieces,
        )

    def call(self, options: dict[str, Any], latent: tuple[int, int]) -> _Call | None:
        """Return what to look at in this UNet call.

        None for nothing, or where it shows a part alone.
        """
        told = options.get("cond_or_uncond", ()), options.get("uuids", ())
        places = list(zip(*told, strict=False))
        rows = [row for row in map(self.rows.get, places) if row is not None]
        if latent != self.whole:
            self.pieces = self.pieces or any(row.prompts for row in rows)
            return None
        if len(rows) < len(places):
            return None
        window, of_window = options.get("context_window"), frames_of(options)
        looked: dict[Any, int] = {}
        for i, (row, (_, uuid)) in enumerate(zip(rows, places, strict=True)):
            if row.positive and row.prompts:
                looked.setdefault((uuid, of_window), i)
        again = looked.keys() & self.known.keys()
        # What guidance runs once more does not count. A pass before, in the same call of the
        # guider, was another pack's (to learn from a reference, say), and this one does.
        for evaluated in [x for x in again if self.known[x] != self.calls]:
            del looked[evaluated]
        if not looked:
            return None
        if again:
            self._forget(again)
        self.known |= dict.fromkeys(looked, self.calls)
        by_place: dict[Place, list[list[PreparedPrompt | None]]] = {}
        for slot in slots(rows):
            place = next(prompt for prompt in slot if prompt is not None).source.place
            by_place.setdefault(place, []).append(slot)
        numbers = looked.values()
        return _Call(
            latent=latent,
            sigma=options["sigmas"][:1].clone(),
            texts=len(rows),
            looked=tuple(numbers),
            evaluated=frozenset(looked),
            number=self.calls,
            frames=tuple(range(self.run.batch)) if of_window is None else of_window,
            skip=int(getattr(window, "causal_anchor_index", None) is not None),
            numbers={
                place: tuple(tuple(self._number(slot[i]) for slot in own) for i in numbers)
                for place, own in by_place.items()
            },
        )

    def _forget(self, evaluated: AbstractSet[Any]) -> None:
        """Take out what this call of the guider has seen of these already."""
        self.seen = [
            seen
            for seen in self.seen
            if seen.call.number != self.calls or seen.call.evaluated.isdisjoint(evaluated)
        ]

    def _number(self, prompt: PreparedPrompt | None) -> int:
        return 0 if prompt is None else self.numbers[prompt.source]

    def watched(self, call: _Call, place: Place, layer: Layer) -> Seen:
        """Return what writes the shares of one layer's images down, of those at one place."""

        def seen(text: Tensor, images: Tensor, order: Tensor | None, told: Any) -> None:
            size = layer_size(text.shape[-1], call.latent, told)
            if size is not None:
                shares = _shares(text, images)
                if order is not None:  # an attention couple's regions: their mean
                    shares = torch.stack([shares[order == row].mean(0) for row in order.unique()])
                self._add(call, place, layer, shares.unflatten(-1, size))

        return seen

    def _add(self, call: _Call, place: Place, layer: Layer, maps: Tensor) -> None:
        """Add `maps (rows, slots, height, width)` of one layer.

        A layer that comes a second time in a call begins it anew: the pass before was another's,
        to learn from a reference for example.
        """
        texts = maps.chunk(call.texts)
        own = torch.stack([texts[i][call.skip :] for i in call.looked])
        if (place, layer.key) in call.layers:
            call.layers.clear()
            self._forget(call.evaluated)
        call.layers.add((place, layer.key))
        last = self.seen[-1] if self.seen else None
        where = call, place, layer.key[:2]
        if last is not None and (last.call, last.place, last.block) == where:
            last.maps, last.layers = last.maps + own, last.layers + 1
        else:
            self.seen.append(_Seen(*where, own))


def _shares(text: Tensor, images: Tensor) -> Tensor:
    """Of norms `text (rows, L)`, `images (rows, slots, L)`: `(rows, slots, L)`."""
    return images / (text[:, None] + images.sum(1, keepdim=True)).clamp(min=1e-12)


@dataclass(eq=False)
class AttentionRecorder:
    """What the last runs that it watched left, empty before the first one."""

    runs: deque[RecordedRun] = field(default_factory=lambda: deque(maxlen=KEPT))
    _watch: _Watch | None = None

    def of(self, samples: Tensor) -> RecordedRun:
        """Return the run that made these latents `(N, C, height, width)`.

        Raises ValueError if none of those that are held did.
        """
        return of_samples(self.runs, samples)

    def watching(
        self, sample: Callable[..., Any], run: SamplingRun, conds: Conds
    ) -> Callable[..., Any]:
        """Return the same sampling run, watched.

        torch.compile is off meanwhile: traced code would not write anything down, and ComfyUI drops
        the guards that tell a watched run from others.
        """

        def watched(*args: Any, **kwargs: Any) -> Any:
            self._watch = _Watch(run, _numbered(conds), run.latent)
            try:
                with torch.compiler.set_stance("force_eager"):
                    samples = sample(*args, **kwargs)
                self.runs.append(self._watch.recorded(samples))
                while len(self.runs) > 1 and sum(run.nbytes for run in self.runs) > LIMIT:
                    self.runs.popleft()
                return samples
            finally:
                self._watch = None

        return watched

    def predicts(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """PREDICT_NOISE: the guider begins anew with its conditionings."""
        if self._watch is not None:
            self._watch.known.clear()
        return executor(*args, **kwargs)

    def evaluates(self, conds: list[Any], latent: Size) -> None:
        """Note the conditionings of one call of the guider, with the prompts that are in force."""
        if self._watch is not None:
            self._watch.calls += 1
            self._watch.whole = whole(self._watch.run.latent, latent)
            self._watch.rows = {
                (i, entry["uuid"]): entry["model_conds"].get(KEY)
                for i, conditioning in enumerate(conds)
                for entry in conditioning or ()
            }

    def look(self, options: dict[str, Any], latent: Size) -> Callable[[Place, Layer], Seen] | None:
        """Return what watches the layers of one model call; None where there is nothing to see."""
        watch = self._watch
        call = None if watch is None else watch.call(options, latent)
        return None if watch is None or call is None else partial(watch.watched, call)


def _numbered(conds: Conds) -> dict[CompiledPrompt, int]:
    """Give the positive side's prompts numbers from 1: the model's, then the conditionings' own."""
    rows = (entry["model_conds"].get(KEY) for entries in conds.values() for entry in entries)
    positive = [row for row in rows if row is not None and row.positive]
    sources = dict.fromkeys(prompt.source for row in positive for prompt in row.prompts)
    return {source: number for number, source in enumerate(sources, 1)}


def recording(model: ModelPatcher) -> tuple[ModelPatcher, AttentionRecorder]:
    """Return a clone of the model whose runs are watched, and what they leave.

    Raises ValueError for a model that has no layers for image prompts.
    """
    layers_of(model)
    record = AttentionRecorder()
    patched = with_wrappers(model)
    patched.set_attachments(RECORD, record)
    patched.remove_wrappers_with_key(WrappersMP.PREDICT_NOISE, RECORD)
    patched.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, RECORD, record.predicts)
    return patched, record
