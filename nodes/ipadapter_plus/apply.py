"""Apply nodes of ComfyUI_IPAdapter_plus: their interface, translated to one request each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...ip_adapter_core.comfyui.ipadapter_plus import Request, apply
from ...ip_adapter_core.ipadapter_plus.pictures import tiled
from ...ip_adapter_core.ipadapter_plus.weight_types import Asked
from ...ip_adapter_core.packing import V_ONLY
from ...ip_adapter_core.variants import FACE
from . import inputs as of
from .faces import encoded
from .settings import like_the_old
from .sockets import models

WEIGHT_TYPES_OF_SIMPLE = {
    "standard": "linear",
    "prompt is more important": "ease out",
}


class Applying(of.Served):
    """What the Apply nodes have in common. `unfold_batch`: one image for each latent."""

    RETURN_TYPES: ClassVar[tuple[str, ...]] = ("MODEL",)
    FUNCTION = "apply_ipadapter"
    CATEGORY = "ipadapter"
    OPTIONAL: ClassVar[of.Inputs] = of.BESIDES
    unfold_batch = False

    @classmethod
    def IS_CHANGED(cls, **_: Any) -> bool:
        return like_the_old()


class IPAdapter(Applying):
    REQUIRED: ClassVar[of.Inputs] = {
        **of.MODELS,
        "image": of.IMAGE,
        "weight": of.WEIGHT_3,
        **of.FRACTIONS,
        "weight_type": of.choice(*WEIGHT_TYPES_OF_SIMPLE, "style transfer"),
    }
    OPTIONAL: ClassVar[of.Inputs] = {"attn_mask": of.MASK}

    def apply_ipadapter(
        self,
        model: Any,
        ipadapter: Any,
        image: Tensor,
        weight: float,
        start_at: float = 0.0,
        end_at: float = 1.0,
        weight_type: str = "standard",
        attn_mask: Tensor | None = None,
        **more: Any,
    ) -> tuple[Any, None]:
        adapter, clip_vision, insightface = models(ipadapter, more.get("clip_vision"))
        if weight_type.startswith("style"):
            type_ = "style transfer"
        else:
            type_ = WEIGHT_TYPES_OF_SIMPLE.get(weight_type, "linear")
        request = Request(
            adapter=adapter,
            asked=Asked(type_, _weight(weight)),
            clip_vision=clip_vision,
            image=image,
            start_at=start_at,
            end_at=end_at,
            mask=_given(attn_mask),
            structure=2 * _first(weight),
            like_the_old=like_the_old(),
        )
        request = of_faces(request, insightface)
        return apply(model, request), request.image if request.faces is not None else None


class IPAdapterAdvanced(Applying):
    """Takes every keyword that any Apply node ever had, and what else a caller passes."""

    REQUIRED: ClassVar[of.Inputs] = {
        **of.MODELS,
        "image": of.IMAGE,
        "weight": of.WEIGHT,
        "weight_type": of.WEIGHT_TYPE,
        **of.COMBINED,
    }

    def apply_ipadapter(
        self,
        model: Any,
        ipadapter: Any,
        start_at: Any = 0.0,
        end_at: Any = 1.0,
        weight: Any = 1.0,
        weight_style: Any = 1.0,
        weight_composition: float = 1.0,
        expand_style: bool = False,
        weight_type: Any = "linear",
        combine_embeds: str = "concat",
        weight_faceidv2: Any = None,
        image: Any = None,
        image_style: Tensor | None = None,
        image_composition: Tensor | None = None,
        image_negative: Tensor | None = None,
        clip_vision: Any = None,
        attn_mask: Any = None,
        insightface: Any = None,
        embeds_scaling: str = V_ONLY,
        layer_weights: str | None = None,
        ipadapter_params: Any = None,
        encode_batch_size: int = 0,
        style_boost: float | None = None,
        composition_boost: float | None = None,
        enhance_tiles: int = 1,
        enhance_ratio: float = 1.0,
        weight_kolors: float = 1.0,
        **_: Any,
    ) -> tuple[Any, Any]:
        adapter, clip_vision, faces = models(ipadapter, _given(clip_vision))
        faces = _given(insightface) or faces
        if _given(image_style) is not None:
            image, weight = image_style, weight_style
            weight_type = f"{'strong ' if expand_style else ''}style and composition"
        boost = _given(style_boost)
        if boost is not None:
            weight_type = "style transfer precise"
        elif _given(composition_boost) is not None:
            weight_type, boost = "composition precise", composition_boost
        if ipadapter_params:
            applied = [
                dict(zip(ipadapter_params, values, strict=True))
                for values in zip(*ipadapter_params.values(), strict=True)
            ]
        else:
            one = {"image": image, "attn_mask": attn_mask, "weight": weight}
            window = {"start_at": start_at, "end_at": end_at}
            applied = [{**one, "weight_type": weight_type, **window}]
            if isinstance(image, list):
                applied = [{**applied[0], "image": each} for each in image]
        face_image = None
        for entry in applied:
            if _given(entry["image"]) is None:
                continue
            asked = Asked(
                weight_type=entry["weight_type"],
                weight=_weight(entry["weight"]),
                composition=1.0 if weight_composition is None else float(weight_composition),
                boost=None if boost is None else float(boost),
                layers=layer_weights or "",
                scaling=embeds_scaling or V_ONLY,
            )
            request = Request(
                adapter=adapter,
                asked=asked,
                clip_vision=clip_vision,
                image=entry["image"],
                composition=_given(image_composition),
                negative=_given(image_negative),
                combine=combine_embeds or "concat",
                start_at=entry["start_at"],
                end_at=entry["end_at"],
                mask=_given(entry["attn_mask"]),
                per_latent=self.unfold_batch,
                pieces=int(enhance_tiles or 1),
                ratio=float(enhance_ratio),
                structure=structure(weight_faceidv2, entry["weight"]),
                like_the_old=like_the_old(),
            )
            request = of_faces(request, faces)
            face_image = request.image if request.faces is not None else None
            model = apply(model, request)
        return model, face_image


class IPAdapterBatch(IPAdapterAdvanced):
    REQUIRED: ClassVar[of.Inputs] = {
        **of.without(IPAdapterAdvanced.REQUIRED, "combine_embeds"),
        "encode_batch_size": of.AT_ONCE,
    }
    unfold_batch = True


class IPAdapterStyleComposition(IPAdapterAdvanced):
    CATEGORY = "ipadapter/style_composition"
    REQUIRED: ClassVar[of.Inputs] = {
        **of.MODELS,
        "image_style": of.IMAGE,
        "image_composition": of.IMAGE,
        "weight_style": of.WEIGHT,
        "weight_composition": of.WEIGHT,
        "expand_style": of.switch(),
        **of.COMBINED,
        "combine_embeds": (*of.COMBINE, {"default": "average"}),
    }


class IPAdapterStyleCompositionBatch(IPAdapterStyleComposition):
    REQUIRED: ClassVar[of.Inputs] = of.without(IPAdapterStyleComposition.REQUIRED, "combine_embeds")
    unfold_batch = True


class IPAdapterPreciseStyleTransfer(IPAdapterAdvanced):
    REQUIRED: ClassVar[of.Inputs] = {
        **of.MODELS,
        "image": of.IMAGE,
        "weight": of.WEIGHT,
        "style_boost": of.number(1.0, -5, 5),
        **of.COMBINED,
    }


class IPAdapterPreciseStyleTransferBatch(IPAdapterPreciseStyleTransfer):
    unfold_batch = True


class IPAdapterPreciseComposition(IPAdapterAdvanced):
    REQUIRED: ClassVar[of.Inputs] = {
        **of.MODELS,
        "image": of.IMAGE,
        "weight": of.WEIGHT,
        "composition_boost": of.number(0.0, -5, 5),
        **of.COMBINED,
    }


class IPAdapterPreciseCompositionBatch(IPAdapterPreciseComposition):
    unfold_batch = True


class IPAdapterMS(IPAdapterAdvanced):
    CATEGORY = "ipadapter/dev"
    REQUIRED: ClassVar[of.Inputs] = {
        **of.MODELS,
        "image": of.IMAGE,
        "weight": of.WEIGHT,
        "weight_faceidv2": of.number(1.0, -1, 5.0),
        "weight_type": of.WEIGHT_TYPE,
        **of.COMBINED,
        "layer_weights": ("STRING", {"default": "", "multiline": True}),
    }
    OPTIONAL: ClassVar[of.Inputs] = {**of.BESIDES, "insightface": of.INSIGHTFACE}


class IPAdapterClipVisionEnhancer(IPAdapterAdvanced):
    CATEGORY = "ipadapter/dev"
    REQUIRED: ClassVar[of.Inputs] = {
        **IPAdapterAdvanced.REQUIRED,
        "enhance_tiles": of.whole(2, 1, 16),
        "enhance_ratio": of.number(1.0, 0.0, 1.0),
    }


class IPAdapterClipVisionEnhancerBatch(IPAdapterClipVisionEnhancer):
    REQUIRED: ClassVar[of.Inputs] = {
        **of.without(IPAdapterClipVisionEnhancer.REQUIRED, "combine_embeds"),
        "enhance_ratio": of.number(0.5, 0.0, 1.0),
        "encode_batch_size": of.AT_ONCE,
    }
    unfold_batch = True


class IPAdapterFromParams(IPAdapterAdvanced):
    CATEGORY = "ipadapter/params"
    REQUIRED: ClassVar[of.Inputs] = {
        **of.MODELS,
        "ipadapter_params": of.PARAMS,
        "combine_embeds": of.COMBINE,
        "embeds_scaling": of.SCALING,
    }
    OPTIONAL: ClassVar[of.Inputs] = {"image_negative": of.IMAGE, "clip_vision": of.CLIP_VISION}


class IPAdapterFaceID(IPAdapterAdvanced):
    RETURN_TYPES = ("MODEL", "IMAGE")
    RETURN_NAMES = ("MODEL", "face_image")
    CATEGORY = "ipadapter/faceid"
    REQUIRED: ClassVar[of.Inputs] = {
        **of.MODELS,
        "image": of.IMAGE,
        "weight": of.WEIGHT_3,
        "weight_faceidv2": of.number(1.0, -1, 5.0),
        "weight_type": of.WEIGHT_TYPE,
        **of.COMBINED,
    }
    OPTIONAL: ClassVar[of.Inputs] = {**of.BESIDES, "insightface": of.INSIGHTFACE}


class IPAAdapterFaceIDBatch(IPAdapterFaceID):  # its id is spelt so
    unfold_batch = True


class IPAdapterFaceIDKolors(IPAdapterFaceID):
    REQUIRED: ClassVar[of.Inputs] = {
        **of.MODELS,
        "image": of.IMAGE,
        "weight": of.WEIGHT_3,
        "weight_faceidv2": of.number(1.0, -1, 5.0),
        "weight_kolors": of.number(1.0, -1, 5.0),
        "weight_type": of.WEIGHT_TYPE,
        **of.COMBINED,
    }


class IPAdapterTiled(Applying):
    RETURN_TYPES = ("MODEL", "IMAGE", "MASK")
    RETURN_NAMES = ("MODEL", "tiles", "masks")
    FUNCTION = "apply_tiled"
    CATEGORY = "ipadapter/tiled"
    REQUIRED: ClassVar[of.Inputs] = {
        **of.MODELS,
        "image": of.IMAGE,
        "weight": of.WEIGHT_3,
        "weight_type": of.WEIGHT_TYPE,
        "combine_embeds": of.COMBINE,
        **of.FRACTIONS,
        "sharpening": of.number(0.0, 0.0, 1.0),
        "embeds_scaling": of.SCALING,
    }

    def apply_tiled(
        self,
        model: Any,
        ipadapter: Any,
        image: Tensor,
        weight: Any,
        weight_type: str,
        start_at: float,
        end_at: float,
        sharpening: float = 0.0,
        combine_embeds: str = "concat",
        image_negative: Tensor | None = None,
        attn_mask: Tensor | None = None,
        clip_vision: Any = None,
        embeds_scaling: str = V_ONLY,
        encode_batch_size: int = 0,
        **_: Any,
    ) -> tuple[Any, Tensor, Tensor]:
        adapter, clip_vision, faces = models(ipadapter, _given(clip_vision))
        tiles, masks = tiled(image, _given(attn_mask), sharpening)
        for tile, mask in zip(tiles, masks, strict=True):
            request = Request(
                adapter=adapter,
                asked=Asked(weight_type, _weight(weight), scaling=embeds_scaling),
                clip_vision=clip_vision,
                image=tile,
                negative=_given(image_negative),
                combine=combine_embeds,
                start_at=start_at,
                end_at=end_at,
                mask=mask,
                per_latent=self.unfold_batch,
                like_the_old=like_the_old(),
            )
            model = apply(model, of_faces(request, faces))
        return model, torch.cat(tiles), torch.cat(masks)


class IPAdapterTiledBatch(IPAdapterTiled):
    REQUIRED: ClassVar[of.Inputs] = {
        **of.without(IPAdapterTiled.REQUIRED, "combine_embeds"),
        "encode_batch_size": of.AT_ONCE,
    }
    unfold_batch = True


class IPAdapterEmbeds(Applying):
    CATEGORY = "ipadapter/embeds"
    REQUIRED: ClassVar[of.Inputs] = {
        **of.MODELS,
        "pos_embed": of.EMBEDS,
        "weight": of.WEIGHT_3,
        "weight_type": of.WEIGHT_TYPE,
        **of.FRACTIONS,
        "embeds_scaling": of.SCALING,
    }
    OPTIONAL: ClassVar[of.Inputs] = {
        "neg_embed": of.EMBEDS,
        "attn_mask": of.MASK,
        "clip_vision": of.CLIP_VISION,
    }

    def apply_ipadapter(
        self,
        model: Any,
        ipadapter: Any,
        pos_embed: Tensor,
        weight: Any,
        weight_type: str,
        start_at: float,
        end_at: float,
        neg_embed: Tensor | None = None,
        attn_mask: Tensor | None = None,
        clip_vision: Any = None,
        embeds_scaling: str = V_ONLY,
        **_: Any,
    ) -> tuple[Any, None]:
        adapter, clip_vision, _faces = models(ipadapter, _given(clip_vision))
        request = Request(
            adapter=adapter,
            asked=Asked(weight_type, _weight(weight), scaling=embeds_scaling),
            clip_vision=clip_vision,
            embeds=pos_embed,
            negative_embeds=_given(neg_embed),
            start_at=start_at,
            end_at=end_at,
            mask=_given(attn_mask),
            per_latent=self.unfold_batch,
            like_the_old=like_the_old(),
        )
        return apply(model, request), None


class IPAdapterEmbedsBatch(IPAdapterEmbeds):
    unfold_batch = True


def of_faces(request: Request, insightface: Any) -> Request:
    """Return the request with the pictures' faces, for an adapter that reads those."""
    spec = request.adapter.spec
    if FACE not in spec.reads or insightface is None or request.image is None:
        return request
    side = 256 if request.like_the_old and spec.cross_attention_dim == 2048 else 224
    faces, crops = encoded(insightface, request.image, side)
    return replace(request, faces=faces, image=crops)


def structure(weight_faceidv2: Any, weight: Any) -> float:
    """Return what a caller asks for; who says nothing gets twice the weight."""
    given = None if weight_faceidv2 is False else weight_faceidv2
    return 2 * _first(weight) if given is None else float(given)


def _first(weight: Any) -> float:
    found = _weight(weight)
    return float(found if isinstance(found, int | float) else found[0])


def _given(value: Any) -> Any:
    """Return what a caller passes; False and an empty list are its None."""
    return None if value is False or (isinstance(value, list) and not value) else value


def _weight(weight: Any) -> float | Sequence[float]:
    """Return one weight, or one a latent: a list, or a tensor of them."""
    if isinstance(weight, Tensor):
        weight = weight.flatten().tolist()
    if isinstance(weight, list | tuple):
        return [float(x) for x in weight] or 1.0
    return float(weight)
