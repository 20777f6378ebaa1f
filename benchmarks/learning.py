"""Does an adapter learn to follow its reference? On a set and a base made here, in minutes.

python -m benchmarks.learning [--steps 3000] [--seeds 3]

The set: a disc of one colour before another, one caption for all. The base: a small UNet that is
trained on them without references, then frozen. The adapter is trained from scratch by
training/train.py's own step. Every so often the error of the predicted noise is measured on
pictures never seen, once with the picture itself as reference and once with another: what it learnt
is the difference.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from PIL import Image, ImageDraw
from torch import Tensor

from tests.support import small_models
from training.config import TrainConfig
from training.data.image import fit
from training.loss import Batch, weighted_mse
from training.trainer import Trainer

from . import beside_training, report

PICTURES, HELD_OUT, SIDE = 512, 128, 64
OUTPUT = report.OUTPUT.with_name("learning.json")


def make(folder: Path, base_steps: int) -> None:
    """Make `base`, whose UNet has learnt the images, `encoder`, `pictures` and `held_out`."""
    small_models.base(folder / "base", "sd15")
    small_models.image_encoder(folder / "encoder")
    splits = {"pictures": range(PICTURES), "held_out": range(PICTURES, PICTURES + HELD_OUT)}
    for name, numbers in splits.items():
        (folder / name).mkdir()
        for number in numbers:
            picture(number).save(folder / name / f"{number}.png")
            (folder / name / f"{number}.txt").write_text("a picture")
    _sharpen(folder)
    drops = {"i_drop_rate": 1.0, "t_drop_rate": 0.0, "ti_drop_rate": 0.0}
    trainer = Trainer(config(folder, "pictures", 0, **drops))
    unet = trainer.unet.requires_grad_(True)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-3)
    for _ in range(base_steps):
        batch = trainer.encode(next(trainer.batches))
        latents = trainer.loss.sample_latents(batch)
        noisy_latents, target = trainer.loss.add_noise(latents, batch)
        predicted = unet(noisy_latents, batch["timestep"], batch["states"]).sample
        weighted_mse(predicted, target, batch["weight"]).backward()
        optimizer.step()
        optimizer.zero_grad()
    unet.save_pretrained(folder / "base" / "unet")


def picture(number: int) -> Image.Image:
    """Draw a disc before a background, both of any color."""
    chance = random.Random(number)
    behind, before = (tuple(chance.randrange(256) for _ in "rgb") for _ in range(2))
    made = Image.new("RGB", (SIDE, SIDE), behind)
    x, y, radius = (chance.uniform(*span) * SIDE for span in ((0.3, 0.7), (0.3, 0.7), (0.2, 0.4)))
    ImageDraw.Draw(made).ellipse((x - radius, y - radius, x + radius, y + radius), fill=before)
    return made


def _sharpen(folder: Path) -> None:
    """Give the VAE's posterior a trained one's small variance, and latents of unit size.

    A random one's is all noise.
    """
    path = folder / "base" / "vae"
    vae = AutoencoderKL.from_pretrained(path)
    moments = vae.quant_conv
    moments.weight.data[4:], moments.bias.data[4:] = 0, -20
    with torch.no_grad():
        sample = torch.stack([fit(picture(n), (SIDE, SIDE)).pixels for n in range(64)])
        mean = vae.encode(sample).latent_dist.mean
        centre = mean.mean((0, 2, 3))
        moments.bias.data[:4] -= centre
        vae.register_to_config(scaling_factor=1 / (mean - centre[:, None, None]).std().item())
    vae.save_pretrained(path)


def config(folder: Path, data: str, seed: int, **changes: Any) -> TrainConfig:
    given = {
        "train_data_dir": str(folder / data),
        "seed": seed,
        "resolution": SIDE,
        "train_batch_size": 16,
        "learning_rate": 1e-3,
        "report_to": "none",
    }
    return beside_training.config(folder, **(given | changes))


def margin(trainer: Trainer, batches: list[Batch]) -> tuple[float, float]:
    """Mean error of the predicted noise with the right reference, and with the next picture's."""
    found = []
    for shift in (0, 1):
        errors: list[Tensor] = []
        for batch in batches:
            wrong = {**batch, "features": batch["features"].roll(shift, dims=0)}
            with torch.no_grad():
                errors.append(trainer.loss(trainer.adapter, wrong))
        found.append(torch.stack(errors).mean().item())
    return found[0], found[1]


def train(folder: Path, seed: int, steps: int, every: int) -> Iterator[dict[str, float]]:
    """One adapter from scratch; errors on the held-out pictures before and while it learns."""
    none = {"i_drop_rate": 0.0, "t_drop_rate": 0.0, "ti_drop_rate": 0.0}
    held_out = Trainer(config(folder, "held_out", seed, **none))
    batches = [held_out.encode(next(held_out.batches)) for _ in range(HELD_OUT // 16 * 4)]
    trainer = Trainer(config(folder, "pictures", seed))
    while True:
        if trainer.step % every == 0:
            right, wrong = margin(trainer, batches)
            yield {"step": trainer.step, "right": right, "wrong": wrong, "margin": wrong - right}
        if trainer.step == steps:
            return
        trainer.train_step()
        trainer.step += 1


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--base-steps", type=int, default=3000)
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    curves: dict[int, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as name:
        make(Path(name), given.base_steps)
        for seed in range(given.seeds):
            curves[seed] = []
            print(f"seed {seed}{'step':>12}{'right':>10}{'wrong':>10}{'margin':>10}")
            for point in train(Path(name), seed, given.steps, max(1, given.steps // 6)):
                curves[seed].append(point)
                print("{step:>19}{right:>10.4f}{wrong:>10.4f}{margin:>10.4f}".format(**point))
    report.write(curves, OUTPUT)
    print(OUTPUT)


if __name__ == "__main__":
    main()
