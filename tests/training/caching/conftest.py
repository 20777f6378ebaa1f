"""Small caches."""

from __future__ import annotations

import shutil

import pytest

from training import cache


@pytest.fixture
def settings(frozen, pictures, tmp_path, arrow, accelerate_anew):
    """Settings of a small cache, with changes."""

    def settings(family="sd15", **changes):
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
        return cache.CacheConfig(**{**given, **changes})

    return settings


@pytest.fixture
def finished(settings, tmp_path_factory):
    """Settings of a small cache that is finished: made once, and copied."""
    kept = tmp_path_factory.getbasetemp() / "finished_cache"
    if not kept.exists():
        cache.make(settings(output_dir=str(kept)))
    shutil.copytree(kept, settings().output_dir)
    return settings()
