"""CLIP-I and CLIP-T: how like the reference, and how like its caption, an image is.

The paper measures both with CLIP ViT-L/14 (section 4.2). The model that scores need not be the
adapter's image encoder, and had better not be.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import open_clip
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity
from transformers import AutoTokenizer, CLIPModel

from .. import fingerprints
from ..errors import TrainingError
from ..models import image_encoder

Encode = Callable[[Sequence[Any]], Tensor]  # N images or captions to (N, E)
CLIP_T_SCALE = 2.5  # w of CLIPScore (arXiv 2104.08718, equation 1)


def clip_i(images: Tensor, references: Tensor) -> Tensor:
    """Return `(N,)` cosines of the embeddings `(N, E)` of images and of their references."""
    return cosine_similarity(images.double(), references.double())


def clip_t(images: Tensor, captions: Tensor) -> Tensor:
    """Return `(N,)` CLIPScores, 2.5 · max(cosine, 0), of images and captions, both `(N, E)`.

    The captions stand as they are: CLIPScore's own prefix, "A photo depicts", is the caller's
    to put before them.
    """
    return CLIP_T_SCALE * clip_i(images, captions).clamp(min=0)


class Clip:
    """A CLIP model with both towers, on a device; its embeddings come on the CPU, in float32."""

    def __init__(
        self, name: str, batch: int, model: nn.Module, encode_images: Encode, encode_texts: Encode
    ) -> None:
        self.model: Any = model.eval().requires_grad_(False)
        self.name, self.batch = name, batch
        self._encode_images, self._encode_texts = encode_images, encode_texts

    def images(self, images: Sequence[Image.Image]) -> Tensor:
        """Return embeddings `(N, E)` of images, prepared as the model wants them."""
        return self._embed(images, self._encode_images)

    def texts(self, captions: Sequence[str]) -> Tensor:
        """Return embeddings `(N, E)` of captions; longer ones than the model reads are cut."""
        return self._embed(captions, self._encode_texts)

    def fingerprint(self) -> str:
        """Return a hash of the weights, whatever name they go by."""
        return fingerprints.of_weights(self.model)

    @torch.no_grad()
    def _embed(self, items: Sequence[Any], encode: Encode) -> Tensor:
        parts = [items[start : start + self.batch] for start in range(0, len(items), self.batch)]
        return torch.cat([encode(part).float().cpu() for part in parts])


def load_clip(name: str, device: torch.device, batch: int = 32) -> Clip:
    """Load a model in float32: `open_clip:…`, a folder, or a hub id. Raises TrainingError."""
    load = _open_clip if name.startswith(image_encoder.OPEN_CLIP) else _transformers
    try:
        clip = Clip(name, batch, *load(name))
    except (OSError, RuntimeError, KeyError, ValueError) as error:  # as the two libraries raise
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise TrainingError(
            f"The scoring model '{name}' cannot be loaded: {reason} Expected open_clip:NAME/TAG, "
            "open_clip:NAME@FILE, a folder of a transformers CLIPModel with its tokenizer and "
            "preprocessor, or its id on the hub (openai/clip-vit-large-patch14)."
        ) from error
    clip.model.to(device, torch.float32)
    return clip


def _transformers(name: str) -> tuple[nn.Module, Encode, Encode]:
    model: Any = CLIPModel.from_pretrained(name)
    processor: Any = image_encoder.Processor.from_pretrained(name)
    tokenizer: Any = AutoTokenizer.from_pretrained(name)
    length = model.config.text_config.max_position_embeddings

    def encode_images(images: Sequence[Image.Image]) -> Tensor:
        pixels = processor(images=list(images), return_tensors="pt").pixel_values
        return _pooled(model.get_image_features(pixel_values=pixels.to(model.device)))

    def encode_texts(captions: Sequence[str]) -> Tensor:
        cut = {"padding": True, "truncation": True, "max_length": length}
        tokens = tokenizer(list(captions), return_tensors="pt", **cut).to(model.device)
        ids, mask = tokens.input_ids, tokens.attention_mask
        return _pooled(model.get_text_features(input_ids=ids, attention_mask=mask))

    return model, encode_images, encode_texts


def _pooled(output: Any) -> Tensor:
    return getattr(output, "pooler_output", output)  # transformers 4 gives the tensor itself


def _open_clip(name: str) -> tuple[nn.Module, Encode, Encode]:
    """Load `open_clip:NAME/TAG` or `open_clip:NAME@FILE`: OpenAI's files are of NAME-quickgelu."""
    model, architecture = image_encoder.create_open_clip(name)
    _, prepare = image_encoder.of_open_clip(model)
    tokenizer = open_clip.get_tokenizer(architecture)

    def encode_images(images: Sequence[Image.Image]) -> Tensor:
        pixels = torch.stack([prepare(image) for image in images])
        return model.encode_image(pixels.to(model.logit_scale.device))

    def encode_texts(captions: Sequence[str]) -> Tensor:
        return model.encode_text(tokenizer(list(captions)).to(model.logit_scale.device))

    return model, encode_images, encode_texts
