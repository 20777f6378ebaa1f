"""From image features to one tensor: the K'/V' of all layers with λ folded in."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from einops import rearrange, reduce, repeat
from torch import Tensor

from .adapter import AdapterSpec, IPAdapter
from .image_prompt import ImageFeatures, ImagePrompt
from .variants import CROSS_ATTENTION, Place

COMBINE = ("concat", "average", "per_latent")
V_ONLY, MEAN_APART = "V only", "K+mean(V) w/ C penalty"
SCALINGS = (V_ONLY, "K+V", "K+V w/ C penalty", MEAN_APART)
"""What λ multiplies, in ComfyUI_IPAdapter_plus's words: V'; K' and V'; these times C/1280, C the
layer's width; K' and the mean of V' over an image's tokens (times C/1280), its deviations not."""
_WIDEST = 1280  # C of the deepest level of SD1.5 and SDXL
_ORDER: dict[Place, str] = {
    CROSS_ATTENTION: "down, up, middle",
    "attention output": "double, single",
    "block output": "double",
}
KeysValues: TypeAlias = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class LayerFolding:
    """How much each layer's K' and V' count on either side of guidance, in checkpoint order.

    `itself`: layers whose negative side gets the image's own tokens, so that guidance leads away
    from what they carry. `scaling`: one of `SCALINGS`.
    """

    positive: tuple[float, ...]
    negative: tuple[float, ...]
    itself: tuple[bool, ...]
    scaling: str = V_ONLY

    @classmethod
    def alike(cls, weights: Sequence[float], scaling: str = V_ONLY) -> LayerFolding:
        """Return the same weights for both sides."""
        return cls(tuple(weights), tuple(weights), (False,) * len(weights), scaling)

    def only(self, layers: Sequence[int]) -> LayerFolding:
        """Return it for the layers of these numbers alone."""
        positive, negative = (
            tuple(side[i] for i in layers) for side in (self.positive, self.negative)
        )
        itself = tuple(self.itself[i] for i in layers)
        return replace(self, positive=positive, negative=negative, itself=itself)

    @property
    def acts(self) -> bool:
        """Whether an image counts anywhere."""
        return any(self.positive) or any(self.negative)


@dataclass(frozen=True, eq=False)
class Packed:
    """One side's K'/V' of all layers, `(R, T, 2·Σ widths)`: a line in λ.

    `fixed`: the part that a factor of λ leaves as it is, broadcast; None: K' of every layer.
    """

    tensor: Tensor
    fixed: Tensor | None = None

    def line(self, layer_dims: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return the parts that λ leaves as it is, and that it multiplies."""
        fixed = self.fixed
        if fixed is None:
            widths = torch.tensor([dim for dim in layer_dims for _ in "kv"])
            columns = torch.tensor([True, False] * len(layer_dims)).repeat_interleave(widths)
            fixed = self.tensor * columns.to(self.tensor)
        return fixed, self.tensor - fixed

    def scaled(self, factor: float | Tensor, layer_dims: Sequence[int]) -> Packed:
        """Return it with λ times `factor`, a number or one a row, `(R, 1, 1)`."""
        fixed, linear = self.line(layer_dims)
        return replace(self, tensor=fixed + factor * linear)

    def to(self, device: torch.device, dtype: torch.dtype) -> Packed:
        fixed = None if self.fixed is None else self.fixed.to(device, dtype)
        return Packed(self.tensor.to(device, dtype), fixed)

    def __getitem__(self, rows: Tensor) -> Packed:
        fixed = self.fixed
        return Packed(self.tensor[rows], fixed if fixed is None or len(fixed) == 1 else fixed[rows])


def compile_sides(
    adapter: IPAdapter,
    prompt: ImagePrompt,
    combine: str,
    folding: LayerFolding,
    dim_head: int | None = None,
) -> tuple[Packed, Packed | None]:
    """Return both sides' packed K'/V'. Raises ValueError for what `tokens` refuses.

    The negative one is None where nothing stands against the image: see `against`. `dim_head`:
    width of the model's attention heads, see `NormedKeysValues`.
    """
    zero = against(adapter.spec, prompt)
    if zero is not None:
        prompt = replace(prompt, negative=zero)
    away = any(folding.itself)
    sides = tokens(adapter, prompt, combine, alike=away)
    an_image = adapter.spec.tokens or prompt.positive.of(adapter.spec.features).shape[1]
    image = list(adapter.keys_values(sides[0], dim_head))
    packed = fold(image, folding.positive, folding.scaling, an_image)
    if zero is None and not away:
        return packed, None
    other = list(adapter.keys_values(sides[1], dim_head))
    if away:
        pairs = zip(folding.itself, image, other, strict=True)
        other = [positive if itself else negative for itself, positive, negative in pairs]
    return packed, fold(other, folding.negative, folding.scaling, an_image)


def against(spec: AdapterSpec, prompt: ImagePrompt) -> ImageFeatures | None:
    """Return what stands against an image in guidance, as the adapter was trained.

    A picture of the user's in any case. Otherwise UNets' adapters have the zero image, XLabs' a
    black picture, and InstantX's, whose model is distilled, nothing: None. (Prompts that were saved
    before there was Flux know no black picture: `lacks_black`.)
    """
    if spec.place == CROSS_ATTENTION:
        return prompt.negative
    if spec.place == "attention output" and (prompt.black is not None or lacks_black(prompt)):
        return None
    return (
        prompt.negative
        if prompt.black is None
        else replace(prompt.negative, image_embeds=prompt.black)
    )


