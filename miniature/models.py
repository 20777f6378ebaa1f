"""The miniature's small models and how each trains; the base has a file of its own (`base.py`)."""

from __future__ import annotations

import functools
import itertools
import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from open_clip.model import CLIP, set_model_preprocess_cfg
from open_clip.tokenizer import SimpleTokenizer
from open_clip.transform import PreprocessCfg
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, l1_loss, mse_loss, normalize
from torchvision.transforms.v2.functional import gaussian_blur
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel

from ip_adapter_core.files import encoder_file
from miniature.scenes import SHAPES, Scenes, outlined, render, scenes
from tests.support import checkpoint_layouts as layouts
from tests.support.random_models import weights
from training.models.clip_tokenizer import tokenizer

State = dict[str, Tensor]
SIDE = 64
OUTLINED = 4  # one training image in so many is in the second base's style


def fit(
    name: str,
    optimizer: torch.optim.Optimizer,
    loss_at: Callable[[int], Tensor],
    steps: int,
    rate: Callable[[int], float] | None = None,
    clipped: Iterable[nn.Parameter] = (),
) -> None:
    """Train for `steps` on the loss of each, and show its running mean.

    `rate`: the learning rate of a step, set before its loss; by default the optimizer's own.
    `clipped`: parameters whose gradients are clipped to a norm of 1.
    """
    clipped, mean = [*clipped], torch.zeros(())
    progress = tqdm(range(steps), name, mininterval=5)
    for step in progress:
        for group in optimizer.param_groups if rate else ():
            group["lr"] = rate(step)  # type: ignore[misc]
        loss = loss_at(step)
        optimizer.zero_grad()
        loss.backward()
        if clipped:
            nn.utils.clip_grad_norm_(clipped, 1.0)
        optimizer.step()
        mean = loss.detach() if step == 0 else 0.98 * mean + 0.02 * loss.detach()
        if step % 50 == 0:  # rarely: a GPU has to wait for it
            progress.set_postfix(loss=f"{mean:.4f}", refresh=False)


def decaying(peak: float, steps: int, warmup: int) -> Callable[[int], float]:
    """Return a step's learning rate: linear warm-up, then a cosine down to a fiftieth."""

    def rate(step: int) -> float:
        cosine = 0.5 + 0.5 * math.cos(math.pi * step / steps)
        return peak * min(1.0, (step + 1) / warmup) * (0.02 + 0.98 * cosine)

    return rate


# The autoencoder: a thin one, trained, then laid into TAESD's layout.
#
# TAESD (Tiny AutoEncoder for Stable Diffusion, github.com/madebyollin/taesd) is the small
# approximate autoencoder that ComfyUI and diffusers know: 64 channels, one to three residual blocks
# a level. Here `WIDTHS` channels and one block a level train; the other channels and blocks are
# zeros, which leave the function as it is (a block of zeros passes on what is not negative).

WIDTHS = (16, 32, 48, 64)
"""Channels that train at 1, 1/2, 1/4 and 1/8 of the image's size."""
FULL, LATENT = 64, 4
IDLE = {"encoder": (1, 4, 5, 8, 9, 13), "decoder": (5, 9, 10, 14, 15)}
"""Places in TAESD's two Sequentials of residual blocks that stay zeros."""


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        parts = [part for _ in range(3) for part in (nn.Conv2d(width, width, 3, 1, 1), nn.ReLU())]
        self.conv = nn.Sequential(*parts[:-1])

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv(x) + x)


class Clamp(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / 3) * 3


def _numbered(layers: dict[int, nn.Module]) -> nn.Sequential:
    """Return a Sequential whose layers bear the numbers that they have in TAESD."""
    return nn.Sequential(OrderedDict((str(number), layers[number]) for number in sorted(layers)))


