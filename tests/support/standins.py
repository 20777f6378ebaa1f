"""Stand-in models: the public files' layouts and keys with random weights, for a CPU.

They lie in a ComfyUI base directory under the public names that the workflows ask for, so
workflows run unmodified; nothing but the weights, the UNet's size (one level of 320
channels; SDXL: three, with all 70 cross-attention layers) and the image encoder (CLIP
ViT-L in place of ViT-H and ViT-bigG) differs from the real ones. Untrained: images are
soft fields of color that text, image and λ visibly change, no more.

`python -m tests.support.standins [group or model …]` makes them and prints where they lie.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from filelock import FileLock
from safetensors.torch import save_file

from ip_adapter_core.files.atomic import atomic
from tests.support import checkpoint_layouts as layouts
from tests.support.checkpoint_layouts import Layout, UNet
from tests.support.random_models import State, under, weights
from tools import reference_images
from tools.comfyui.install import ROOT

logger = logging.getLogger("comfyui_ip_adapter.tools")

VERSION = 1  # raise it when a file's content changes: files of other versions are made anew
FOLDER_VARIABLE = "IP_ADAPTER_STANDINS"
SD15 = UNet(320, 768, (1,), (1,), (8,), blocks=1)
SDXL = UNet(320, 2048, (1, 1, 1), (0, 2, 10), (5, 5, 5), linear=True, vector=layouts.SDXL.vector)
VISION_WIDTH, VISION_EMBEDDING = 1024, 768  # CLIP ViT-L: hidden states, image_embeds
_LATENT = 4
_GROUP = 10  # channels of one group of the UNet's last normalisation: 320 / 32


def half(layout: Layout, seed: int, gains: dict[str, float] | None = None) -> State:
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


def _vae() -> State:
    """Make an autoencoder whose images are soft, balanced in color and rarely saturated."""
    state = half(layouts.vae(), 0, {"decoder.conv_out.weight": 1.2})
    out = state["decoder.conv_out.weight"]
    out -= out.mean(dim=1, keepdim=True)
    return under("first_stage_model.", state)


def _checkpoint(seed: int) -> State:
    text = half(layouts.clip_text_l(), 0)
    return _unet(SD15, seed) | under("cond_stage_model.transformer.", text) | _vae()


def _checkpoint_sdxl() -> State:
    from tests.support import sparse_files

    text_g = {k: x for k, x in sparse_files.clip("ViT-bigG-14").items() if k[:7] != "visual."}
    return {
        **_unet(SDXL, 2),
        **under("conditioner.embedders.0.transformer.", half(layouts.clip_text_l(), 0)),
        **under("conditioner.embedders.1.model.", half(text_g, 0)),
        **_vae(),
    }


def _vision() -> State:
    from tests.support import sparse_files

    gains = {"q_proj.weight": 2.0, "patch_embedding.weight": 2.0}
    return half(sparse_files.vision("ViT-L"), 0, gains)


def _adapter(size: UNet, projection: Layout) -> State:
    layout = layouts.ip_adapter(projection, size.widths, size.context)
    return half(layout, 0, {"to_k_ip.weight": 2.0, "to_v_ip.weight": 1.5})


def _controlnet() -> State:
    return half(layouts.controlnet(SD15), 0, {"zero_convs.0.0.weight": 0.5})


@dataclass(frozen=True)
class Model:
    """A stand-in: where it lies below `models/`, its group, and what makes its tensors."""

    path: str
    group: str
    build: Callable[[], State]
    also: tuple[str, ...] = ()  # further public names of the same file


def _models() -> dict[str, Model]:
    base = layouts.linear_projection(VISION_EMBEDDING, SD15.context)
    plus = layouts.resampler(VISION_WIDTH, SD15.context, width=768)
    full = layouts.full_projection(VISION_WIDTH, SD15.context)
    base_xl = layouts.linear_projection(VISION_EMBEDDING, SDXL.context)
    plus_xl = layouts.resampler(VISION_WIDTH, SDXL.context, width=1280)
    return {
        "checkpoint": Model(
            "checkpoints/v1-5-pruned-emaonly-fp16.safetensors", "sd15", partial(_checkpoint, 0)
        ),
        "checkpoint_other": Model(
            "checkpoints/DreamShaper_8_pruned.safetensors", "other", partial(_checkpoint, 1)
        ),
        "checkpoint_sdxl": Model(
            "checkpoints/sd_xl_base_1.0.safetensors", "sdxl", _checkpoint_sdxl
        ),
        "clip_vision": Model(
            "clip_vision/CLIP-ViT-H-14-laion2B-s32B-b79K.safetensors",
            "vision",
            _vision,
            also=("clip_vision/CLIP-ViT-bigG-14-laion2B-39B-b160k.safetensors",),
        ),
        "adapter": Model(
            "ipadapter/ip-adapter_sd15.safetensors", "sd15", partial(_adapter, SD15, base)
        ),
        "adapter_bin": Model(
            "ipadapter/ip-adapter_sd15.bin", "sd15", partial(_adapter, SD15, base)
        ),
        "adapter_plus": Model(
            "ipadapter/ip-adapter-plus_sd15.safetensors",
            "sd15",
            partial(_adapter, SD15, plus),
            also=("ipadapter/ip-adapter-plus-face_sd15.safetensors",),
        ),
        "adapter_full": Model(
            "ipadapter/ip-adapter-full-face_sd15.safetensors", "sd15", partial(_adapter, SD15, full)
        ),
        "adapter_sdxl": Model(
            "ipadapter/ip-adapter_sdxl.safetensors",
            "sdxl",
            partial(_adapter, SDXL, base_xl),
            also=("ipadapter/ip-adapter_sdxl_vit-h.safetensors",),
        ),
        "adapter_plus_sdxl": Model(
            "ipadapter/ip-adapter-plus_sdxl_vit-h.safetensors",
            "sdxl",
            partial(_adapter, SDXL, plus_xl),
        ),
        "controlnet": Model(
            "controlnet/control_v11p_sd15_canny_fp16.safetensors", "control", _controlnet
        ),
    }


MODELS = _models()
GROUPS: dict[str, tuple[str, ...]] = {
    "sd15": ("sd15", "vision"),
    "sdxl": ("sdxl", "vision"),
    "control": ("control",),
    "other": ("other",),
    "workflows": ("sd15", "sdxl", "vision", "control", "other"),
}


def base_directory() -> Path:
    """Return the ComfyUI base directory of the stand-ins; IP_ADAPTER_STANDINS moves it."""
    chosen = os.environ.get(FOLDER_VARIABLE)
    return Path(chosen).expanduser().absolute() if chosen else ROOT / ".cache" / "standins"


def path(name: str) -> Path:
    """Return where the stand-in `name` (a key of MODELS) lies, made or not."""
    return base_directory() / "models" / MODELS[name].path


def _nested(state: State) -> dict[str, State]:
    """Return the two-level dict of published `.bin` files."""
    nested: dict[str, State] = {}
    for key, tensor in state.items():
        group, _, rest = key.partition(".")
        nested.setdefault(group, {})[rest] = tensor
    return nested


def _save(target: Path, model: Model) -> None:
    if model.path.endswith(".bin"):
        with target.open("wb") as file:  # a path's name would be in the bytes
            torch.save(_nested(model.build()), file)
    else:
        save_file(model.build(), target, metadata={"format": "pt"})


def _link(target: Path, source: Path) -> None:
    """Make a hard link, or a copy where the file system has none."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _selected(names: Sequence[str]) -> list[str]:
    for name in names:
        if name not in MODELS and name not in GROUPS:
            known = ", ".join([*GROUPS, *MODELS])
            raise KeyError(f"no stand-in model or group {name!r}; there are: {known}")
    groups = {group for name in names for group in GROUPS.get(name, ())}
    return [name for name, model in MODELS.items() if name in names or model.group in groups]


