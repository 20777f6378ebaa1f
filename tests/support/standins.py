"""Stand-in models: the public files' layouts and keys with random weights, for a CPU.

They lie in a ComfyUI base directory under the public names that the workflows ask for, so
workflows run unmodified; nothing but the weights, the UNet's size (one level of 320
channels; SDXL: three, with all 70 cross-attention layers), the image encoder (CLIP ViT-L in
place of ViT-H and ViT-bigG), and the width of Flux (one head a block, of all 57) and its T5
differs from the real ones. Untrained: images are
soft fields of color that text, image and λ visibly change, no more. Faces are found where
`tools.reference_images` draws them, and described at random.

`python -m tests.support.standins [group or path …]` makes them and prints where they lie.
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from filelock import FileLock
from safetensors.torch import save_file

from ip_adapter_core.files.atomic import atomic
from tests.support import checkpoint_layouts as layouts
from tests.support import faces
from tests.support.checkpoint_layouts import UNet
from tests.support.random_models import State, sections, under, weights
from tools import reference_images
from tools.comfyui.install import ROOT

logger = logging.getLogger("comfyui_ip_adapter.tools")

VERSION = 2  # raise it when a file's content changes: every version has a folder of its own
FOLDER_VARIABLE = "IP_ADAPTER_STANDINS"
SD15 = UNet(320, 768, (1,), (1,), (8,), blocks=1)
SDXL = UNet(320, 2048, (1, 1, 1), (0, 2, 10), (5, 5, 5), linear=True, vector=layouts.SDXL.vector)
T5_SIZES = {"d_model": 64, "d_kv": 16, "num_heads": 4, "d_ff": 128}
FLUX = layouts.Flux(text=T5_SIZES["d_model"])
NARROW_T5 = f'''"""Read T5-XXL narrower: its width is ComfyUI's own, not the weights'."""

from comfy.text_encoders.t5 import T5

plain = T5.__init__
NODE_CLASS_MAPPINGS = {{}}


def init(self, config_dict, *rest, **more):
    plain(self, {{**config_dict, **{T5_SIZES}}}, *rest, **more)


T5.__init__ = init
'''
"""A custom node for servers that run on the stand-ins: T5-XXL itself has 4.8 billion weights."""
VISION_WIDTH, VISION_EMBEDDING = 1024, 768  # CLIP ViT-L: hidden states, image_embeds
_LATENT = 4
_GROUP = 10  # channels of one group of the UNet's last normalisation: 320 / 32


def half(layout: layouts.Layout, seed: int, gains: dict[str, float] | None = None) -> State:
    """Make weights in half precision, unit gain unless a name ends as `gains` says."""
    return weights(layout, seed, gains, torch.float16)


def _unet(size: UNet, seed: int) -> State:
    """Make a UNet that returns its input, normalised, plus a soft random field.

    A denoiser must return its input for the sampling to converge: its first channels carry +x
    and −x of the 4 latent channels through the outermost skip connection;
    SiLU(x) − SiLU(−x) = x, so the last convolution reads x back.
    """
    gains = {
        "attn2.to_q.weight": 3.0,
        "attn2.to_out.0.weight": 2.0,
        "attn1.to_out.0.weight": 0.5,
        "ff.net.2.weight": 0.5,
        "out_layers.3.weight": 0.5,
        "out.2.weight": 0.5,
    }
    state = half(layouts.unet(size), seed, gains)
    last = max(int(key.split(".")[1]) for key in state if key.startswith("output_blocks."))
    carried, width = 2 * _LATENT, size.channels
    silenced = [f"output_blocks.{last}.0.out_layers.3", f"output_blocks.{last}.1.proj_out"]
    silenced += [f"output_blocks.{last}.0.skip_connection", "input_blocks.0.0"]
    for name in silenced:
        for key in (f"{name}.weight", f"{name}.bias"):
            if key in state:
                state[key][:carried] = 0
    state["out.0.weight"][:_GROUP] = 1
    state["out.0.bias"][:_GROUP] = 0
    out = state["out.2.weight"]
    out -= out.mean(dim=1, keepdim=True)  # no uniform color: SiLU's mean cancels out
    out[:, :_GROUP] = 0
    for i in range(_LATENT):
        for sign, channel in ((1.0, i), (-1.0, _LATENT + i)):
            state["input_blocks.0.0.weight"][channel, i, 1, 1] = sign
            state[f"output_blocks.{last}.0.skip_connection.weight"][channel, width + channel] = 1
            state["out.2.weight"][i, channel, 1, 1] = sign
    return under("model.diffusion_model.", state)


def _vae(latent: int = _LATENT) -> State:
    """Make an autoencoder whose images are soft, balanced in color and rarely saturated."""
    state = half(layouts.vae(latent=latent), 0, {"decoder.conv_out.weight": 1.2})
    out = state["decoder.conv_out.weight"]
    out -= out.mean(dim=1, keepdim=True)
    return state


def _first_stage() -> State:
    return under("first_stage_model.", _vae())


def _checkpoint(seed: int) -> State:
    text = half(layouts.clip_text_l(), 0)
    return _unet(SD15, seed) | under("cond_stage_model.transformer.", text) | _first_stage()


def _checkpoint_sdxl() -> State:
    from tests.support import sparse_files

    text_g = {k: x for k, x in sparse_files.clip("ViT-bigG-14").items() if k[:7] != "visual."}
    return {
        **_unet(SDXL, 2),
        **under("conditioner.embedders.0.transformer.", half(layouts.clip_text_l(), 0)),
        **under("conditioner.embedders.1.model.", half(text_g, 0)),
        **_first_stage(),
    }


def _vision() -> State:
    from tests.support import sparse_files

    gains = {"q_proj.weight": 2.0, "patch_embedding.weight": 2.0}
    return half(sparse_files.vision("ViT-L"), 0, gains)


def _adapter(size: UNet, kind: str) -> State:
    layout = layouts.adapter(size, kind, VISION_EMBEDDING if kind == "base" else VISION_WIDTH)
    return half(layout, 0, {"to_k_ip.weight": 2.0, "to_v_ip.weight": 1.5})


def _face_adapter() -> dict[str, State]:
    """Return the sections of a FaceID file as it is published, with its LoRA."""
    return sections(faces.tensors("faceid", SD15.widths, SD15.context))


def _controlnet() -> State:
    return half(layouts.controlnet(SD15), 0, {"zero_convs.0.0.weight": 0.5})


def _flux() -> State:
    state = half(layouts.flux(FLUX), 0)
    return {key: x + 1 if key.endswith("_norm.scale") else x for key, x in state.items()}


def _xlabs() -> State:
    layout = layouts.xlabs(16, FLUX.text, FLUX.width, FLUX.double, VISION_EMBEDDING)
    drawn = half(layouts.as_diffusers(layout), 0, {"_ip.weight": 2.0})  # seeded by these names
    return dict(zip(layout, drawn.values(), strict=True))


def _clip_l() -> State:
    return half(layouts.clip_text_l(), 0)


def _t5() -> State:
    return half(layouts.t5(T5_SIZES["d_model"], heads=T5_SIZES["num_heads"]), 0)


class Model(NamedTuple):
    """The groups that a stand-in is of, what makes its content, and other names of the file."""

    groups: tuple[str, ...]
    build: Callable[[], State | dict[str, State] | bytes]
    also: tuple[str, ...] = ()


# By their paths below `models/`.
MODELS = {
    "checkpoints/v1-5-pruned-emaonly-fp16.safetensors": Model(("sd15",), partial(_checkpoint, 0)),
    "checkpoints/DreamShaper_8_pruned.safetensors": Model(("other",), partial(_checkpoint, 1)),
    "checkpoints/sd_xl_base_1.0.safetensors": Model(("sdxl",), _checkpoint_sdxl),
    "clip_vision/CLIP-ViT-H-14-laion2B-s32B-b79K.safetensors": Model(
        ("sd15", "sdxl", "flux"),
        _vision,
        also=(
            "clip_vision/CLIP-ViT-bigG-14-laion2B-39B-b160k.safetensors",
            "clip_vision/clip-vit-large-patch14.safetensors",
        ),
    ),
    "ipadapter/ip-adapter_sd15.safetensors": Model(("sd15",), partial(_adapter, SD15, "base")),
    "ipadapter/ip-adapter-plus_sd15.safetensors": Model(
        ("sd15",),
        partial(_adapter, SD15, "plus"),
        also=("ipadapter/ip-adapter-plus-face_sd15.safetensors",),
    ),
    "ipadapter/ip-adapter-full-face_sd15.safetensors": Model(
        ("sd15",), partial(_adapter, SD15, "full")
    ),
    "ipadapter/ip-adapter_sdxl.safetensors": Model(
        ("sdxl",),
        partial(_adapter, SDXL, "base"),
        also=("ipadapter/ip-adapter_sdxl_vit-h.safetensors",),
    ),
    "ipadapter/ip-adapter-plus_sdxl_vit-h.safetensors": Model(
        ("sdxl",), partial(_adapter, SDXL, "plus")
    ),
    "ipadapter/ip-adapter-faceid_sd15.bin": Model(("faces",), _face_adapter),
    "insightface/models/buffalo_l/det_10g.onnx": Model(("faces",), faces.drawn_detector),
    "insightface/models/buffalo_l/w600k_r50.onnx": Model(("faces",), faces.recognizer),
    "diffusion_models/flux1-dev.safetensors": Model(("flux",), _flux),
    "text_encoders/clip_l.safetensors": Model(("flux",), _clip_l),
    "text_encoders/t5xxl_fp16.safetensors": Model(("flux",), _t5),
    "vae/ae.safetensors": Model(("flux",), partial(_vae, 16)),
    "ipadapter/ip_adapter.safetensors": Model(("flux",), _xlabs),
    "controlnet/control_v11p_sd15_canny_fp16.safetensors": Model(("control",), _controlnet),
}


def base_directory() -> Path:
    """Return the ComfyUI base directory of the stand-ins; IP_ADAPTER_STANDINS moves it."""
    chosen = os.environ.get(FOLDER_VARIABLE)
    folder = Path(chosen).expanduser().absolute() if chosen else ROOT / ".cache" / "standins"
    return folder / str(VERSION)


def path(name: str) -> Path:
    """Return where a stand-in, named as in MODELS, lies, made or not."""
    return base_directory() / "models" / name


def _write_narrow_t5(target: Path) -> None:
    target.write_text(NARROW_T5, encoding="utf-8")


def _link(target: Path, source: Path) -> None:
    """Make a hard link, or a copy where the file system has none."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _save(target: Path, model: Model) -> None:
    made = model.build()
    if isinstance(made, bytes):
        target.write_bytes(made)
    elif all(isinstance(x, torch.Tensor) for x in made.values()):
        save_file(made, target)
    else:
        torch.save(made, target)


