"""Small caches."""

from __future__ import annotations

import shutil

import pytest

from training import cache


@pytest.fixture
def settings(cache_settings, arrow):
    return cache_settings


@pytest.fixture
def finished(settings, tmp_path_factory):
    """Settings of a small cache that is finished: made once, and copied."""
    kept = tmp_path_factory.getbasetemp() / "finished_cache"
    if not kept.exists():
        cache.make(settings(output_dir=str(kept)))
    shutil.copytree(kept, settings().output_dir)
    return settings()
