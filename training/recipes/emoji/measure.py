"""What the adapters have learnt: whose hand a sample shows, which subject, whether it is a copy.

Judges that share nothing with the encoder look at samples of references that no adapter has seen,
each under the text of another subject; half of the texts name a subject that the reference's hand
has drawn, but not for the training. Beside every figure stands what the same judge makes of the
drawings themselves.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import to_image

from ip_adapter_core.contact_sheet import Column, Layout, Row, contact_sheet
from training.evaluation.adapters import load
from training.models.base import load_base
from training.models.image_encoder import ImageEncoder
from training.recipes.emoji.drawings import HANDS, HELD_OUT_HAND, caption
from training.recipes.emoji.pictures import Pictures
from training.sampling import Prompts, Sampler, SamplingOptions, encode_images, encode_text
from training.unet import attach

SCALES = (0.0, 0.25, 0.5, 0.75, 1.0)
TRANSFER = "style"  # the adapter of the second sheet
_BINS = 4  # of each colour, in a palette
_SHOWN = 8  # texts on a sheet
_LAYOUT = Layout(cell=(128, 128))
Figures = dict[str, float | None]
"""None: there was nothing to measure it of."""


@dataclass(frozen=True)
class Cases:
    """Numbers `(N,)` of references, and of the taught subjects that their texts name.

    `withheld (N,)`: the drawing of that subject by the reference's hand that no training saw,
    -1 where one did see it.
    """

    references: Tensor
    subjects: Tensor
    withheld: Tensor

    @property
    def hidden(self) -> Tensor:
        """Return which have such a drawing, `(N,)`."""
        return self.withheld >= 0

    def __getitem__(self, rows: Any) -> Cases:
        return Cases(self.references[rows], self.subjects[rows], self.withheld[rows])


class Samples:
    """Draws what an adapter makes of references and texts."""

    def __init__(self, pictures: Pictures, checkpoint: Path, encoder: Path, device: str) -> None:
        self.pictures, self.device = pictures, device
        self.base = load_base(str(checkpoint))
        self.eye = ImageEncoder.from_name(f"open_clip:{encoder}")
        attach(self.base.unet)
        texts = (text.encoder for text in self.base.text)
        for part in (self.base.unet, self.base.vae, self.eye, *texts):
            part.to(device)
        side = pictures.pixels.shape[-1]
        options = SamplingOptions(steps=20, guidance=4.0, size=(side, side), batch=24)
        self.sampler = Sampler(self.base, options)

    def adapter(self, path: Path) -> Any:
        ((_, adapter),) = load([str(path)])
        return adapter.to(self.device)

    def draw(self, adapter: Any, cases: Cases, scale: float) -> list[Image.Image]:
        """Return a sample of each case; a reference's noise is the same at every scale."""
        texts = [caption(self.pictures.taught[int(s)]) for s in cases.subjects]
        images = [_picture(self.pictures.pixels[int(n)]) for n in cases.references]
        features, zero = encode_images(self.eye, images, adapter.spec.features)
        seeds = [int(n) for n in cases.references]
        text, weights = encode_text(self.base, texts), [scale] * len(seeds)
        return self.sampler.draw(adapter, Prompts(text, features, zero, weights, seeds))

    @torch.no_grad()
    def decoded(self, images: Tensor) -> Tensor:
        """Return images `(N, 3, h, w)`, 0 … 1, as encoding and decoding leaves them."""
        coded = [self._decoded(some.to(self.device)).cpu() for some in images.split(64)]
        return torch.cat(coded)

    def _decoded(self, images: Tensor) -> Tensor:
        vae: Any = self.base.vae
        latents = vae.encode(images * 2 - 1).latents
        return (vae.decode(latents).sample / 2 + 0.5).clamp(0, 1)


