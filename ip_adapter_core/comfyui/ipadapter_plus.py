"""The one computation behind the Apply nodes of ComfyUI_IPAdapter_plus, on this pack's own path."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import Any

import comfy.model_base
import torch
from comfy.clip_vision import ClipVisionModel
from comfy.model_patcher import ModelPatcher
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import center_crop, resize

from ..compatibility import fits
from ..face_projection import unit
from ..files import finder
from ..files.finder import ADAPTER_PRESETS, AdapterFile, AdapterPreset, EncoderFile, Folder
from ..image_prompt import UNNAMED, ImageFeatures, ImagePrompt, bare
from ..ipadapter_plus.features import MOST_PIECES, across_images, enhanced, pieces, to_rows
from ..ipadapter_plus.presets import Preset, first
from ..ipadapter_plus.weight_types import Asked, foldings
from ..variants import CROSS_ATTENTION, FACE
from .apply import ApplySettings, apply_to_model, compile_prompts
from .encode import AT_ONCE, features, zero_features
from .encode_faces import prompt_of
from .layers import is_kolors, layers_at, layers_of, name_of
from .loaders import ManagedAdapter, find_files, loadable

logger = logging.getLogger("comfyui_ip_adapter")
_SDXL_BLOCKS = 11  # with cross-attention; SD1.5 has 16


@dataclass(frozen=True)
class Request:
    """One application of images to a model.

    The images are pictures, for the `clip_vision`, or `embeds` of one already. `composition`: those
    of the composition's blocks, where they differ from the others'. `per_latent`: image i for
    latent i, the last one for all that follow. `pieces`, `ratio`: see `features.enhanced`. `faces`:
    embeddings of the faces whose crops the pictures are; `structure`: see `FacePerceiver`.
    `like_the_old`: as ComfyUI_IPAdapter_plus computed it, without the middle block, with a black
    picture in place of training's empty one, and with its masks' resampling; `middle`: with the
    middle block all the same, as its first versions had it.
    """

    adapter: ManagedAdapter
    asked: Asked
    clip_vision: ClipVisionModel | None = None
    image: Tensor | None = None
    composition: Tensor | None = None
    negative: Tensor | None = None
    embeds: Tensor | None = None
    negative_embeds: Tensor | None = None
    combine: str = "concat"
    start_at: float = 0.0
    end_at: float = 1.0
    mask: Tensor | None = None
    per_latent: bool = False
    pieces: int = 1
    ratio: float = 1.0
    faces: Tensor | None = None
    structure: float | None = None
    like_the_old: bool = False
    middle: bool = False


def apply(model: ModelPatcher, request: Request) -> ModelPatcher:
    """Return a clone of the model that follows the images, or the model where nothing acts.

    Raises ValueError for what does not belong together, or an encoder that is missing.
    """
    _check_unet(model)
    if request.start_at > request.end_at:
        logger.warning(
            "start_at (%g) lies after end_at (%g): the image never acts.",
            request.start_at,
            request.end_at,
        )
        return model
    asked = request.asked
    if request.composition is not None:
        # The same as two applications, on blocks that they do not share.
        others = replace(request, composition=None, asked=replace(asked, composition=0.0))
        only = replace(request, composition=None, image=request.composition)
        only = replace(only, asked=replace(asked, weight=0.0))
        # Both look at the first one's side of guidance.
        only = replace(only, negative_embeds=_negative(request, _positive(request)))
        return apply(apply(model, others), only)
    settings = [
        ApplySettings(
            adapter=request.adapter,
            image_prompt=_prompt(request),
            weight=1.0,
            start_at=request.start_at,
            end_at=request.end_at,
            combine="per_latent" if request.per_latent else "concat",
            mask=request.mask,
            layer_weights=folding,
            latent_weights=latents if request.per_latent else latents and latents[:1],
            deal="last repeated",
            resampling="bilinear" if request.like_the_old else "bicubic",
        )
        for folding, latents in _foldings(model, request)
    ]
    for sides in compile_prompts(model, settings):
        model = apply_to_model(model, *sides)
    return model


def _foldings(model: ModelPatcher, request: Request) -> Any:
    layers = [layer.key for layer in layers_of(model)]
    sdxl = len({key[:2] for key in layers}) == _SDXL_BLOCKS
    return foldings(request.asked, layers, sdxl, middle=request.middle or not request.like_the_old)


def _face_prompt(request: Request) -> ImagePrompt:
    """Return the prompt of faces: their embeddings and, for FaceID Plus, their crops' states."""
    if request.faces is None:
        raise ValueError(
            f"'{request.adapter.name}' reads faces. Take an IPAdapter FaceID with an IPAdapter "
            "InsightFace Loader at 'insightface', or an IPAdapter Unified Loader FaceID, which "
            "brings its own."
        )
    spec = request.adapter.spec
    plus = len(spec.reads) > 1
    vision = needed(request.clip_vision) if plus else None
    structure = 1.0 if request.structure is None else float(request.structure)
    made = prompt_of(request.faces, vision, request.image, UNNAMED, structure)
    positive, negative = made.positive, made.negative
    if plus and (request.like_the_old or request.negative is not None):
        if request.negative is not None:
            states = encoded(request, request.negative).penultimate_hidden_states[:1]
        else:
            states = zero_side(spec.features, states_of(positive), vision, like_the_old=True)
        negative = replace(negative, penultimate_hidden_states=states)
    if request.combine != "concat" and len(positive) > 1 and not request.per_latent:
        face = positive.of(FACE)
        if spec.variant != "faceid-unnorm":
            face, made = unit(face), replace(made, exact_faces=True)
        positive = ImageFeatures(
            *(
                across_images(x, request.combine)
                for x in (positive.image_embeds, states_of(positive), face)
            )
        )
    return replace(made, positive=positive, negative=negative, encoder=UNNAMED)


