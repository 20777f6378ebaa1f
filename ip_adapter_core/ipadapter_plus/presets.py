"""Presets of ComfyUI_IPAdapter_plus's loaders, and the names of the files that they take.

Names are looked for as there: as regular expressions, anywhere in the path below the models folder,
the first match in ComfyUI's order. A file of another name is found by what is in it, as in
`IPA_AutoLoad`, where a preset has a counterpart there.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from ..files.finder import File

VIT_H = r"(ViT.H.14.*s32B.b79K|ipadapter.*sd15|sd1.?5.*model)"
VIT_G = r"(ViT.bigG.14.*39B.b160k|ipadapter.*sdxl|sdxl.*model)"
VIT_L = r"clip.vit.large.patch14.336"
ENDING = r"\.(bin|safetensors)$"
SAFETENSORS = r"\.safetensors$"


@dataclass(frozen=True)
class Preset:
    """A preset of a unified loader.

    `sd15`, `sdxl`: patterns of the adapter's name for that family, the first one that finds a file
    counts; none: there is no such adapter. `native`: the preset of `IPA_AutoLoad` that finds it by
    its contents. `face`: whether it reads faces; `version`: of FaceID Plus.
    """

    name: str
    sd15: tuple[str, ...]
    sdxl: tuple[str, ...]
    encoder: str = VIT_H
    native: str = ""
    ending: str = ENDING
    face: bool = False
    version: int | None = None

    def adapter(self, files: Iterable[File], sdxl: bool) -> File | None:
        """Return the first file of one of its names."""
        files = [*files]
        found = (first(files, name, self.ending) for name in (self.sdxl if sdxl else self.sd15))
        return next((file for file in found if file is not None), None)


def first(files: Iterable[File], pattern: str, ending: str = ENDING) -> File | None:
    """Return the first file whose name has the pattern just before its ending."""
    sought = re.compile(pattern + ending, re.IGNORECASE)
    return next((file for file in files if sought.search(file.name)), None)


UNIFIED = (
    Preset(
        "LIGHT - SD1.5 only (low strength)",
        ("sd15.light.v11", "sd15.light"),
        (),
        native="light",
    ),
    Preset(
        "STANDARD (medium strength)",
        ("ip.adapter.sd15",),
        ("ip.adapter.sdxl.vit.h",),
        native="standard",
    ),
    Preset(
        "VIT-G (medium strength)",
        ("sd15.vit.g",),
        ("ip.adapter.sdxl",),
        VIT_G,
        native="bigG",
    ),
    Preset(
        "PLUS (high strength)",
        ("ip.adapter.plus.sd15",),
        ("plus.sdxl.vit.h",),
        native="fine-grained",
    ),
    Preset("PLUS FACE (portraits)", ("plus.face.sd15",), ("plus.face.sdxl.vit.h",), native="face"),
    Preset(
        "FULL FACE - SD1.5 only (portraits stronger)",
        ("full.face.sd15",),
        (),
        native="full face",
    ),
)
FACE_ID = (
    Preset("FACEID", ("faceid.sd15",), ("faceid.sdxl",), native="faceid", face=True),
    Preset(
        "FACEID PLUS - SD1.5 only",
        ("faceid.plus.sd15",),
        (),
        native="faceid-plus",
        face=True,
        version=1,
    ),
    Preset(
        "FACEID PLUS V2",
        ("faceid.plusv2.sd15",),
        ("faceid.plusv2.sdxl",),
        native="faceid-plus",
        face=True,
        version=2,
    ),
    Preset(
        "FACEID PORTRAIT (style transfer)",
        ("portrait.v11.sd15", "portrait.sd15"),
        ("portrait.sdxl",),
        native="portrait",
        face=True,
    ),
    Preset("FACEID PORTRAIT UNNORM - SDXL only (strong)", (), ("portrait.sdxl.unnorm",), face=True),
)
COMMUNITY = (
    Preset(
        "Composition",
        ("plus.composition.sd15",),
        ("plus.composition.sdxl",),
        native="composition",
        ending=SAFETENSORS,
    ),
    Preset("Kolors", (), ("(ip_adapter_plus_general|kolors.ip.adapter.plus)",), VIT_L),
)


def preset_of(text: str) -> Preset:
    """Return the preset of a text, which only has to begin as one does, in whatever case.

    Raises ValueError for others.
    """
    known = (*UNIFIED, *FACE_ID, *COMMUNITY)
    wanted = text.lower().strip()
    exact = next((preset for preset in known if preset.name.lower() == wanted), None)
    if exact is not None:
        return exact

    def word(preset: Preset) -> str:
        return re.split(r" - | \(", preset.name.lower())[0]

    fitting = [preset for preset in known if wanted.startswith(word(preset))]
    if not fitting:
        names = ", ".join(preset.name for preset in known)
        raise ValueError(f"preset is {text!r}; expected one of {names}.")
    return max(fitting, key=lambda preset: len(word(preset)))
