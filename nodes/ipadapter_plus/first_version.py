"""Nodes of ComfyUI_IPAdapter_plus until 2024-03-23, which requests and workflows still name."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import comfy.utils
import torch
from torch import Tensor

from ...ip_adapter_core.comfyui.encode import features
from ...ip_adapter_core.comfyui.ipadapter_plus import Request, apply, zero_side
from ...ip_adapter_core.ipadapter_plus.pictures import first_noise, masked_tiles
from ...ip_adapter_core.ipadapter_plus.weight_types import SCALING_OF_FIRST_TYPES, Asked
from . import inputs as of
from .apply import Applying, of_faces, structure
from .loaders import IPAdapterInsightFaceLoader
from .settings import like_the_old
from .sockets import models

_TYPES = of.choice(*SCALING_OF_FIRST_TYPES)
_NOISE, _WEIGHT = of.number(0.0, 0.0, 1.0, 0.01), of.number(1.0, 0, 1.0, 0.01)


_PICTURE: of.Inputs = {
    "ipadapter": of.IPADAPTER,
    "clip_vision": of.CLIP_VISION,
    "image": of.IMAGE,
}


def _inputs(before: of.Inputs, after: of.Inputs, weight: float = 1.0) -> of.Inputs:
    """Return those that all have, between these; `weight` is the default."""
    return {
        **before,
        "model": of.MODEL,
        "weight": of.number(weight, -1, 3),
        "noise": _NOISE,
        "weight_type": _TYPES,
        **of.FRACTIONS,
        **after,
    }


class IPAdapterApply(Applying):
    DEPRECATED = True  # ComfyUI keeps it out of its lists of nodes
    REQUIRED: ClassVar[of.Inputs] = _inputs(_PICTURE, {"unfold_batch": of.switch()})
    OPTIONAL: ClassVar[of.Inputs] = {"attn_mask": of.MASK}

    def apply_ipadapter(
        self,
        ipadapter: Any,
        model: Any,
        weight: float,
        clip_vision: Any = None,
        image: Tensor | None = None,
        weight_type: str = "original",
        noise: float | None = None,
        embeds: Tensor | None = None,
        attn_mask: Tensor | None = None,
        start_at: float = 0.0,
        end_at: float = 1.0,
        unfold_batch: bool = False,
        short_side_tiles: int = 0,
        tile_weight: float = 0.0,
        insightface: Any = None,
        weight_v2: float | None = None,
        **_: Any,
    ) -> tuple[Any]:
        adapter, clip_vision, _faces = models(ipadapter, clip_vision)
        scaling = SCALING_OF_FIRST_TYPES.get(weight_type, "V only")
        shared: dict[str, Any] = {
            "adapter": adapter,
            "asked": Asked(weight=float(weight), scaling=scaling),
            "clip_vision": clip_vision,
            "start_at": start_at,
            "end_at": end_at,
            "like_the_old": like_the_old(),
            "middle": True,
        }
        if image is not None and short_side_tiles > 0:
            tiles, masks = masked_tiles(image, short_side_tiles, tile_weight)
            for number in range(len(tiles)):
                tile = tiles[number : number + 1]
                given = {"image": tile, "negative": _noisy(tile, noise)}
                request = Request(**shared, **given, mask=masks[number : number + 1])
                model = apply(model, request)
            return (model,)
        if embeds is not None:
            given = {"embeds": embeds[0], "negative_embeds": embeds[1]}
        else:
            given = {"image": image, "negative": _noisy(image, noise)}
        request = Request(**shared, **given, mask=attn_mask, per_latent=bool(unfold_batch))
        request = of_faces(replace(request, structure=structure(weight_v2, weight)), insightface)
        return (apply(model, request),)


def _noisy(image: Tensor | None, noise: float | None) -> Tensor | None:
    return first_noise(image, noise) if noise and image is not None else None


class IPAdapterTilesMasked(IPAdapterApply):
    REQUIRED: ClassVar[of.Inputs] = _inputs(
        _PICTURE,
        {"short_side_tiles": of.whole(1, 0, 12, step=1), "tile_weight": of.number(0.6, 0.0, 1.0)},
        weight=0.7,
    )
    OPTIONAL: ClassVar[of.Inputs] = {}


class IPAdapterApplyFaceID(IPAdapterApply):
    REQUIRED: ClassVar[of.Inputs] = _inputs(
        {
            "ipadapter": of.IPADAPTER,
            "clip_vision": of.CLIP_VISION,
            "insightface": of.INSIGHTFACE,
            "image": of.IMAGE,
        },
        {"faceid_v2": of.switch(), "weight_v2": of.WEIGHT_3, "unfold_batch": of.switch()},
    )


class IPAdapterApplyEncoded(IPAdapterApply):
    REQUIRED: ClassVar[of.Inputs] = of.without(
        _inputs({"ipadapter": of.IPADAPTER, "embeds": of.EMBEDS}, {"unfold_batch": of.switch()}),
        "noise",
    )


class IPAdapterEncoderOfFirstVersion(of.Served):
    """IPAdapterEncoder as it was: its id got other inputs, so requests.py sends old ones here."""

    DEPRECATED = True
    RETURN_TYPES = ("EMBEDS",)
    FUNCTION = "preprocess"
    CATEGORY = "ipadapter"
    REQUIRED: ClassVar[of.Inputs] = {
        "clip_vision": of.CLIP_VISION,
        "image_1": of.IMAGE,
        "ipadapter_plus": of.switch(),
        "noise": _NOISE,
        "weight_1": _WEIGHT,
    }
    OPTIONAL: ClassVar[of.Inputs] = {
        **{f"image_{number}": of.IMAGE for number in (2, 3, 4)},
        **{f"weight_{number}": _WEIGHT for number in (2, 3, 4)},
    }

    @classmethod
    def IS_CHANGED(cls, **_: Any) -> bool:
        return like_the_old()

    def preprocess(
        self,
        clip_vision: Any,
        image_1: Tensor,
        ipadapter_plus: bool = False,
        noise: float = 0.0,
        weight_1: float = 1.0,
        **others: Any,
    ) -> tuple[Tensor]:
        images, weights = (
            [image_1],
            [weight_1**2] * len(image_1),
        )  # counts squared, as it always did
        height, width = image_1.shape[1:3]
        for number in (2, 3, 4):
            image = others.get(f"image_{number}")
            if image is None:
                continue
            if image.shape[1:3] != image_1.shape[1:3]:
                made = comfy.utils.common_upscale(
                    image.movedim(-1, 1), width, height, "bilinear", "center"
                )
                image = made.movedim(1, -1)
            images.append(image)
            weights += [float(others.get(f"weight_{number}", 1.0)) ** 2] * len(image)
        together = torch.cat(images)
        kind = "penultimate_hidden_states" if ipadapter_plus else "image_embeds"
        positive: Tensor = getattr(features(clip_vision, together), kind)
        if noise > 0:
            negative = getattr(features(clip_vision, first_noise(together, noise)), kind)
        else:
            negative = zero_side(kind, positive, clip_vision, like_the_old())
        negative = negative.expand_as(positive)
        factors = torch.tensor(weights).reshape(-1, *[1] * (positive.ndim - 1))
        return (torch.stack((positive * factors, negative)),)


class IPAdapterBatchEmbeds(of.Served):
    DEPRECATED = True
    RETURN_TYPES = ("EMBEDS",)
    FUNCTION = "batch"
    CATEGORY = "ipadapter"
    REQUIRED: ClassVar[of.Inputs] = {"embed1": of.EMBEDS, "embed2": of.EMBEDS}

    def batch(self, embed1: Tensor, embed2: Tensor, **_: Any) -> tuple[Tensor]:
        return (torch.cat((embed1, embed2), dim=1),)


class InsightFaceLoader(IPAdapterInsightFaceLoader):
    DEPRECATED = True
    FUNCTION = "load_insight_face"
    CATEGORY = "ipadapter"
    REQUIRED: ClassVar[of.Inputs] = {"provider": of.choice("CPU", "CUDA", "ROCM")}

    def load_insight_face(self, provider: str, **_: Any) -> Any:
        return self.load_insightface(provider)
