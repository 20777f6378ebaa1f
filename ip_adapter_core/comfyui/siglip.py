"""SigLIP's image embedding, which ComfyUI's CLIP_VISION does not give.

It is what an attention head pools of all hidden states: `SiglipMultiheadAttentionPoolingHead` of
transformers. ComfyUI drops that head when it loads the file, so it is read here, from the file in
models/clip_vision that the rest of the encoder came from.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import folder_paths
import torch
from comfy.clip_vision import ClipVisionModel
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.functional import gelu

from ..files.header import CheckpointError, read_header

MODEL_TYPE = "siglip_vision_model"
_HEAD = "vision_model.head."
_NORM = "vision_model.post_layernorm.weight"
_HEADS = 16
_EPS = 1e-6
_found: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()


class PoolingHead(nn.Module):
    """`(N, patches, width) -> (N, width)`: a learned query attends to all hidden states."""

    def __init__(self, width: int, hidden: int, heads: int = _HEADS, **factory: Any) -> None:
        super().__init__()
        self.probe = nn.Parameter(torch.empty(1, 1, width, **factory))
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True, **factory)
        self.layernorm = nn.LayerNorm(width, eps=_EPS, **factory)
        self.mlp = nn.ModuleDict(
            {
                "fc1": nn.Linear(width, hidden, **factory),
                "fc2": nn.Linear(hidden, width, **factory),
            }
        )

    def forward(self, states: Tensor) -> Tensor:
        probe = self.probe.expand(len(states), -1, -1)
        pooled = self.attention(probe, states, states, need_weights=False)[0]
        normed = self.layernorm(pooled)
        out: Tensor = pooled + self.mlp["fc2"](gelu(self.mlp["fc1"](normed), approximate="tanh"))
        return out[:, 0]


def pooled(clip_vision: ClipVisionModel, states: Tensor) -> Tensor:
    """Return the image embeddings of last hidden states `(N, patches, width)`, on the CPU.

    `(N, 0)` where no file in models/clip_vision has the head of this encoder.
    """
    head = _found.get(clip_vision)
    if head is None:
        head = _head_of(clip_vision)
    if head is not None:
        _found[clip_vision] = head
    states = states.float().cpu()
    return states.new_zeros(len(states), 0) if head is None else head(states)


def _head_of(clip_vision: ClipVisionModel) -> PoolingHead | None:
    norm = clip_vision.model.vision_model.post_layernorm.weight.detach().float().cpu()
    for name in folder_paths.get_filename_list("clip_vision"):
        path = folder_paths.get_full_path("clip_vision", name)
        if path is None or Path(path).suffix not in (".safetensors", ".sft"):
            continue
        try:
            header = read_header(path)[0]
            if f"{_HEAD}probe" in header and header[_NORM].shape == norm.shape:
                with safe_open(path, framework="pt") as file:
                    if torch.equal(file.get_tensor(_NORM).float(), norm):
                        names = [key for key in file.keys() if key.startswith(_HEAD)]  # noqa: SIM118
                        head = {key.removeprefix(_HEAD): file.get_tensor(key) for key in names}
                        return _head(head)
        except (CheckpointError, OSError, KeyError, RuntimeError):  # of some other file there
            continue
    return None


def _head(tensors: dict[str, Tensor]) -> PoolingHead:
    hidden, width = tensors["mlp.fc1.weight"].shape
    head = PoolingHead(width, hidden, device="meta")
    head.load_state_dict({key: x.float() for key, x in tensors.items()}, assign=True)
    return head.requires_grad_(False)
