"""The miniature's text encoder: CLIP ViT-L's layout with seeded random weights, never trained.

A random transformer tells words apart well enough for a UNet that is trained with it, and ComfyUI
runs it through its own text path. It follows from the seed, so it is made at set-up, not shipped.
"""

from __future__ import annotations

import functools
from tempfile import TemporaryDirectory

import torch
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from tests.support import checkpoint_layouts as layouts
from tests.support.random_models import State, weights
from training.models import clip_tokenizer as clip_vocabulary

SEED = 7
_AT_ONCE = 60  # captions


@functools.cache
def state() -> State:
    """Tensors in float16, keys beginning with `text_model.`"""
    return weights(layouts.clip_text_l(), SEED, dtype=torch.float16)


def model() -> CLIPTextModel:
    """The encoder of transformers, float32."""
    config = CLIPTextConfig(
        vocab_size=layouts.VOCABULARY,
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        eos_token_id=layouts.VOCABULARY - 1,
    )
    with torch.device("meta"):
        made = CLIPTextModel(config)
    inner = "final_layer_norm.weight" in made.state_dict()  # transformers 5 has no text_model
    tensors = {key.removeprefix("text_model." if inner else ""): x for key, x in state().items()}
    made.load_state_dict({key: x.float() for key, x in tensors.items()}, strict=False, assign=True)
    positions = torch.arange(layouts.POSITIONS)[None]
    for module in made.modules():
        if "position_ids" in module._buffers:
            module.position_ids = positions
    return made.eval().requires_grad_(False)


@torch.no_grad()
def states(captions: list[str], device: str = "cpu", stored: torch.dtype = torch.float32) -> Tensor:
    """The UNet's context of each caption, `(N, 77, 768)`, computed on `device` in float32; on the
    CPU as `stored`."""
    with TemporaryDirectory() as folder:
        from pathlib import Path

        clip_vocabulary.write(Path(folder))
        tokenizer = CLIPTokenizer.from_pretrained(folder)
    length = layouts.POSITIONS
    ids = tokenizer(captions, padding="max_length", max_length=length, return_tensors="pt")
    encoder = model().to(device)
    batches = ids.input_ids.to(device).split(_AT_ONCE)
    return torch.cat([encoder(batch).last_hidden_state.to("cpu", stored) for batch in batches])
