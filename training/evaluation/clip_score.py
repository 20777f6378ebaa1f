"""CLIP-I and CLIP-T: how like the reference, and how like its caption, a picture is.

The paper measures both with CLIP ViT-L/14 (section 4.2). The model that scores need not be the
adapter's image encoder, and had better not be.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import open_clip
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import AutoTokenizer, CLIPModel

from .. import fingerprints
from ..errors import TrainingError
from ..models import image_towers

CLIP_T_SCALE = 2.5  # w of CLIPScore (arXiv 2104.08718, equation 1)

T = TypeVar("T")


def clip_i(pictures: Tensor, references: Tensor) -> Tensor:
    """`(N,)`: cosine of the embeddings `(N, E)` of pictures and of their references."""
    return _cosine(pictures, references)


def clip_t(pictures: Tensor, captions: Tensor) -> Tensor:
    """`(N,)`: CLIPScore, 2.5 · max(cosine, 0), of pictures and captions, both `(N, E)`.

    The captions stand as they are: CLIPScore's own prefix, "A photo depicts", is the caller's
    to put before them.
    """
    return CLIP_T_SCALE * _cosine(pictures, captions).clamp(min=0)


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    return (normalize(a.double(), dim=-1) * normalize(b.double(), dim=-1)).sum(-1)


class Clip(ABC):
    """A CLIP model with both towers, on a device. Embeddings come back on the CPU, in float32."""

    def __init__(self, model: nn.Module, name: str, batch: int = 32) -> None:
        self.model: Any = model.eval().requires_grad_(False)
        self.name, self.batch = name, batch

    @abstractmethod
    def _pixels(self, pictures: Sequence[Image.Image]) -> Tensor: ...

    @abstractmethod
    def _tokens(self, captions: Sequence[str]) -> dict[str, Tensor]: ...

    @abstractmethod
    def _encode_pixels(self, pixels: Tensor) -> Tensor: ...

    @abstractmethod
    def _encode_tokens(self, **tokens: Tensor) -> Tensor: ...

    def images(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Embeddings `(N, E)` of pictures, prepared as the model wants them."""
        return self._embed(pictures, lambda part: self._encode_pixels(self._pixels(part)))

    def texts(self, captions: Sequence[str]) -> Tensor:
        """Embeddings `(N, E)` of captions; longer ones than the model reads are cut."""
        return self._embed(captions, lambda part: self._encode_tokens(**self._tokens(part)))

    def fingerprint(self) -> str:
        """Of the weights, whatever name they go by."""
        return fingerprints.of_weights(self.model)

    @torch.no_grad()
    def _embed(self, items: Sequence[T], encode: Callable[[Sequence[T]], Tensor]) -> Tensor:
        return torch.cat([encode(part).float().cpu() for part in self._parts(items)])

    def _parts(self, items: Sequence[T]) -> Iterator[Sequence[T]]:
        for start in range(0, len(items), self.batch):
            yield items[start : start + self.batch]

    @property
    def _first(self) -> Tensor:
        return next(self.model.parameters())


class TransformersClip(Clip):
    """`transformers.CLIPModel` from a folder or the hub."""

    def __init__(self, name: str, batch: int = 32) -> None:
        super().__init__(CLIPModel.from_pretrained(name), name, batch)
        self._processor: Any = image_towers.Processor.from_pretrained(name)
        self._tokenizer: Any = AutoTokenizer.from_pretrained(name)
        self._length = self.model.config.text_config.max_position_embeddings

    def _pixels(self, pictures: Sequence[Image.Image]) -> Tensor:
        prepared = self._processor(images=list(pictures), return_tensors="pt").pixel_values
        return prepared.to(self._first)

    def _tokens(self, captions: Sequence[str]) -> dict[str, Tensor]:
        tokens = self._tokenizer(
            list(captions),
            padding=True,
            truncation=True,
            max_length=self._length,
            return_tensors="pt",
        )
        names = ("input_ids", "attention_mask")
        return {name: tokens[name].to(self._first.device) for name in names}

    def _encode_pixels(self, pixels: Tensor) -> Tensor:
        return _pooled(self.model.get_image_features(pixel_values=pixels))

    def _encode_tokens(self, **tokens: Tensor) -> Tensor:
        return _pooled(self.model.get_text_features(**tokens))


class OpenClip(Clip):
    """`open_clip:ViT-L-14/openai`, or `open_clip:ViT-L-14-quickgelu@FILE` (OpenAI's towers have
    quick GELUs, and a bare file does not say so)."""

    def __init__(self, name: str, batch: int = 32) -> None:
        architecture, weights, settings = image_towers.parsed_name(name)
        with warnings.catch_warnings():  # of the activation, which `settings` sets right
            warnings.filterwarnings("ignore", message="QuickGELU mismatch")
            model = open_clip.create_model(
                architecture, weights, require_pretrained=True, **settings
            )
        super().__init__(model, name, batch)
        self._prepare = image_towers.of_open_clip(model)[1]
        self._tokenizer = open_clip.get_tokenizer(architecture)

    def _pixels(self, pictures: Sequence[Image.Image]) -> Tensor:
        return torch.stack([self._prepare(picture) for picture in pictures]).to(self._first)

    def _tokens(self, captions: Sequence[str]) -> dict[str, Tensor]:
        return {"text": self._tokenizer(list(captions)).to(self._first.device)}

    def _encode_pixels(self, pixels: Tensor) -> Tensor:
        return self.model.encode_image(pixels)

    def _encode_tokens(self, **tokens: Tensor) -> Tensor:
        return self.model.encode_text(**tokens)


def load_clip(name: str, device: torch.device, batch: int = 32) -> Clip:
    """A scoring model in float32 by its name: `open_clip:…`, a folder, or a hub id.

    Raises TrainingError that names what was asked for if it cannot be had.
    """
    build = OpenClip if name.startswith(image_towers.OPEN_CLIP) else TransformersClip
    try:
        clip = build(name, batch)
    except (OSError, RuntimeError, KeyError, ValueError) as error:  # as the two libraries raise
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise TrainingError(
            f"The scoring model '{name}' cannot be loaded: {reason} Expected open_clip:NAME/TAG, "
            "open_clip:NAME@FILE, a folder of a transformers CLIPModel with its tokenizer and "
            "preprocessor, or its id on the hub (openai/clip-vit-large-patch14)."
        ) from error
    clip.model.to(device, torch.float32)
    return clip


def _pooled(output: Any) -> Tensor:
    return getattr(output, "pooler_output", output)  # transformers 4 gives the tensor itself