def states_of(found: ImageFeatures) -> Tensor:
    return found.penultimate_hidden_states


def _prompt(request: Request) -> ImagePrompt:
    if FACE in request.adapter.spec.reads:
        return _face_prompt(request)
    positive = _positive(request)
    negative = to_rows(_negative(request, positive), len(positive))
    if request.combine != "concat" and len(positive) > 1 and not request.per_latent:
        positive, negative = across_images(positive, request.combine), negative[:1]
    if (negative == negative[:1]).all():
        negative = negative[:1]
    return bare(request.adapter.spec.features, positive, negative)


def _positive(request: Request) -> Tensor:
    if request.image is None:
        if request.embeds is None:
            raise ValueError(
                "There is neither an image nor embeds. Connect one of them: a Load Image to "
                "'image', or an IPAdapter Encoder to 'pos_embed'."
            )
        return request.embeds
    found = encoded(request, request.image, request.pieces, request.ratio)
    return getattr(found, request.adapter.spec.features)  # type: ignore[no-any-return]


def _negative(request: Request, positive: Tensor) -> Tensor:
    if request.negative_embeds is not None:
        return request.negative_embeds
    kind = request.adapter.spec.features
    if request.negative is not None:
        return getattr(encoded(request, request.negative), kind)  # type: ignore[no-any-return]
    return zero_side(kind, positive, request.clip_vision, request.like_the_old)


def zero_side(
    kind: str, positive: Tensor, clip_vision: ClipVisionModel | None, like_the_old: bool
) -> Tensor:
    """Return what stands against images of which nobody says it, one row.

    A zero embedding; hidden states of the dropped image of training, or of a black picture.
    """
    if kind == "image_embeds":
        return torch.zeros_like(positive[:1])
    encoder = needed(clip_vision)
    return zero_features(encoder, black=like_the_old).penultimate_hidden_states


def needed(clip_vision: ClipVisionModel | None) -> ClipVisionModel:
    """Return the encoder. Raises ValueError where there is none."""
    if clip_vision is None:
        raise ValueError(
            "There is no image encoder. Connect a Load CLIP Vision to 'clip_vision', or take the "
            "ipadapter of an IPAdapter Unified Loader, which brings its own."
        )
    return clip_vision


def encoded(request: Request, image: Tensor, grid: int = 1, ratio: float = 1.0) -> ImageFeatures:
    """Encode pictures, and the pieces of each where `grid` asks for it."""
    encoder = needed(request.clip_vision)
    whole = features(encoder, image)
    grid = min(grid, MOST_PIECES)
    if grid <= 1:
        return whole
    cut = [features(encoder, pieces(part, grid)) for part in image.split(AT_ONCE)]
    together = ImageFeatures(
        torch.cat([part.image_embeds for part in cut]),
        torch.cat([part.penultimate_hidden_states for part in cut]),
    )
    if request.adapter.spec.features != "image_embeds":  # which would be laid out for nothing
        together = replace(together, image_embeds=together.image_embeds[:, :0])
    return enhanced(whole, together, grid, ratio)


def encoder_mask(mask: Tensor | None, clip_vision: ClipVisionModel) -> Tensor | None:
    """Cut a mask `(M, H, W)` to its centre square, of the encoder's size."""
    side = clip_vision.image_size
    if mask is None or tuple(mask.shape[1:]) == (side, side):
        return mask
    cut = center_crop(mask[:, None], [min(mask.shape[1:])] * 2)
    interpolation = InterpolationMode.BICUBIC
    return resize(cut, [side, side], interpolation=interpolation, antialias=True)[:, 0]