def measured(
    pictures: Pictures,
    checkpoint: Path,
    encoder: Path,
    adapters: Mapping[str, Path],
    judges: Mapping[str, Any],
    references: int,
    device: str = "cpu",
) -> tuple[dict[str, Any], dict[str, Image.Image]]:
    """Return the figures of every adapter, and sheets of samples by their names.

    `references` of each hand that trains, and as many of the one that does not.
    """
    samples = Samples(pictures, checkpoint, encoder, device)
    cases, strange = chosen(pictures, references)
    found: dict[str, Any] = {
        "references": len(cases.references),
        "texts_of_withheld_drawings": int(cases.hidden.sum()),
        "drawings": of_drawings(pictures, judges, samples),
        "adapters": {},
    }
    shown = cases[:_SHOWN]
    first = [_picture(pictures.pixels[int(n)]) for n in shown.references]
    rows = [Row("References", first)]
    for name, path in adapters.items():
        adapter = samples.adapter(path)
        drawn = {scale: samples.draw(adapter, cases, scale) for scale in SCALES}
        others = {s: samples.draw(adapter, strange, s) for s in (SCALES[0], SCALES[-1])}
        found["adapters"][name] = {
            "by_scale": {str(s): scores(pictures, judges, cases, x) for s, x in drawn.items()},
            "held_out_hand": {
                str(s): palettes(pictures, strange.references, x) for s, x in others.items()
            },
        }
        rows += [
            Row(f"{name}, weight {scale:g}", drawn[scale][: len(first)]) for scale in SCALES[::2]
        ]
    found["at_equal_hand"] = at_equal_hand(found["adapters"])
    texts = [Column(caption(pictures.taught[int(s)])) for s in shown.subjects]
    sheets = {"samples": contact_sheet(rows, texts, layout=_LAYOUT)}
    if TRANSFER in adapters:
        sheets["transfer"] = transfer(samples, samples.adapter(adapters[TRANSFER]), cases, strange)
    return found, sheets


def chosen(pictures: Pictures, each: int) -> tuple[Cases, Cases]:
    """Return the cases of the hands that train, hand after hand in turn, and of the other hand."""
    held = pictures.held_out_for("subject")
    by_hand = {
        hand: own[:each]
        for hand in range(len(pictures.hands))
        if len(own := held[pictures.hand[held] == hand])
    }
    least = min(map(len, by_hand.values()))
    references = torch.stack([own[:least] for own in by_hand.values()], 1).flatten()
    strange = pictures.held_out_for("hand")[:each]
    return _with_texts(pictures, references), _with_texts(pictures, strange)


def _with_texts(pictures: Pictures, references: Tensor) -> Cases:
    """Name a subject that the base knows to each reference; to half, one without that drawing."""
    known = pictures.of_taught(pictures.trained)
    withheld = pictures.of_taught(pictures.held_out_for("drawing"))
    generator = torch.Generator().manual_seed(len(references))
    subjects, drawings = [], []
    for place, reference in enumerate(references):
        hand = pictures.hand[reference]
        turn = place + place // (len(HANDS) - 1)  # each hand has both kinds
        hidden = turn % 2 == 1 and bool((pictures.hand[withheld] == hand).any())
        pool = withheld if hidden else known
        pool = pool[pictures.subject[pool] != pictures.subject[reference]]
        if (pictures.hand[pool] == hand).any():
            pool = pool[pictures.hand[pool] == hand]
        row = pool[torch.randint(len(pool), (), generator=generator)]
        subjects.append(pictures.taught_subject[row])
        drawings.append(row if hidden else torch.tensor(-1))
    return Cases(references, torch.stack(subjects), torch.stack(drawings))


def _picture(pixels: Tensor) -> Image.Image:
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


def _tensor(images: list[Image.Image]) -> Tensor:
    return torch.stack([to_image(image).float() / 255 for image in images])


@torch.no_grad()
def _judged(judge: Any, images: Tensor) -> Tensor:
    return torch.cat([judge(some).argmax(1) for some in images.split(256)])


def _share(found: Tensor) -> float | None:
    return round(float(found.float().mean()), 4) if len(found) else None


def scores(
    pictures: Pictures, judges: Mapping[str, Any], cases: Cases, drawn: list[Image.Image]
) -> Figures:
    """Shares of samples of the reference's hand and of the text's subject, and how near they are.

    Distances are root mean squares in 8-bit levels: to the nearest drawing of the training, which
    a copy would be near 0 of.
    """
    images, hidden = _tensor(drawn), cases.hidden
    hand = _judged(judges["hands"], images) == pictures.hand[cases.references]
    subject = _judged(judges["subjects"], images) == cases.subjects
    known = pictures.trained
    distance, nearest = _distances(images, pictures.images(known)).min(1)
    near = known[nearest]
    theirs = pictures.images(cases.withheld[hidden])
    own = (images[hidden] - theirs).square().mean((1, 2, 3)).sqrt() * 255
    palette = _palette(images) - _palette(pictures.images(cases.references))
    return {
        "hand": _share(hand),
        "subject": _share(subject),
        "hand_of_withheld_drawings": _share(hand[hidden]),
        "subject_of_withheld_drawings": _share(subject[hidden]),
        "nearer_to_the_withheld_drawing_than_to_any_known": _share(own < distance[hidden]),
        "palette_distance": float(palette.abs().sum(1).mean()),
        "nearest_is_of_the_text": _share(pictures.taught_subject[near] == cases.subjects),
        "nearest_is_of_the_hand": _share(pictures.hand[near] == pictures.hand[cases.references]),
        "distance_to_the_nearest": float(distance.mean()),
    }