def ensure(*names: str) -> Path:
    """Make the named models or groups unless they are there, and return the base directory.

    Safe to call from several processes at once; what an interrupted call made is kept.

    Raises:
        KeyError: a name that is neither in MODELS nor in GROUPS.
    """
    selected = _selected(names)
    base = base_directory()
    for folder in ("checkpoints", "clip_vision", "controlnet", "ipadapter"):
        (base / "models" / folder).mkdir(parents=True, exist_ok=True)
    (base / "input").mkdir(exist_ok=True)
    with FileLock(base / "making.lock"):
        manifest = base / "manifest.json"
        made: dict[str, int] = json.loads(manifest.read_text()) if manifest.exists() else {}

        def make(relative: str, write: Callable[[Path], object]) -> None:
            if made.get(relative) == VERSION and (base / relative).exists():
                return
            logger.info("making the stand-in %s", relative)
            with atomic(base / relative) as temporary:
                write(temporary)
            made[relative] = VERSION
            with atomic(manifest) as temporary:
                temporary.write_text(json.dumps(made, indent=1))

        for name in reference_images.SCENES:
            make(f"input/{name}", partial(reference_images.draw(name).save, format="PNG"))
        for name in selected:
            model = MODELS[name]
            make(f"models/{model.path}", partial(_save, model=model))
            for alias in model.also:
                make(f"models/{alias}", partial(_link, source=path(name)))
    return base


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    print(ensure(*(sys.argv[1:] or ["workflows"])))
