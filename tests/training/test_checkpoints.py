"""A run goes on with the settings that it began with, also those that are newer than it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from training.checkpoints import check_same_run
from training.config import TrainConfig
from training.errors import TrainingError

IDENTITY = {"data": "d0", "global batch": 8}
BEGUN = TrainConfig(
    pretrained_model_name_or_path="base",
    image_encoder_path="encoder",
    feature_cache_dir="cache",
    output_dir="run",
)


@pytest.fixture
def stored():
    """What a run wrote before `debiased_estimation_loss` was an option."""
    settings = BEGUN.identity()
    settings.pop("debiased_estimation_loss")
    return {"step": 7, "settings": settings, "identity": IDENTITY}


def test_an_older_run_goes_on(stored):
    check_same_run(stored, BEGUN, IDENTITY)


@pytest.mark.parametrize(
    "changed, identity, said",
    [
        ({"debiased_estimation_loss": True}, {}, "debiased_estimation_loss was False, is True"),
        ({"i_drop_rate": 0.1}, {}, "i_drop_rate was 0.05, is 0.1"),
        ({}, {"data": "d1"}, "data was d0, is d1"),
    ],
)
def test_another_is_refused(stored, changed, identity, said):
    with pytest.raises(TrainingError, match=said) as raised:
        check_same_run(stored, replace(BEGUN, **changed), IDENTITY | identity)
    assert "at step 7" in str(raised.value)