def _make(target: Path, write: Callable[[Path], object]) -> None:
    if not target.exists():
        logger.info("making the stand-in %s", target.name)
        with atomic(target) as temporary:
            write(temporary)


def ensure(*names: str) -> Path:
    """Make the named models or groups unless they are there, and return the base directory.

    All where none is named. Safe to call from several processes at once; what an interrupted call
    made is kept.

    Raises:
        KeyError: a name that is neither a model nor a group.
    """
    groups = {group for model in MODELS.values() for group in model.groups}
    for name in {*names} - {*MODELS} - groups:
        known = ", ".join([*sorted(groups), *MODELS])
        raise KeyError(f"no stand-in model or group {name!r}; there are: {known}")
    base = base_directory()
    for folder in {Path(name).parent for name in MODELS}:
        (base / "models" / folder).mkdir(parents=True, exist_ok=True)
    (base / "input").mkdir(exist_ok=True)
    (base / "custom_nodes").mkdir(exist_ok=True)
    with FileLock(base / "making.lock"):
        _make(base / "custom_nodes" / "narrow_t5.py", _write_narrow_t5)
        for name in reference_images.SCENES:
            picture = reference_images.draw(name)
            _make(base / "input" / name, partial(picture.save, format="PNG"))
        for name, model in MODELS.items():
            if not names or {name, *model.groups} & {*names}:
                _make(path(name), partial(_save, model=model))
                for alias in model.also:
                    _make(path(alias), partial(_link, source=path(name)))
    return base


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    print(ensure(*sys.argv[1:]))
