"""The published adapters and image encoders: their files' names, and where to get them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePath

from ..variants import CROSS_ATTENTION, FEATURE_KINDS, Family, FeatureKind, Place, family

_FILES = "https://huggingface.co/h94/IP-Adapter/resolve/main"


@dataclass(frozen=True)
class Weights:
    """A file `name` in `models/<directory>`, downloaded from `url`; `label` is for people."""

    name: str
    url: str
    directory: str
    label: str = ""

    @property
    def saved_as(self) -> str:
        """The name under which a browser saves the download."""
        return self.url.rsplit("/", 1)[-1]


def _adapter(folder: str, name: str) -> Weights:
    return Weights(f"{name}.safetensors", f"{_FILES}/{folder}/{name}.safetensors", "ipadapter")


VIT_H = Weights(
    "CLIP-ViT-H-14-laion2B-s32B-b79K.safetensors",
    f"{_FILES}/models/image_encoder/model.safetensors",
    "clip_vision",
    "CLIP ViT-H/14",
)
VIT_BIGG = Weights(
    "CLIP-ViT-bigG-14-laion2B-39B-b160k.safetensors",
    f"{_FILES}/sdxl_models/image_encoder/model.safetensors",
    "clip_vision",
    "CLIP ViT-bigG/14",
)
VIT_L = Weights(
    "clip-vit-large-patch14.safetensors",
    "https://huggingface.co/openai/clip-vit-large-patch14/resolve/main/model.safetensors",
    "clip_vision",
    "CLIP ViT-L/14",
)
SIGLIP = Weights(
    "sigclip_vision_patch14_384.safetensors",
    "https://huggingface.co/Comfy-Org/sigclip_vision_384/resolve/main/"
    "sigclip_vision_patch14_384.safetensors",
    "clip_vision",
    "SigLIP so400m/14-384",
)
BASE = _adapter("models", "ip-adapter_sd15")
LIGHT = _adapter("models", "ip-adapter_sd15_light")
BASE_BIGG = _adapter("models", "ip-adapter_sd15_vit-G")
PLUS = _adapter("models", "ip-adapter-plus_sd15")
PLUS_FACE = _adapter("models", "ip-adapter-plus-face_sd15")
FULL_FACE = _adapter("models", "ip-adapter-full-face_sd15")
BASE_SDXL = _adapter("sdxl_models", "ip-adapter_sdxl")
BASE_SDXL_VIT_H = _adapter("sdxl_models", "ip-adapter_sdxl_vit-h")
PLUS_SDXL = _adapter("sdxl_models", "ip-adapter-plus_sdxl_vit-h")
PLUS_FACE_SDXL = _adapter("sdxl_models", "ip-adapter-plus-face_sdxl_vit-h")
LIGHT_V11 = Weights(
    "ip-adapter_sd15_light_v11.bin", f"{_FILES}/models/ip-adapter_sd15_light_v11.bin", "ipadapter"
)
COMPOSITION, COMPOSITION_SDXL = (
    Weights(
        f"ip_plus_composition_{family}.safetensors",
        "https://huggingface.co/ostris/ip-composition-adapter/resolve/main/"
        f"ip_plus_composition_{family}.safetensors",
        "ipadapter",
    )
    for family in ("sd15", "sdxl")
)
_FACES = "https://huggingface.co/h94/IP-Adapter-FaceID/resolve/main"
FACE_ID, FACE_ID_PLUS, PORTRAIT, FACE_ID_SDXL, FACE_ID_PLUS_SDXL, PORTRAIT_SDXL = (
    Weights(f"ip-adapter-faceid{name}.bin", f"{_FACES}/ip-adapter-faceid{name}.bin", "ipadapter")
    for name in (
        *("_sd15", "-plusv2_sd15", "-portrait-v11_sd15"),
        *("_sdxl", "-plusv2_sdxl", "-portrait_sdxl"),
    )
)
_KOLORS = "https://huggingface.co/Kwai-Kolors/Kolors-IP-Adapter-Plus/resolve/main"
PLUS_KOLORS = Weights(
    "ip_adapter_plus_general.bin", f"{_KOLORS}/ip_adapter_plus_general.bin", "ipadapter"
)
VIT_L_336 = Weights(
    "clip-vit-large-patch14-336.bin",
    f"{_KOLORS}/image_encoder/pytorch_model.bin",
    "clip_vision",
    "CLIP ViT-L/14 (336 px)",
)
NOOB = Weights(
    "noobIPAMARK1_mark1.safetensors",
    "https://civitai.com/models/1121145",
    "ipadapter",
    "NOOB-IPA-MARK1 (anime SDXL)",
)
XLABS = Weights(  # its first version, in flux-ip-adapter, has the same name
    "ip_adapter.safetensors",
    "https://huggingface.co/XLabs-AI/flux-ip-adapter-v2/resolve/main/ip_adapter.safetensors",
    "ipadapter",
)
INSTANTX = Weights(
    "ip-adapter.bin",
    "https://huggingface.co/InstantX/FLUX.1-dev-IP-Adapter/resolve/main/ip-adapter.bin",
    "ipadapter",
)

# For each family and preset of IPA_AutoLoad the one to get first.
ADAPTERS: dict[Family, dict[str, Weights]] = {
    "sd15": {
        "light": LIGHT,
        "standard": BASE,
        "fine-grained": PLUS,
        "face": PLUS_FACE,
        "full face": FULL_FACE,
        "composition": COMPOSITION,
        "bigG": BASE_BIGG,
        "faceid": FACE_ID,
        "faceid-plus": FACE_ID_PLUS,
        "portrait": PORTRAIT,
    },
    "sdxl": {
        "standard": BASE_SDXL_VIT_H,
        "fine-grained": PLUS_SDXL,
        "face": PLUS_FACE_SDXL,
        "composition": COMPOSITION_SDXL,
        "bigG": BASE_SDXL,
        "faceid": FACE_ID_SDXL,
        "faceid-plus": FACE_ID_PLUS_SDXL,
        "portrait": PORTRAIT_SDXL,
    },
    "flux": {"standard": XLABS, "fine-grained": INSTANTX},
}
KOLORS = {"fine-grained": PLUS_KOLORS}  # the same
_STEMS = {
    PurePath(weights.name).stem
    for weights in (
        *(weights for presets in ADAPTERS.values() for weights in presets.values()),
        *(LIGHT_V11, NOOB, PLUS_KOLORS, VIT_H, VIT_BIGG, VIT_L_336, VIT_L, SIGLIP),
    )
}
# Widths of image_embeds and of hidden states, and positions, of the encoders that published
# adapters were trained with.
ENCODERS = {
    (1024, 1280, 257): VIT_H,
    (1280, 1664, 257): VIT_BIGG,
    (768, 1024, 577): VIT_L_336,  # has quick GELU
    (768, 1024, 257): VIT_L,  # the same
    (1152, 1152, 729): SIGLIP,
}
LABELS = {sizes[:2]: known.label for sizes, known in ENCODERS.items()}
# What kind and width of the features that an adapter reads tell of its encoder.
_READ_BY_UNETS: dict[tuple[FeatureKind, int], Weights] = {
    ("image_embeds", 1024): VIT_H,
    ("image_embeds", 1280): VIT_BIGG,
    ("penultimate_hidden_states", 1280): VIT_H,
    ("penultimate_hidden_states", 1664): VIT_BIGG,
}
_READ_BY_FLUX: dict[tuple[FeatureKind, int], Weights] = {
    ("image_embeds", 768): VIT_L,
    ("image_embeds", 1152): SIGLIP,
}
TAGS = {"laion2b_s32b_b79k": VIT_H, "laion2b_s39b_b160k": VIT_BIGG}  # open_clip's


def adapters(context_dim: int, layers: int, kolors: bool) -> Mapping[str, Weights]:
    """Return the adapters to get for a model of these sizes, by preset; see `describe_model`."""
    known = family(context_dim, layers)
    return KOLORS if kolors else ADAPTERS[known] if known else {}


def is_name(name: str) -> bool:
    """Whether a file is called as one of them, in whatever folder and format."""
    return PurePath(name).stem in _STEMS


def encoder_label(features: FeatureKind, width: int) -> str | None:
    """Return what people call the encoder whose `features` are `width` wide."""
    if features not in FEATURE_KINDS:
        return None
    place = FEATURE_KINDS.index(features)
    return next((label for widths, label in LABELS.items() if widths[place] == width), None)


def has_sizes(weights: Weights, embed: int, hidden: int, positions: int) -> bool:
    """Return whether an encoder has the sizes of these published `weights`.

    `embed` is 0 where its file leaves the projection out.
    """
    return any(
        (hidden, positions) == sizes[1:] and embed in (0, sizes[0])
        for sizes, known in ENCODERS.items()
        if known is weights
    )


def encoder(features: FeatureKind, width: int, place: Place = CROSS_ATTENTION) -> Weights | None:
    """Return the encoder whose `features`, `width` wide, published adapters read at a place."""
    return encoders(place).get((features, width))


def encoders(place: Place) -> dict[tuple[FeatureKind, int], Weights]:
    """Return all that published adapters read at a place, by kind and width of what they read."""
    return _READ_BY_UNETS if place == CROSS_ATTENTION else _READ_BY_FLUX
