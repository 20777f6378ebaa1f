"""Small models and pictures on the disk, and runs of train.py in this process."""

from __future__ import annotations

from pathlib import Path

import pytest

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
    """Settings of a small run, with changes."""
    from training.config import Settings

    def settings(family: str = "sd15", **changes) -> Settings:
        accelerate_anew()
        given = {
            "base": str(frozen / family),
            "image_encoder": str(frozen / "encoder"),
            "data": str(pictures),
            "out": str(tmp_path / "run"),
            "size": 64,
            "steps": 4,
            "batch_size": 4,
            "workers": 0,
            "log_every": 1,
            "log_with": "none",
            "learning_rate": 1e-3,
        }
        return Settings(**{**given, **changes})

    return settings
