"""What the adapters have learnt: whose hand a sample shows, which subject, whether it is a copy.

Judges that share nothing with the encoder look at samples of references that no adapter has seen,
each under the text of another subject. Beside every figure stands what the same judge makes of the
drawings themselves.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import to_image

from training.evaluation.adapters import load
from training.models.base import load_base
from training.models.image_encoder import ImageEncoder
from training.recipes.emoji.drawings import HELD_OUT_HAND, caption
from training.recipes.emoji.pictures import Pictures
from training.sampling import Prompts, Sampler, SamplingOptions, encode_images, encode_text
from training.unet import attach

SCALES = (0.0, 0.25, 0.5, 0.75, 1.0)
_BINS = 4  # of each colour, in a palette
_SHOWN = 8  # references on the sheet
_GAP = 2  # pixels


def measured(
    pictures: Pictures,
    checkpoint: Path,
    encoder: Path,
    adapters: Mapping[str, Path],
    judges: Mapping[str, Any],
    references: int,
    device: str = "cpu",
) -> tuple[dict[str, Any], Image.Image]:
    """Return the figures of every adapter, and a sheet of samples.

    `references` of each hand that trains, and as many of the one that does not.
    """
    base, eye = load_base(str(checkpoint)), ImageEncoder.from_name(f"open_clip:{encoder}")
    attach(base.unet)
    for part in (base.unet, base.vae, eye, *(text.encoder for text in base.text)):
        part.to(device)
    side = pictures.pixels.shape[-1]
    sampler = Sampler(base, SamplingOptions(steps=20, guidance=4.0, size=(side, side), batch=24))
    chosen, strange = _references(pictures, references)
    found: dict[str, Any] = {"judges": _of_drawings(pictures, judges), "adapters": {}}
    rows: list[list[Image.Image]] = []
    for name, path in adapters.items():
        ((_, adapter),) = load([str(path)])
        adapter.to(device)

        def draw(numbers: Tensor, scale: float, adapter: Any = adapter) -> list[Image.Image]:
            texts = [caption(pictures.subjects[int(s)]) for s in _texts(pictures, numbers)]
            images = [_picture(pictures.pixels[int(n)]) for n in numbers]
            features, zero = encode_images(eye, images, adapter.spec.features)
            seeds = [int(n) for n in numbers]
            text, weights = encode_text(base, texts), [scale] * len(seeds)
            return sampler.draw(adapter, Prompts(text, features, zero, weights, seeds))

        drawn = {scale: draw(chosen, scale) for scale in SCALES}
        scores = {str(s): _scores(pictures, judges, chosen, x) for s, x in drawn.items()}
        strangers = {s: _palettes(pictures, strange, draw(strange, s)) for s in (0.0, 1.0)}
        found["adapters"][name] = {
            "by_scale": scores,
            "held_out_hand": {str(scale): x for scale, x in strangers.items()},
        }
        if not rows:
            rows.append([_picture(pictures.pixels[int(n)]) for n in chosen[:_SHOWN]])
        rows += [drawn[scale][:_SHOWN] for scale in (0.0, 0.5, 1.0)]
    return found, _sheet(rows)


def _references(pictures: Pictures, each: int) -> tuple[Tensor, Tensor]:
    """Return drawings of held-out subjects, in turn of every hand that trains, and of the other."""
    held, other = pictures.held_out, pictures.hands.index(HELD_OUT_HAND)
    by_hand = {
        hand: held[pictures.hand[held] == hand][:each] for hand in range(len(pictures.hands))
    }
    strange = by_hand.pop(other)
    least = min(map(len, by_hand.values()))
    return torch.stack([x[:least] for x in by_hand.values()], 1).flatten(), strange


def _texts(pictures: Pictures, numbers: Tensor) -> Tensor:
    """Return a subject that trains for each reference, the same whatever the hand and scale."""
    subjects = pictures.subject[pictures.trained].unique()
    generator = torch.Generator().manual_seed(len(numbers))
    return subjects[torch.randint(len(subjects), (len(numbers),), generator=generator)]


def _picture(pixels: Tensor) -> Image.Image:
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


def _tensor(images: list[Image.Image]) -> Tensor:
    return torch.stack([to_image(image).float() / 255 for image in images])


@torch.no_grad()
def _judged(judge: Any, images: Tensor) -> Tensor:
    return torch.cat([judge(some).argmax(1) for some in images.split(256)])


def _scores(
    pictures: Pictures, judges: Mapping[str, Any], references: Tensor, drawn: list[Image.Image]
) -> dict[str, float]:
    """Shares of samples of the reference's hand, and of the text's subject, and of copies."""
    images, asked = _tensor(drawn), _texts(pictures, references)
    hand = _judged(judges["hands"], images) == pictures.hand[references]
    subject = _judged(judges["subjects"], images) == asked
    known = pictures.pixels[pictures.trained].float().flatten(1) / 255
    distance, nearest = torch.cdist(images.flatten(1), known).min(1)
    near = pictures.trained[nearest]
    palette = _palette(images) - _palette(pictures.images(references))
    return {
        "hand": float(hand.float().mean()),
        "subject": float(subject.float().mean()),
        "palette_distance": float(palette.abs().sum(1).mean()),
        "nearest_is_of_the_text": float((pictures.subject[near] == asked).float().mean()),
        "nearest_is_of_the_hand": float(
            (pictures.hand[near] == pictures.hand[references]).float().mean()
        ),
        # Root mean square, 8-bit levels; a copy would be near 0.
        "distance_to_the_nearest": float(distance.mean()) * 255 / images[0].numel() ** 0.5,
    }


def _palette(images: Tensor) -> Tensor:
    """Shares of colours among what is not white, `(N, bins³)`."""
    bins = (images * _BINS).long().clamp(0, _BINS - 1)
    code = (bins[:, 0] * _BINS + bins[:, 1]) * _BINS + bins[:, 2]
    counts = torch.nn.functional.one_hot(code.flatten(1), _BINS**3).float().sum(1)
    counts[:, -1] = 0
    return counts / counts.sum(1, keepdim=True).clamp(min=1)


def _palettes(pictures: Pictures, references: Tensor, drawn: list[Image.Image]) -> dict[str, float]:
    """Mean distance of palettes (0 … 2) to each one's own reference, and to the others'."""
    made, theirs = _palette(_tensor(drawn)), _palette(pictures.images(references))
    distances = torch.cdist(made, theirs, p=1)
    own = distances.diagonal()
    others = (distances.sum(1) - own) / (len(own) - 1)
    return {
        "palette_distance": float(own.mean()),
        "to_other_references": float(others.mean()),
        "nearer_to_its_own": float((own < others).float().mean()),
    }


def _of_drawings(pictures: Pictures, judges: Mapping[str, Any]) -> dict[str, float]:
    """Say how often the judges are right about drawings: hands of subjects never seen, subjects."""
    held = pictures.held_out
    images = pictures.images(held)
    hands = _judged(judges["hands"], images) == pictures.hand[held]
    every = pictures.trained
    subjects = _judged(judges["subjects"], pictures.images(every)) == pictures.subject[every]
    return {"hand": float(hands.float().mean()), "subject": float(subjects.float().mean())}


def _sheet(rows: list[list[Image.Image]]) -> Image.Image:
    wide, high = rows[0][0].size
    sheet = Image.new("RGB", (len(rows[0]) * (wide + _GAP), len(rows) * (high + _GAP)), "white")
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            sheet.paste(image, (x * (wide + _GAP), y * (high + _GAP)))
    return sheet
