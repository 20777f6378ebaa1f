"""Weights for the tests that need no host."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.support.random_models import State, weights


@pytest.fixture(scope="session")
def random_weights() -> Callable[..., State]:
    return weights
