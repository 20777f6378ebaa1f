"""Small models and pictures on the disk, and runs of train.py in this process."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import socket
from pathlib import Path

import pytest
import torch

from ip_adapter_core.variants import FAMILIES
from tests.support import image_folders, small_models


@pytest.fixture(scope="session")
def frozen(tmp_path_factory) -> Path:
    """`sd15`, `sdxl`: diffusers folders; `encoder`: a CLIP vision model."""
    folder = tmp_path_factory.mktemp("frozen")
    for family in FAMILIES:
        small_models.base(folder / family, family)
    small_models.image_encoder(folder / "encoder")
    return folder


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    """Forty pictures with captions beside them."""
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(40):
        image_folders.image(number, (80, 70)).save(folder / f"{number:02}.png")
        (folder / f"{number:02}.txt").write_text(f"picture {number}")
    return folder


@pytest.fixture
def settings(frozen, pictures, tmp_path, accelerate_anew):
    """The config of a small run, with changes."""
    from training.config import TrainConfig

    def settings(family: str = "sd15", **changes) -> TrainConfig:
        accelerate_anew()
        given = {
            "pretrained_model_name_or_path": str(frozen / family),
            "image_encoder_path": str(frozen / "encoder"),
            "train_data_dir": str(pictures),
            "output_dir": str(tmp_path / "run"),
            "resolution": 64,
            "max_train_steps": 4,
            "train_batch_size": 4,
            "dataloader_num_workers": 0,
            "logging_steps": 1,
            "report_to": "none",
            "learning_rate": 1e-3,
        }
        return TrainConfig(**{**given, **changes})

    return settings


@pytest.fixture
def cache_settings(frozen, pictures, tmp_path, accelerate_anew):
    """Settings of a small cache, with changes."""
    from training.cache import CacheConfig

    def cache_settings(family: str = "sd15", **changes) -> CacheConfig:
        given = {
            "pretrained_model_name_or_path": str(frozen / family),
            "image_encoder_path": str(frozen / "encoder"),
            "train_data_dir": str(pictures),
            "output_dir": str(tmp_path / "cache"),
            "resolution": 64,
            "features": "both",
            "rows_per_shard": 8,
            "batch_size": 3,
            "dataloader_num_workers": 0,
        }
        return CacheConfig(**{**given, **changes})

    return cache_settings


@pytest.fixture
def train(accelerate_anew):
    """Train as train.py does, without its command line; gives the trainer back."""
    from training.trainer import Trainer

    def train(config):
        accelerate_anew()
        trainer = Trainer(config)
        trainer.train()
        return trainer

    return train


@pytest.fixture
def finished(settings, train, arrow, tmp_path_factory):
    """The config of a run of four steps, whose folder holds it: made once, copied here."""
    config, kept = settings(), tmp_path_factory.getbasetemp() / "finished-run"
    if kept.exists():
        shutil.copytree(kept, config.output_dir)
    else:
        train(config)
        shutil.copytree(config.output_dir, kept)
    return config


@pytest.fixture
def forked():
    """Run a function in a child process that has all imports done already."""
    context = multiprocessing.get_context("fork")
    children = []

    def forked(function, *args):
        children.append(context.Process(target=function, args=args))
        children[-1].start()
        return children[-1]

    yield forked
    for child in children:
        child.kill()


@pytest.fixture
def two_ranks(forked, accelerate_anew):
    """Run a function in two child processes, with the variables that torchrun sets."""

    def as_rank(rank, port, function, args):
        from training.distributed import begin

        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": 2, "RANK": rank}
        where |= {"LOCAL_WORLD_SIZE": 2, "LOCAL_RANK": rank}
        os.environ.update({name: str(value) for name, value in where.items()})
        torch.set_num_threads(1)
        begin()
        function(*args)

    def two_ranks(function, *args):
        accelerate_anew()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        ranks = [forked(as_rank, rank, port, function, args) for rank in range(2)]
        for rank in ranks:
            rank.join(120)
        assert [rank.exitcode for rank in ranks] == [0, 0]

    return two_ranks
