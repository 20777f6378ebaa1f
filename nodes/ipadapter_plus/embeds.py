"""Nodes of ComfyUI_IPAdapter_plus that pass bare features on."""

from __future__ import annotations

import os
from typing import Any, ClassVar

import folder_paths
import torch
from torch import Tensor

from ...ip_adapter_core.comfyui.encode import features
from ...ip_adapter_core.comfyui.ipadapter_plus import encoder_mask, needed, zero_side
from ...ip_adapter_core.files.header import read_pickle
from ...ip_adapter_core.ipadapter_plus.features import EXTREMES, METHODS, across_images
from ...ip_adapter_core.variants import FACE
from .. import paths
from . import inputs as of
from .settings import like_the_old
from .sockets import models

ENDING = ".ipadpt"


class IPAdapterEncoder(of.Served):
    RETURN_TYPES = ("EMBEDS", "EMBEDS")
    RETURN_NAMES = ("pos_embed", "neg_embed")
    FUNCTION = "encode"
    CATEGORY = "ipadapter/embeds"
    REQUIRED: ClassVar[of.Inputs] = {
        "ipadapter": of.IPADAPTER,
        "image": of.IMAGE,
        "weight": of.number(1.0, -1.0, 3.0, 0.01),
    }
    OPTIONAL: ClassVar[of.Inputs] = {"mask": of.MASK, "clip_vision": of.CLIP_VISION}

    @classmethod
    def IS_CHANGED(cls, **_: Any) -> bool:
        return like_the_old()

    def encode(
        self,
        ipadapter: Any,
        image: Tensor,
        weight: float,
        mask: Tensor | None = None,
        clip_vision: Any = None,
        **_: Any,
    ) -> tuple[Tensor, Tensor]:
        adapter, clip_vision, _faces = models(ipadapter, clip_vision)
        kind = adapter.spec.features
        if FACE in adapter.spec.reads:
            raise ValueError(
                f"'{adapter.name}' reads faces, which are no EMBEDS of this node. Apply it by an "
                "IPAdapter FaceID, or by Encode Face and Apply IP-Adapter."
            )
        encoder = needed(clip_vision)
        found = features(encoder, image, encoder_mask(mask, encoder))
        positive = getattr(found, kind)
        negative = zero_side(kind, positive, encoder, like_the_old())
        if kind == "image_embeds":
            negative = torch.zeros_like(positive)
        return positive if weight == 1 else positive * weight, negative


class IPAdapterCombineEmbeds(of.Served):
    RETURN_TYPES = ("EMBEDS",)
    FUNCTION = "batch"
    CATEGORY = "ipadapter/embeds"
    REQUIRED: ClassVar[of.Inputs] = {"embed1": of.EMBEDS, "method": of.choice(*METHODS, *EXTREMES)}
    OPTIONAL: ClassVar[of.Inputs] = {f"embed{number}": of.EMBEDS for number in range(2, 6)}

    def batch(
        self,
        embed1: Tensor,
        method: str = "concat",
        embed2: Tensor | None = None,
        embed3: Tensor | None = None,
        embed4: Tensor | None = None,
        embed5: Tensor | None = None,
        **_: Any,
    ) -> tuple[Tensor]:
        given = [x for x in (embed1, embed2, embed3, embed4, embed5) if x is not None]
        shapes = {tuple(x.shape[1:]) for x in given}
        if len(shapes) > 1:
            found = ", ".join(str(list(x.shape)) for x in given)
            raise ValueError(
                f"Embeds of different encoders or adapters cannot be combined: found the shapes "
                f"{found}. Encode all images with one IPAdapter Encoder's settings."
            )
        return (across_images(torch.cat(given), method),)


class IPAdapterSaveEmbeds(of.Served):
    RETURN_TYPES = ()
    FUNCTION = "save"
    OUTPUT_NODE = True
    CATEGORY = "ipadapter/embeds"
    REQUIRED: ClassVar[of.Inputs] = {
        "embeds": of.EMBEDS,
        "filename_prefix": ("STRING", {"default": "IP_embeds"}),
    }

    def save(self, embeds: Tensor, filename_prefix: str = "IP_embeds", **_: Any) -> tuple[None]:
        folder, name, _counter, _subfolder, _prefix = folder_paths.get_save_image_path(
            paths.checked_prefix(filename_prefix), folder_paths.get_output_directory()
        )
        number = 1
        while True:
            try:
                with open(os.path.join(folder, f"{name}_{number:05}{ENDING}"), "xb") as file:
                    torch.save(embeds, file)
                return (None,)
            except FileExistsError:  # never over another one
                number += 1


class IPAdapterLoadEmbeds(of.Served):
    RETURN_TYPES = ("EMBEDS",)
    FUNCTION = "load"
    CATEGORY = "ipadapter/embeds"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        found = folder_paths.recursive_search(folder_paths.get_input_directory())[0]
        return {"required": {"embeds": [sorted(name for name in found if name.endswith(ENDING))]}}

    @classmethod
    def IS_CHANGED(cls, embeds: str | None = None, **_: Any) -> float:
        path = folder_paths.get_annotated_filepath(embeds) if embeds else ""
        return os.path.getmtime(path) if os.path.isfile(path) else 0.0

    def load(self, embeds: str, **_: Any) -> tuple[Tensor]:
        path = folder_paths.get_annotated_filepath(embeds)
        if not os.path.isfile(path):
            raise FileNotFoundError(
                f"'{embeds}' is not in {folder_paths.get_input_directory()}. Copy the file of "
                "IPAdapter Save Embeds there, then refresh the node list (R)."
            )
        found = read_pickle(path)
        if not isinstance(found, Tensor):
            raise ValueError(
                f"'{embeds}' holds a {type(found).__name__}; expected one tensor, as IPAdapter "
                "Save Embeds writes it."
            )
        return (found.cpu(),)