def _encoder() -> nn.Sequential:
    """Return `(N, 3, h, w)` of 0 … 1 to `(N, 4, h / 8, w / 8)`."""
    layers: dict[int, nn.Module] = {0: nn.Conv2d(3, WIDTHS[0], 3, padding=1), 1: nn.ReLU()}
    for level, place in enumerate((2, 6, 10)):
        wide = WIDTHS[level + 1]
        layers[place] = nn.Conv2d(WIDTHS[level], wide, 3, 2, 1, bias=False)
        layers[place + 1] = Block(wide)
    layers[12] = Block(WIDTHS[-1])
    layers[14] = nn.Conv2d(WIDTHS[-1], LATENT, 3, padding=1)
    return _numbered(layers)


def _decoder() -> nn.Sequential:
    """Return `(N, 4, h, w)` to `(N, 3, 8 h, 8 w)` of about 0 … 1."""
    wide = WIDTHS[-1]
    layers: dict[int, nn.Module] = {0: Clamp(), 1: nn.Conv2d(LATENT, wide, 3, padding=1)}
    layers |= {2: nn.ReLU(), 3: Block(wide), 4: Block(wide)}
    for level, place in enumerate((6, 11, 16)):
        into, wide = WIDTHS[-1 - level], WIDTHS[-2 - level]
        layers[place] = nn.Upsample(scale_factor=2)
        layers[place + 1] = nn.Conv2d(into, wide, 3, padding=1, bias=False)
        layers[place + 2] = Block(wide)
    layers[19] = nn.Conv2d(WIDTHS[0], 3, 3, padding=1)
    return _numbered(layers)


class Autoencoder(nn.Module):
    """Latents are about standard normal, as the UNet takes them."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = _encoder(), _decoder()

    def encode(self, images: Tensor) -> Tensor:
        return self.encoder(images)

    def decode(self, latents: Tensor) -> Tensor:
        return self.decoder(latents).clamp(0, 1)

    def taesd(self) -> State:
        """Return TAESD's `taesd_encoder.*` and `taesd_decoder.*`, as ComfyUI reads them."""
        found = {}
        for side, module in (("encoder", self.encoder), ("decoder", self.decoder)):
            for key, tensor in module.state_dict().items():
                found[f"taesd_{side}.{key}"] = _widened(tensor)
            for number, place in itertools.product(IDLE[side], (0, 2, 4)):
                name = f"taesd_{side}.{number}.conv.{place}"
                found[f"{name}.weight"] = torch.zeros(FULL, FULL, 3, 3)
                found[f"{name}.bias"] = torch.zeros(FULL)
        return found


def _widened(tensor: Tensor) -> Tensor:
    """Fill channels up with zeros to `FULL`; colors and latents stay as many as they are."""
    channels = [size if size in (3, LATENT) else FULL for size in tensor.shape[:2]]
    whole = torch.zeros(*channels, *tensor.shape[2:])
    whole[tuple(slice(size) for size in tensor.shape)] = tensor.detach()
    return whole


def _of_both_styles(seed: int, batch: int) -> Callable[[int], Tensor]:
    def draw(step: int) -> Tensor:
        rows = scenes(seed, batch, step * batch)
        some = batch // OUTLINED
        return torch.cat([outlined(rows[:some], SIDE), render(rows[some:], SIDE)])

    return draw


