"""The kernel budget, counted through the nodes on a UNet of SD1.5's full size."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="module")
def counts(host):
    from benchmarks import budget
    from benchmarks.world import World

    return budget.measure(World.build())


@pytest.mark.parametrize(
    "name",
    [
        "kernels_per_layer",
        "kernels_per_layer_mask",
        "kernels_per_layer_curve",
        "syncs_per_step",
        "kernels_outside_window",
        "resident_adapter_parameters",
    ],
)
def test_within_budget(counts, name):
    from benchmarks.__main__ import LIMITS

    assert counts[name] <= LIMITS[name]


def test_the_prompt_is_in_the_trace(counts):
    """One attention and one addition a layer at least: otherwise nothing was measured."""
    assert counts["kernels_per_layer"] >= 2
    assert counts["kernels_per_layer_mask"] > counts["kernels_per_layer"]
    assert counts["kernels_per_layer_curve"] > counts["kernels_per_layer"]
