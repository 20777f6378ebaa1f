"""The kernel budget, counted through the nodes: counts do not know the model's widths."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="module", params=["small", pytest.param("full", marks=pytest.mark.nightly)])
def counts(host, request):
    """Of a UNet with all of SD1.5's layers, or of SD1.5's itself."""
    from benchmarks import budget, on_device
    from benchmarks.full_size import Setup

    sizes = on_device.SMALL if request.param == "small" else on_device.FULL
    return budget.measure(Setup.build(*next(iter(sizes.values()))))


def test_within_budget(counts):
    from benchmarks.__main__ import LIMITS

    limited = {
        *("kernels_per_layer", "kernels_per_layer_mask", "kernels_per_layer_curve"),
        *("syncs_per_step", "kernels_outside_window", "resident_adapter_parameters"),
    }
    assert limited < counts.keys()
    assert not {name: counts[name] for name in limited if counts[name] > LIMITS[name]}


def test_the_prompt_is_in_the_trace(counts):
    """One attention and one addition a layer at least: otherwise nothing was measured."""
    assert counts["kernels_per_layer"] >= 2
    assert counts["kernels_per_layer_mask"] > counts["kernels_per_layer"]
    assert counts["kernels_per_layer_curve"] > counts["kernels_per_layer"]
    assert counts["syncs_per_step_windowed"] == 1