def lacks_black(prompt: ImagePrompt) -> bool:
    """Return whether the zero image stands against the images, and no black picture is known."""
    return prompt.black is None and not prompt.negative.image_embeds.any()


def tokens(
    adapter: IPAdapter, prompt: ImagePrompt, combine: str, alike: bool = False
) -> tuple[Tensor, Tensor]:
    """Return the tokens of both sides, `(R, T, cross_attention_dim)`.

    `concat`: all images' tokens side by side, R = 1; where one side's T divides the other's, both
    get the same, and share a slot in the UNet call. `average`: the mean of the encoder's
    features, R = 1. `per_latent`: one row an image, R = N for the positive side.
    `alike`: both sides get the same T in any case.
    Raises ValueError for another `combine`, or per-latent sides of different numbers.
    """
    if combine not in COMBINE:
        raise ValueError(f"combine is {combine!r}; expected one of {', '.join(COMBINE)}.")
    sides = prompt.positive, prompt.negative
    if combine == "average":
        sides = sides[0].mean(), sides[1].mean()
    more: dict[str, Any] = {"structure": prompt.structure} if len(adapter.spec.reads) > 1 else {}
    if prompt.exact_faces:
        more["exact"] = True
    positive, negative = (
        adapter.tokens(*map(side.of, adapter.spec.reads), **more) for side in sides
    )
    if combine == "concat":
        positive, negative = (rearrange(x, "n t d -> 1 (n t) d") for x in (positive, negative))
        # Repeating every token equally often leaves the softmax's result as it is.
        lengths = positive.shape[1], negative.shape[1]
        length = math.lcm(*lengths) if alike else max(lengths)
        positive, negative = (
            x if length % x.shape[1] else repeat(x, "r t d -> r (n t) d", n=length // x.shape[1])
            for x in (positive, negative)
        )
    elif negative.shape[0] not in (1, positive.shape[0]):
        raise ValueError(
            f"per_latent takes one negative image, or one for each image; found "
            f"{positive.shape[0]} images and {negative.shape[0]} negative images."
        )
    return positive, negative


def layer_folding(
    spec: AdapterSpec, weight: float, layers: Sequence[float] | LayerFolding | None
) -> LayerFolding:
    """Return λ of every layer: `weight` times what `layers` says of each, in checkpoint order.

    Raises:
        ValueError: A weight is not finite, or there is another number of them than the adapter has
            layers.
    """
    given = layers if isinstance(layers, LayerFolding) else LayerFolding.alike(layers or ())
    if layers is None:
        given = LayerFolding.alike([1.0] * len(spec.layer_dims))
    found = len(given.positive)
    if not found == len(given.negative) == len(given.itself) == len(spec.layer_dims):
        raise ValueError(
            f"layer_weights holds {found} values, but the adapter has "
            f"{len(spec.layer_dims)} {spec.place} layers: give one value a layer, in "
            f"checkpoint order ({_ORDER[spec.place]})."
        )
    positive, negative = (
        tuple(weight * x for x in side) for side in (given.positive, given.negative)
    )
    if not all(map(math.isfinite, (*positive, *negative))):
        raise ValueError(
            f"weight (λ) must be a finite number on every layer; found weight {weight} "
            f"times layer_weights {[*given.positive]}."
        )
    return replace(given, positive=positive, negative=negative)


def fold(
    keys_values: Iterable[KeysValues],
    weights: Sequence[float],
    scaling: str = V_ONLY,
    an_image: int | None = None,
) -> Packed:
    """Fold λ into K' and V' as `scaling` says, and all layers into one: K'₀ V'₀ K'₁ V'₁ ….

    Args:
        keys_values: Of each layer, `(R, T, width)`; R may be 1 where others have more.
        weights: λ of each layer.
        scaling: One of `SCALINGS`.
        an_image: Tokens an image; those of several may stand side by side. None: all T.

    Raises:
        ValueError: There is no such scaling.
    """
    if scaling not in SCALINGS:
        raise ValueError(f"scaling is {scaling!r}; expected one of {', '.join(SCALINGS)}.")
    parts: list[Tensor] = []
    fixed: list[Tensor] = []
    for (key, value), weight in zip(keys_values, weights, strict=True):
        if scaling == V_ONLY:
            parts += key, value * weight
            continue
        factor = weight * key.shape[-1] / _WIDEST if scaling.endswith("C penalty") else weight
        parts += key * factor, value * factor
        if scaling == MEAN_APART:
            size = {"t": an_image or value.shape[1]}
            mean = reduce(value, "r (n t) d -> r n 1 d", "mean", **size)
            mean = repeat(mean, "r n 1 d -> r (n t) d", **size)
            apart = value - mean if weight else torch.zeros_like(value)
            parts[-1] = apart + mean * factor
            fixed += torch.zeros_like(key), apart
    if scaling == V_ONLY:
        return Packed(_side_by_side(parts))
    return Packed(
        _side_by_side(parts), _side_by_side(fixed) if fixed else parts[0].new_zeros(1, 1, 1)
    )


def _side_by_side(parts: Sequence[Tensor]) -> Tensor:
    rows = max(map(len, parts))
    return torch.cat([part.expand(rows, -1, -1) for part in parts], dim=-1)


def unpack(packed: Tensor, layer_dims: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
    """Undo `fold`: return views of K' and V' of each layer."""
    parts = packed.split([dim for dim in layer_dims for _ in "kv"], dim=-1)
    return list(zip(parts[::2], parts[1::2], strict=True))
