"""The miniature's files: what is shipped in `miniature/`, and how ComfyUI reads it.

The UNet is shipped in 8 bits, as are control, second base and what is for comparison only; the
rest is in float16. So everything together takes less than 32 MB. A checkpoint as ComfyUI loads it
is put together at set-up, with the seeded text encoder.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ip_adapter_core.files.tower_config import METADATA_KEY
from tests.support import checkpoint_layouts as layouts
from tests.support.random_models import under

if TYPE_CHECKING:  # heavy to import, and needed only where the files are made or read
    from open_clip.model import CLIP

    from miniature.models import Autoencoder

State = dict[str, Tensor]
BUILD_VARIABLE = "IP_ADAPTER_BUILD"
SHIPPED = Path(__file__).resolve().parent
FOLDER = Path(os.environ.get(BUILD_VARIABLE) or SHIPPED).expanduser().absolute()
"""Where they lie; the variable names another build's."""
UNET, AUTOENCODER, ENCODER = "unet.safetensors", "autoencoder.safetensors", "encoder.safetensors"
ADAPTER, ADAPTER_PLUS = "ip-adapter.safetensors", "ip-adapter-plus.safetensors"
CLASSIFIER, CONTROL = "judge.safetensors", "control.safetensors"
SECOND_BASE, CONCATENATED = "outlined.safetensors", "concatenated.safetensors"
MANIFEST = "manifest.json"
NOT_ASKED = ("made_on", "seconds", "side_by_side", "seconds_in_all", "files")
"""What a manifest has besides the recipe."""
_IDLE, _BUSY = "ip_adapter.1.", "ip_adapter.3."  # an adapter's first and second layer
_LEVELS = 127  # of 8 bits on either side of zero
_SCALE = "::scale"
_SIZE = layouts.UNet(320, 768, (1,), (1,), (8,), blocks=1)  # base.CONFIG with an idle transformer
_LATENT_SCALE = 0.18215  # SD1.5's: ComfyUI divides latents by it before it calls a VAE


def quantized(state: Mapping[str, Tensor]) -> State:
    """Round matrices to 8 bits and vectors to float16; each output channel has a float16 scale."""
    found: State = {}
    for key, x in state.items():
        if x.ndim < 2:
            found[key] = x.half().contiguous()
            continue
        scale = (x.flatten(1).abs().amax(1).clamp(min=1e-6) / _LEVELS).half()
        rows = scale.float().reshape(-1, *[1] * (x.ndim - 1))
        found[key] = (x / rows).round().clamp(-_LEVELS, _LEVELS).to(torch.int8).contiguous()
        found[key + _SCALE] = scale
    return found


def dequantized(state: Mapping[str, Tensor]) -> State:
    """Return in float16 what `quantized` made."""
    found: State = {}
    for key, x in state.items():
        if key.endswith(_SCALE):
            continue
        if x.dtype == torch.int8:
            rows = state[key + _SCALE].float().reshape(-1, *[1] * (x.ndim - 1))
            x = (x.float() * rows).half()
        found[key] = x.contiguous()
    return found