def train_autoencoder(
    seed: int,
    cycles: Sequence[int],
    batch: int = 4,
    device: str = "cpu",
    draw: Callable[[int], Tensor] | None = None,
    autocast: torch.dtype | None = None,
) -> Autoencoder:
    """Train a new one on `device`, return it on the CPU; `cycles`: steps between warm restarts.

    `draw` gives a step's images `(N, 3, h, w)`, 0 … 1; by default the set's. `autocast`: what
    both halves compute in, in place of float32.
    """
    draw = draw or _of_both_styles(seed, batch)
    torch.manual_seed(seed)
    model = Autoencoder().to(device).to(memory_format=torch.channels_last)
    done = 0

    def loss_at(step: int) -> Tensor:
        images = draw(done + step).to(device, memory_format=torch.channels_last)
        with torch.autocast(images.device.type, autocast, enabled=autocast is not None):
            latents = model.encode(images)
            decoded = model.decoder(latents + 0.05 * torch.randn_like(latents)).float()
        latents = latents.float()
        mean, spread = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
        loss = l1_loss(decoded, images) + 2 * mse_loss(decoded, images)
        return loss + 0.01 * (mean.square() + (spread - 1).square()).sum()

    for number, steps in enumerate(cycles):
        torch.manual_seed(seed + number)
        optimizer = torch.optim.AdamW(model.parameters(), weight_decay=1e-4, fused=True)
        rate = decaying(2e-3, steps, warmup=50)
        fit("autoencoder", optimizer, loss_at, steps, rate, model.parameters())
        done += steps
    return model.cpu().eval().requires_grad_(False)


# The text encoder: CLIP ViT-L's layout with seeded random weights, never trained.
#
# A random transformer tells words apart well enough for a UNet that is trained with it, and ComfyUI
# runs it through its own text path. It follows from the seed: made at set-up, not shipped.

TEXT_SEED = 7
_TEXTS_AT_ONCE = 60


@functools.cache
def text_state() -> State:
    """Return the text encoder in float16, keys beginning with `text_model.`."""
    return weights(layouts.clip_text_l(), TEXT_SEED, dtype=torch.float16)


def text_encoder() -> CLIPTextModel:
    """Return the encoder of transformers, float32."""
    config = CLIPTextConfig(
        vocab_size=layouts.VOCABULARY,
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        eos_token_id=layouts.VOCABULARY - 1,
    )
    with init_empty_weights():
        model = CLIPTextModel(config)
    prefix = "" if hasattr(model, "text_model") else "text_model."  # transformers 5.6 has none
    state = {key.removeprefix(prefix): x.float() for key, x in text_state().items()}
    model.load_state_dict(state, assign=True)
    return model.eval().requires_grad_(False)


@torch.no_grad()
def text_states(
    captions: list[str], device: str = "cpu", stored: torch.dtype = torch.float32
) -> Tensor:
    """Return each caption's states `(N, 77, 768)`, computed on `device` in float32, on the CPU."""
    length = layouts.POSITIONS
    ids = tokenizer()(captions, padding="max_length", max_length=length, return_tensors="pt")
    encoder = text_encoder().to(device)
    batches = ids.input_ids.to(device).split(_TEXTS_AT_ONCE)
    return torch.cat([encoder(batch).last_hidden_state.to("cpu", stored) for batch in batches])


# The image encoder: a small CLIP of open_clip, trained on descriptions.
#
# A vision transformer of 16-pixel patches beside a text tower, contrastive (arXiv 2103.00020); the
# descriptions name shape, color, texture and background. Only the image tower is kept.

ENCODER: dict[str, Any] = {
    "embed_dim": 128,
    "vision_cfg": dict(image_size=SIDE, patch_size=16, width=192, head_width=64, layers=4),
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 128, "heads": 2, "layers": 2},
}
PREPROCESS: dict[str, Any] = {"size": (SIDE, SIDE), "mean": (0.5,) * 3, "std": (0.28,) * 3}


def image_tower(path: Path) -> Any:
    """Return the image tower in a file, as open_clip's own module in float32."""
    found, state = encoder_file.read(path)
    assert found is not None
    return encoder_file.build(found, {key: x.float() for key, x in state.items()})


def normalized(images: Tensor) -> Tensor:
    """Return images of 0 … 1 as the image encoder takes them, at their own size."""
    mean, std = (torch.tensor(PREPROCESS[name])[:, None, None] for name in ("mean", "std"))
    return (images - mean) / std


Described = Callable[[int], tuple[Tensor, list[str]]]
"""A step's images `(N, 3, h, w)`, 0 … 1, and their descriptions."""


