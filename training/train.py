"""Train an IP-Adapter. The commands:

    accelerate launch training/train.py --base stable-diffusion-v1-5/stable-diffusion-v1-5 \\
        --image_encoder open_clip:ViT-H-14/laion2b_s32b_b79k --data pictures --out run

From a cache of what the frozen parts give, about twice as fast:

    accelerate launch training/cache.py --base … --image_encoder … --data pictures --out cache
    accelerate launch training/train.py --base … --image_encoder … --cache cache --out run

Eight GPUs with DeepSpeed ZeRO-2, as the paper; others lie in training/configs/:

    accelerate launch --config_file training/configs/zero2.yaml training/train.py --config my.yaml

The same command again goes on where the last one stopped. Every setting: `train.py --help`.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

if __name__ == "__main__":  # as a script: what is imported lies beside this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from accelerate.utils import send_to_device
from torch import Tensor
from tqdm import tqdm

from training import launch
from training import loss as recipe
from training.config import Settings, parse
from training.errors import TrainingError
from training.loss import Batch
from training.run import Run
from training.setup import prepare
from training.signals import StopRequest

logger = logging.getLogger("training")


def train(settings: Settings) -> None:
    """Train until `settings.steps`, or until asked to stop; saved either way."""
    run = prepare(settings)
    accelerator, adapter, optimizer = run.accelerator, run.adapter, run.optimizer
    bar = tqdm(
        initial=run.step,
        total=settings.steps,
        desc="training",
        disable=not accelerator.is_local_main_process,
    )
    with bar, StopRequest(accelerator) as stop:
        while run.step < settings.steps and not stop.requested():
            for _ in range(settings.accumulation):
                batch = next(run.batches)
                with accelerator.accumulate(adapter):
                    loss = training_loss(run, batch)
                    accelerator.backward(loss)
                    if accelerator.sync_gradients and settings.clip_norm is not None:
                        accelerator.clip_grad_norm_(adapter.parameters(), settings.clip_norm)
                    optimizer.step()
                    optimizer.zero_grad()
                run.meter.add(loss, batch)
            run.after_step(bar)
        run.finish()


def training_loss(run: Run, batch: Batch) -> Tensor:
    """One forward pass: paper, section 3.1, with both conditions."""
    batch = run.encode(send_to_device(batch, run.accelerator.device, non_blocking=True))
    clean = recipe.latents(batch, run.scaling, run.shift)
    seen, target = recipe.noised(run.noise_schedule, clean, batch)
    features, states, pooled = recipe.conditions(batch, run.dropped)
    with run.autocast():
        keys_values = run.adapter(features.float())
    predicted = run.predict(seen, batch, states, pooled, keys_values)
    weights = batch["weight"] * run.recipe.loss_weights(run.noise_schedule, batch["timestep"])
    return recipe.loss(predicted, target, weights)


def main() -> None:
    """The command line."""
    try:
        state = launch.begin()
    except TrainingError as error:
        sys.exit(f"train.py: {error}")
    settings = parse()
    level = logging.INFO if state.is_main_process else logging.WARNING
    logging.basicConfig(format="%(message)s", level=level)
    logging.getLogger("accelerate").setLevel(logging.WARNING)  # a line for every file saved
    try:
        train(settings)
    except TrainingError as error:
        sys.exit(f"train.py: {error}")


if __name__ == "__main__":
    main()
