"""The day set and the full set: cases that run at night only."""

from __future__ import annotations

from typing import Any

import pytest


def nightly(*cases: Any) -> list[Any]:
    """Return the cases of a parametrized test marked `nightly`; one of several values is a tuple.

    Where two lists of cases are multiplied, a test is of the day set if both of its cases are.
    """
    marks = pytest.mark.nightly
    return [
        pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=marks) for case in cases
    ]