def save(
    path: Path, state: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors as they are into one file.

    `metadata`: one entry, by default the format. safetensors writes several in an order that
    changes from one time to the next, and the same weights would not make the same file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {key: x.detach().contiguous() for key, x in state.items()}
    save_file(tensors, path, metadata=dict(metadata or {"format": "pt"}))


def load(path: Path) -> State:
    """Read a file of tensors, those of 8 bits too, in float32; whole numbers stay as they are."""
    state = dequantized(load_file(path))
    return {key: x.float() if x.is_floating_point() else x for key, x in state.items()}


def halved(state: Mapping[str, Tensor]) -> State:
    """Return floating-point tensors in float16."""
    return {key: x.half() if x.is_floating_point() else x for key, x in state.items()}


def save_encoder(path: Path, model: CLIP) -> None:
    """Write the image tower alone, its configuration inside, as IPA_LoadImageEncoder reads it."""
    tower = under("visual.", model.visual.state_dict())
    from miniature import models

    config = {"model_cfg": models.ENCODER, "preprocess_cfg": models.PREPROCESS}
    save(path, halved(tower), {METADATA_KEY: json.dumps(config)})


def autoencoder(path: Path) -> Autoencoder:
    """Load the autoencoder that `save` wrote, in float32."""
    from miniature.models import Autoencoder

    return frozen(Autoencoder(), path)


def frozen(model: Any, path: Path) -> Any:
    """Return a model with the weights of a file, in float32 and frozen."""
    model.load_state_dict(load(path))
    return model.eval().requires_grad_(False)


def idle_transformer() -> State:
    """Return a transformer for the UNet's input block that passes on what it gets.

    Its last projection is zeros. The base trains without one, but ComfyUI reads the context's
    width off the input blocks.
    """
    return {
        key: torch.ones(shape) if "norm" in key and key.endswith("weight") else torch.zeros(shape)
        for key, shape in layouts.unet(_SIZE).items()
        if key.startswith("input_blocks.1.1.")
    }


def checkpoint(unet: Mapping[str, Tensor], vae: Autoencoder) -> State:
    """Return a whole SD1.5 checkpoint for CheckpointLoaderSimple; `unet` has diffusers' names."""
    from miniature import models

    original = {layouts.published_name(key, _SIZE): x for key, x in unet.items()}
    return {
        **under("model.diffusion_model.", halved(original | idle_transformer())),
        **under("cond_stage_model.transformer.", models.text_state()),
        **under("first_stage_model.", halved(vae.taesd())),
        "first_stage_model.vae_scale": torch.tensor(_LATENT_SCALE),
        "first_stage_model.vae_shift": torch.tensor(0.0),
    }


def without_idle_layer(source: Path, target: Path) -> None:
    """Copy an adapter's file without the megabyte of zeros that is its layer for the idle one."""
    state, metadata = _adapter(source)
    save(target, {key: x for key, x in state.items() if not key.startswith(_IDLE)}, metadata)


def with_idle_layer(source: Path, target: Path) -> None:
    """Copy what `without_idle_layer` wrote, and put the layer back."""
    state, metadata = _adapter(source)
    layer = {key: x for key, x in state.items() if key.startswith(_BUSY)}
    idle = {key.replace(_BUSY, _IDLE): torch.zeros_like(x) for key, x in layer.items()}
    save(target, state | idle, metadata)


def _adapter(source: Path) -> tuple[State, dict[str, str]]:
    with safe_open(source, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118


def checksum(path: Path) -> str:
    """Return the SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def checksums() -> dict[str, str]:
    """Return every shipped file's checksum, by its name."""
    return {name: what["sha256"] for name, what in manifest()["files"].items()}


def made() -> dict[str, Any]:
    """Return `recipe`, a hash of all that was asked for, `seed`, `minutes`, and `on` what."""
    known = manifest()
    asked = {key: known[key] for key in known.keys() - {"seed", *NOT_ASKED}}
    recipe = json.dumps(asked, sort_keys=True)
    return {
        "recipe": hashlib.sha256(recipe.encode()).hexdigest()[:16],
        "seed": known["seed"],
        "minutes": round(known["seconds_in_all"] / 60),
        "on": known["made_on"],
    }


def manifest() -> dict[str, Any]:
    """Read what is shipped. Raises FileNotFoundError if `FOLDER` holds no build."""
    if not (FOLDER / MANIFEST).is_file():
        raise FileNotFoundError(
            f"'{FOLDER}' has no {MANIFEST}, so it holds no miniature. {BUILD_VARIABLE} in the "
            "environment names the folder of a build; leave it out for the one that is shipped."
        )
    return dict(json.loads((FOLDER / MANIFEST).read_text(encoding="utf-8")))
