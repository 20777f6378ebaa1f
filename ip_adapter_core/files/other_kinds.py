"""Files that lie where adapters are sought and are none of this pack's, by tensors of theirs."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple


class Kind(NamedTuple):
    """`tensors`: names that only it has; `remedy`: where it belongs, or what to take instead."""

    name: str
    tensors: str
    remedy: str


TAKE = "Choose one of these that was made for the connected model."
_FACES = "For faces take FaceID on SD1.5 and SDXL."
_CONTROL = "Put it into models/controlnet, for Load ControlNet Model."
KINDS = (
    Kind("a PhotoMaker model", r"^id_encoder\.", "Put it into models/photomaker."),
    Kind("a PuLID model", r"^(image_proj\.mapping_\d|id_adapter|pulid_)", _FACES),
    Kind("an InstantCharacter adapter for Flux", r"^ip_adapter\.\d+\.norm_ip_q\.", TAKE),
    Kind("an IP-Adapter-Instruct (it reads a text besides)", r"^image_proj\.new_input_", TAKE),
    Kind("a CSGO adapter (it reads two pictures)", r"^(content|style)_image_proj\.", TAKE),
    Kind("an IP-Adapter for Anima", r"^blocks\.\d+\.(ip_k_proj|adaln_ip)\.", TAKE),
    Kind("a Lynx IP-Adapter for Wan", r"\.(ip|ref)_adapter\.(to_[kv]_(ip|ref)|registers)\b", TAKE),
    Kind("a resampler alone (Lynx's, for Wan, is one)", r"^latents$", TAKE),
    Kind("a T2I-Adapter", r"^(adapter\.)?body\.\d+\.(block1|in_conv|resnets)\b", _CONTROL),
    Kind("a ControlNet", r"^(control_model\.)?zero_convs\.|^controlnet_", _CONTROL),
    Kind(
        "a style model (Redux is one)",
        r"^(redux_up\.|redux_down\.|style_embedding$)",
        "Put it into models/style_models, for Load Style Model.",
    ),
    Kind(
        "an image encoder",
        r"^(vision_model|visual)\.",
        "Put it into models/clip_vision, for Load CLIP Vision; adapters read what it gives.",
    ),
    Kind("a motion module of AnimateDiff", r"\.motion_modules\.", "Put it where its pack looks."),
    Kind(
        "a LoRA",
        r"^lora_(unet|te)|\.lora_(down|up|A|B)\b|\.processor\.to_\w+_lora\.",
        "Put it into models/loras, for Load LoRA. FaceID's is in the file of its adapter too: "
        "load that one alone.",
    ),
    Kind(
        "a whole diffusion model",
        r"^(model\.diffusion_model\.|input_blocks\.|down_blocks\.\d+\.resnets\.)",
        "Put it into models/checkpoints or models/diffusion_models.",
    ),
    Kind("a VAE", r"^(first_stage_model\.)?(en|de)coder\.(conv_in|mid)", "Put it into models/vae."),
)
_PATTERNS = [(kind, re.compile(kind.tensors, re.MULTILINE)) for kind in KINDS]


def other_kind(names: Iterable[str]) -> Kind | None:
    """Return what a file of tensors of these names is, as far as it is known here."""
    listed = "\n".join(names)
    return next((kind for kind, pattern in _PATTERNS if pattern.search(listed)), None)
