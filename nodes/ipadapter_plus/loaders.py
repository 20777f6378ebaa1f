"""Loaders of ComfyUI_IPAdapter_plus: by a file's name, and by a preset."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from ...ip_adapter_core.comfyui.face_lora import with_lora
from ...ip_adapter_core.comfyui.ipadapter_plus import find
from ...ip_adapter_core.comfyui.loaders import (
    adapter_of,
    load_adapter,
    load_encoder,
    tensors_of,
)
from ...ip_adapter_core.files import finder
from ...ip_adapter_core.ipadapter_plus.presets import (
    COMMUNITY,
    FACE_ID,
    UNIFIED,
    Preset,
    preset_of,
)
from .. import paths
from . import inputs as of
from .faces import loaded


class IPAdapterModelLoader(of.Served):
    RETURN_TYPES = ("IPADAPTER",)
    FUNCTION = "load_ipadapter_model"
    CATEGORY = "ipadapter/loaders"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"ipadapter_file": (paths.adapter_names(),)}}

    @classmethod
    def IS_CHANGED(cls, ipadapter_file: str | None = None, **_: Any) -> str:
        if ipadapter_file is None:
            return ""
        return finder.digest([finder.stamps(paths.adapter_path(ipadapter_file))])

    def load_ipadapter_model(self, ipadapter_file: str, **_: Any) -> tuple[Any]:
        return (tensors_of(load_adapter(paths.adapter_path(ipadapter_file))),)


def _names(presets: Iterable[Preset]) -> of.Input:
    return of.choice(*(preset.name for preset in presets))


class IPAdapterUnifiedLoader(of.Served):
    RETURN_TYPES = ("MODEL", "IPADAPTER")
    RETURN_NAMES: tuple[str, ...] = ("model", "ipadapter")
    FUNCTION = "load_models"
    CATEGORY = "ipadapter"
    REQUIRED: ClassVar[of.Inputs] = {"model": of.MODEL, "preset": _names(UNIFIED)}
    OPTIONAL: ClassVar[of.Inputs] = {"ipadapter": of.IPADAPTER}

    @classmethod
    def IS_CHANGED(cls, **_: Any) -> str:
        files = (*paths.adapters().files, *paths.encoders().files)
        return finder.digest(finder.stamps(file.path) for file in files)

    def load_models(
        self,
        model: Any,
        preset: str,
        lora_strength: float = 0.0,
        provider: str = "CPU",
        ipadapter: Any = None,
        **_: Any,
    ) -> tuple[Any, dict[str, Any]]:
        wanted = preset_of(preset)
        adapter, encoder = find(model, wanted, paths.adapters(), paths.encoders())
        given = ipadapter if isinstance(ipadapter, Mapping) else {}
        faces = given.get("insightface") or {"provider": None, "model": None}
        if wanted.face and faces.get("model") is None:
            faces = {"provider": provider, "model": loaded("buffalo_l")}
        vision = {"file": None, "model": None}
        if encoder is not None:
            vision = self._loaded(given, "clipvision", encoder.path, encoder)
        parts = self._loaded(given, "ipadapter", adapter.path, adapter)
        if wanted.face:  # the adapter's file brings its LoRA: the separate one is not needed
            model = with_lora(model, adapter_of(parts["model"]), lora_strength)
        return model, {"clipvision": vision, "ipadapter": parts, "insightface": faces}

    def _loaded(self, given: Mapping[str, Any], part: str, path: str, file: Any) -> dict[str, Any]:
        """Return a file's model: that of a former loader, of a former run, or a new one."""
        own: dict[str, Any] = self.__dict__.setdefault("loaded", {})
        former = given.get(part) or {}
        stamp = finder.stamps(path)
        if former.get("model") is not None and _same(former.get("file"), path):
            return {"file": path, "model": former["model"]}
        if own.get(part, (None,))[0] != (path, stamp):
            if part == "clipvision":
                model: Any = load_encoder(file)
            else:
                model = tensors_of(load_adapter(path))
            own[part] = (path, stamp), model
        return {"file": path, "model": own[part][1]}


def _same(one: Any, other: str) -> bool:
    return isinstance(one, str) and os.path.realpath(one) == os.path.realpath(other)


class IPAdapterUnifiedLoaderFaceID(IPAdapterUnifiedLoader):
    RETURN_NAMES = ("MODEL", "ipadapter")
    CATEGORY = "ipadapter/faceid"
    REQUIRED: ClassVar[of.Inputs] = {
        "model": of.MODEL,
        "preset": _names(FACE_ID),
        "lora_strength": of.number(0.6, 0, 1, 0.01),
        "provider": of.choice("CPU", "CUDA", "ROCM", "DirectML", "OpenVINO", "CoreML"),
    }


class IPAdapterUnifiedLoaderCommunity(IPAdapterUnifiedLoader):
    CATEGORY = "ipadapter/loaders"
    REQUIRED: ClassVar[of.Inputs] = {"model": of.MODEL, "preset": _names(COMMUNITY)}


class IPAdapterInsightFaceLoader(of.Served):
    RETURN_TYPES = ("INSIGHTFACE",)
    FUNCTION = "load_insightface"
    CATEGORY = "ipadapter/loaders"
    REQUIRED: ClassVar[of.Inputs] = {
        "provider": of.choice("CPU", "CUDA", "ROCM"),
        "model_name": of.choice("buffalo_l", "antelopev2"),
    }

    def load_insightface(self, provider: str, model_name: str = "buffalo_l", **_: Any) -> Any:
        return (loaded(model_name),)
