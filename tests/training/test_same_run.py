"""A run goes on with the settings that it began with, also those that are newer than it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from training.config import Settings
from training.errors import TrainingError
from training.same_run import check_same

IDENTITY = {"data": "d0", "global batch": 8}
BEGUN = Settings(base="base", image_encoder="encoder", cache="cache", out="run")


@pytest.fixture
def stored():
    """What a run wrote before `debiased_estimation` was a setting."""
    settings = BEGUN.deciding()
    settings.pop("debiased_estimation")
    return {"step": 7, "settings": settings, "identity": IDENTITY}


def test_an_older_run_goes_on(stored):
    check_same(stored, BEGUN, IDENTITY)


@pytest.mark.parametrize(
    "changed, identity, said",
    [
        ({"debiased_estimation": True}, {}, "debiased_estimation was False, is True"),
        ({"drop_image": 0.1}, {}, "drop_image was 0.05, is 0.1"),
        ({}, {"data": "d1"}, "data was d0, is d1"),
    ],
)
def test_another_is_refused(stored, changed, identity, said):
    with pytest.raises(TrainingError, match=said) as raised:
        check_same(stored, replace(BEGUN, **changed), IDENTITY | identity)
    assert "at step 7" in str(raised.value)
