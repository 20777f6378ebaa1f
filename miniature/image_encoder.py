"""The miniature's image encoder: a small CLIP of open_clip, trained on descriptions.

A vision transformer of 16-pixel patches beside a text tower, contrastive (arXiv 2103.00020);
the descriptions name shape, colour, texture and background. Only the image tower is kept.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from open_clip.model import CLIP, set_model_preprocess_cfg
from open_clip.tokenizer import SimpleTokenizer
from open_clip.transform import PreprocessCfg
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from ip_adapter_core.files import encoder_file as image_tower
from miniature.scenes import render, scenes
from miniature.training import Progress, decaying

SIDE = 64
CONFIG: dict[str, Any] = {
    "embed_dim": 128,
    "vision_cfg": {
        "image_size": SIDE,
        "patch_size": 16,
        "width": 192,
        "head_width": 64,
        "layers": 4,
    },
    "text_cfg": {
        "context_length": 16,
        "vocab_size": 49408,
        "width": 128,
        "heads": 2,
        "layers": 2,
    },
}
PREPROCESS: dict[str, Any] = {"size": (SIDE, SIDE), "mean": (0.5,) * 3, "std": (0.28,) * 3}


def new(seed: int) -> CLIP:
    """One with random weights, and the preprocessing that it is trained with."""
    torch.manual_seed(seed)
    model = CLIP(**CONFIG)
    set_model_preprocess_cfg(model, vars(PreprocessCfg(**PREPROCESS)))
    return model


def tower(path: Path) -> Any:
    """The image tower in a file, as open_clip's own module in float32."""
    found, state = image_tower.read(path)
    assert found is not None
    return image_tower.build(found, {key: x.float() for key, x in state.items()})


def normalised(pictures: Tensor) -> Tensor:
    """Pictures of 0 … 1 as the encoder takes them, at their own size."""
    mean, std = (torch.tensor(PREPROCESS[name])[:, None, None] for name in ("mean", "std"))
    return (pictures - mean) / std


def train(seed: int, steps: int, batch: int = 128, device: str = "cpu") -> CLIP:
    """A new one, from the stream `seed`, on the CPU; trained on `device`."""
    model = new(seed).to(device)
    tokenize = SimpleTokenizer(context_length=CONFIG["text_cfg"]["context_length"])
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98))
    progress = Progress("image encoder", steps)
    for step in range(steps):
        decaying(optimizer, 1e-3, step, steps, warmup=50)
        rows = scenes(seed, batch, step * batch)
        pictures = normalised(render(rows, SIDE)).to(device)
        images = normalize(model.encode_image(pictures), dim=-1)
        texts = normalize(model.encode_text(tokenize(rows.descriptions).to(device)), dim=-1)
        scores = model.logit_scale.exp() * images @ texts.T
        same = _same(rows.descriptions).to(device)
        loss = (cross_entropy(scores, same) + cross_entropy(scores.T, same)) / 2
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, 4.6)  # as CLIP: at most a hundredfold
        progress.step(step, loss)
    return model.cpu().eval().requires_grad_(False)


def _same(descriptions: list[str]) -> Tensor:
    """Which pairs of a batch are equally right, as shares of each row."""
    numbers = {text: i for i, text in enumerate(dict.fromkeys(descriptions))}
    mine = torch.tensor([numbers[text] for text in descriptions])
    equal = (mine[:, None] == mine).float()
    return equal / equal.sum(dim=1, keepdim=True)