def is_sdxl(model: ModelPatcher) -> bool:
    """Return whether ComfyUI takes the model for one of the SDXL family."""
    kinds = ("SDXL", "SDXLRefiner", "SDXL_instructpix2pix")
    return isinstance(model.model, tuple(getattr(comfy.model_base, kind) for kind in kinds))


def _check_unet(model: ModelPatcher) -> None:
    """Raise ValueError for a transformer, which that pack's weight types mean nothing on."""
    if layers_at(model.get_model_object("diffusion_model"), CROSS_ATTENTION):
        return
    layers_of(model)  # says what else it may be
    raise ValueError(
        f"The connected model ({name_of(model)}) is a transformer. The nodes of "
        "ComfyUI_IPAdapter_plus are for UNets: take Load IP-Adapter, Encode Image Prompt and Apply "
        "IP-Adapter."
    )


def find(
    model: ModelPatcher, preset: Preset, adapters: Folder, encoders: Folder
) -> tuple[AdapterFile, EncoderFile | None]:
    """Find a preset's adapter and encoder, by their names, else by what is in the files.

    No encoder for an adapter that reads faces alone.

    Raises ValueError for a preset that the model's family does not have, and FileNotFoundError,
    which says what to get.
    """
    _check_unet(model)
    sdxl = is_sdxl(model)
    family = "SDXL" if sdxl else "SD1.5"
    if not (preset.sdxl if sdxl else preset.sd15):
        raise ValueError(
            f"There is no adapter of the preset '{preset.name}' for {family}, which the connected "
            "model is. Choose another preset, or connect a model of the other family."
        )
    adapter = _by_name(model, preset, adapters, sdxl)
    if adapter is None:
        if not preset.native:
            raise FileNotFoundError(
                f"No IP-Adapter of the preset '{preset.name}' for {family} is in "
                f"{', '.join(adapters.paths)}. Expected a file with "
                f"'{(preset.sdxl if sdxl else preset.sd15)[-1].replace('.', '-')}' in its name."
            )
        choice = find_files(model, preset.native, adapters, encoders)
        version = choice.adapter.spec.sizes.get("shortcut", 0) + 1
        if preset.version not in (None, version):
            logger.warning(
                "Preset '%s': '%s' is taken for FaceID Plus v%d, by its name. Call it as the "
                "published file if it is the other one.",
                preset.name,
                choice.adapter.name,
                version,
            )
        named = _encoder_by_name(choice.adapter, preset, encoders)
        return choice.adapter, named or choice.encoder
    encoder = _encoder_by_name(adapter, preset, encoders)
    if encoder is None and adapter.spec.features != FACE:
        kind = ADAPTER_PRESETS.get(preset.native) or AdapterPreset(preset.name, "plus")
        seen = [loadable(file) for file in finder.encoders(encoders.files)]
        usable = [file for file in seen if isinstance(file, EncoderFile)]
        found = finder.choose([adapter], usable, kind)
        if found is None:
            folders = replace(adapters, files=(adapter,)), replace(encoders, files=tuple(seen))
            layers = layers_of(model)
            sizes = layers[0].context_dim, len(layers), adapter.spec.kolors
            search = finder.Search(type(model.model).__name__, *sizes, kind, *folders)
            raise FileNotFoundError(search.message([adapter]))
        encoder = found.encoder
    return adapter, encoder


def _by_name(
    model: ModelPatcher, preset: Preset, adapters: Folder, sdxl: bool
) -> AdapterFile | None:
    named = preset.adapter(adapters.files, sdxl)
    if named is None:
        return None
    (file,) = finder.adapters([named])
    kolors = is_kolors(model.get_model_object("diffusion_model"))
    if isinstance(file, AdapterFile) and fits(file.spec, layers_of(model), kolors):
        return file
    logger.warning(
        "Preset '%s': '%s' has its name, but %s. Looking for another by contents.",
        preset.name,
        named.name,
        "does not fit the connected model" if isinstance(file, AdapterFile) else file.reason,
    )
    return None


def _encoder_by_name(adapter: AdapterFile, preset: Preset, encoders: Folder) -> EncoderFile | None:
    named = first(encoders.files, preset.encoder)
    if named is None:
        return None
    (file,) = (loadable(file) for file in finder.encoders([named]))
    gives = isinstance(file, EncoderFile) and file.sizes.gives(adapter.spec)
    return file if gives else None  # type: ignore[return-value]
