r"""Train an IP-Adapter (training/README.md tells more; every option: `train.py --help`).

    accelerate launch training/train.py \
        --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 \
        --image_encoder_path open_clip:ViT-H-14/laion2b_s32b_b79k \
        --train_data_dir images --output_dir run

The same command again resumes where the last one stopped. Two processes on CPUs:
`torchrun --nproc_per_node 2 training/train.py …`.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # as a script: what is imported lies beside this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from training.config import TrainConfig, parse
from training.distributed import script
from training.trainer import Trainer


def main() -> None:
    """Run the command line."""
    with script("train.py"):
        Trainer(parse(TrainConfig, "train.py")).train()


if __name__ == "__main__":
    main()