def _distances(images: Tensor, known: Tensor) -> Tensor:
    """Return the distance `(N, M)` of all pairs."""
    size = images[0].numel() ** 0.5
    return torch.cdist(images.flatten(1), known.flatten(1)) * 255 / size


def _palette(images: Tensor) -> Tensor:
    """Shares of colours among what is not white, `(N, bins³)`."""
    bins = (images * _BINS).long().clamp(0, _BINS - 1)
    code = (bins[:, 0] * _BINS + bins[:, 1]) * _BINS + bins[:, 2]
    counts = torch.nn.functional.one_hot(code.flatten(1), _BINS**3).float().sum(1)
    counts[:, -1] = 0
    return counts / counts.sum(1, keepdim=True).clamp(min=1)


def palettes(pictures: Pictures, references: Tensor, drawn: list[Image.Image]) -> Figures:
    """Mean distance of palettes (0 … 2) to each one's own reference, and to the others'."""
    made, theirs = _palette(_tensor(drawn)), _palette(pictures.images(references))
    distances = torch.cdist(made, theirs, p=1)
    own = distances.diagonal()
    others = (distances.sum(1) - own) / (len(own) - 1)
    return {
        "palette_distance": float(own.mean()),
        "to_other_references": float(others.mean()),
        "nearer_to_its_own": _share(own < others),
    }


def of_drawings(pictures: Pictures, judges: Mapping[str, Any], samples: Samples) -> Figures:
    """Say how often the judges are right: about the hands of subjects never seen, and subjects.

    Both about drawings as they are, and as the autoencoder leaves them, which no sample can pass;
    and how far it takes drawings from what they were.
    """
    held, every = pictures.held_out_for("subject"), pictures.of_taught(pictures.trained)
    found = {}
    for name, change in (("", lambda x: x), ("_decoded", samples.decoded)):
        hands, subjects = change(pictures.images(held)), change(pictures.images(every))
        judged = _judged(judges["hands"], hands)
        found[f"hand{name}"] = _share(judged == pictures.hand[held])
        found[f"subject{name}"] = _share(
            _judged(judges["subjects"], subjects) == pictures.taught_subject[every]
        )
    error = (subjects - pictures.images(every)).square().mean((1, 2, 3)).sqrt()
    return {**found, "distance_decoded": float(error.mean()) * 255}


def at_equal_hand(adapters: Mapping[str, Any]) -> dict[str, float]:
    """Return the share of the text's subject that every adapter keeps at the same share of hands.

    That is where each one's hand first reaches the least of their best, between two scales.
    """
    curves = {
        name: [(x["hand"], x["subject"]) for x in told["by_scale"].values()]
        for name, told in adapters.items()
    }
    level = min(max(hand for hand, _ in curve) for curve in curves.values())
    found = {"hand": level}
    for name, curve in curves.items():
        last = next(place for place, (hand, _) in enumerate(curve) if hand >= level)
        hands, subjects = zip(*curve[max(last - 1, 0) : last + 1], strict=True)
        found[name] = float(np.interp(level, hands, subjects))
    return found


def transfer(samples: Samples, adapter: Any, cases: Cases, strange: Cases) -> Image.Image:
    """Draw the same subjects in every hand: references above, each column from the one noise."""
    pictures = samples.pictures
    numbers = [
        next(int(n) for n in (*cases.references, *strange.references) if pictures.hand[n] == hand)
        for hand in pictures.hand[torch.cat([cases.references, strange.references])].unique()
    ]
    names = {hand.package: hand.name for hand in HANDS}
    columns = [Column("text alone")]
    for number in numbers:
        hand = pictures.hands[int(pictures.hand[number])]
        columns.append(Column(names[hand], "never seen" if hand == HELD_OUT_HAND else ""))
    first: list[Image.Image | None] = [_picture(pictures.pixels[n]) for n in numbers]
    rows = [Row("References", [None, *first])]
    for subject in cases.subjects[:_SHOWN]:
        count = len(numbers)
        same = Cases(torch.tensor(numbers), subject.repeat(count), torch.full((count,), -1))
        drawn = samples.draw(adapter, same, SCALES[-1])
        alone = samples.draw(adapter, same[:1], SCALES[0])
        rows.append(Row(caption(pictures.taught[int(subject)]), [*alone, *drawn]))
    return contact_sheet(rows, columns, layout=_LAYOUT)