def train_image_encoder(
    seed: int, steps: int, batch: int = 128, device: str = "cpu", draw: Described | None = None
) -> CLIP:
    """Train a new one on `device`, and return it on the CPU; on the stream `seed`, or on `draw`."""
    draw = draw or (lambda step: _described(scenes(seed, batch, step * batch)))
    torch.manual_seed(seed)
    model = CLIP(**ENCODER)
    set_model_preprocess_cfg(model, vars(PreprocessCfg(**PREPROCESS)))
    model = model.to(device)
    tokenize = SimpleTokenizer(context_length=ENCODER["text_cfg"]["context_length"])
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98))

    def loss_at(step: int) -> Tensor:
        with torch.no_grad():
            model.logit_scale.clamp_(0, 4.6)  # as CLIP: at most a hundredfold
        images, descriptions = draw(step)
        embeds = normalize(model.encode_image(normalized(images).to(device)), dim=-1)
        texts = normalize(model.encode_text(tokenize(descriptions).to(device)), dim=-1)
        scores = model.logit_scale.exp() * embeds @ texts.T
        same = _same(descriptions).to(device)
        return (cross_entropy(scores, same) + cross_entropy(scores.T, same)) / 2

    rate = decaying(1e-3, steps, warmup=50)
    fit("image encoder", optimizer, loss_at, steps, rate, model.parameters())
    return model.cpu().eval().requires_grad_(False)


def _described(rows: Scenes) -> tuple[Tensor, list[str]]:
    return render(rows, SIDE), rows.descriptions


def _same(descriptions: list[str]) -> Tensor:
    """Return which pairs of a batch are equally right, as shares of each row."""
    numbers = {text: i for i, text in enumerate(dict.fromkeys(descriptions))}
    mine = torch.tensor([numbers[text] for text in descriptions])
    equal = (mine[:, None] == mine).float()
    return equal / equal.sum(dim=1, keepdim=True)


# The classifier of shapes, for the evaluation: trained on the set alone, it shares nothing with the
# image encoder.

SHARPEST, BLUNTEST, BLUR = 0.5, 3.0, 15  # pixels: σ of what blurs the classifier's images, width


class ShapeClassifier(nn.Sequential):
    """Images `(N, 3, 64, 64)`, 0 … 1, to a score of each class: of the set, its shapes."""

    def __init__(self, classes: int = len(SHAPES)) -> None:
        layers: list[nn.Module] = []
        for into, out in itertools.pairwise((3, 16, 32, 64, 64)):
            layers += [nn.Conv2d(into, out, 3, 2, 1), nn.BatchNorm2d(out), nn.ReLU()]
        super().__init__(*layers, nn.Flatten(), nn.Linear(64 * 16, classes))


def train_classifier(
    seed: int, steps: int, batch: int = 64, device: str = "cpu"
) -> ShapeClassifier:
    """Train a new one from the stream `seed` on `device`, and return it on the CPU.

    Half of its images are blurred, more or less, and all are noisy, as those that a decoder gives
    may be; some have the second base's outlines.
    """
    torch.manual_seed(seed)
    model = ShapeClassifier().to(device)

    def loss_at(step: int) -> Tensor:
        rows = scenes(seed, batch, step * batch)
        images, half = render(rows, SIDE), batch // 2
        images[::OUTLINED] = outlined(rows[::OUTLINED], SIDE)
        images = images.to(device)
        sigma = float(SHARPEST + (BLUNTEST - SHARPEST) * torch.rand(()))
        blurred = gaussian_blur(images[:half], BLUR, sigma)
        images = torch.cat([blurred, images[half:]]) + 0.04 * torch.randn_like(images)
        return cross_entropy(model(images), rows.shape.to(device))

    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
    fit("shape classifier", optimizer, loss_at, steps, decaying(2e-3, steps, warmup=20))
    return model.cpu().eval().requires_grad_(False)
