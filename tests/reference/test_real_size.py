"""The same comparison at the real sizes, with base adapters of the published shapes.

SDXL's takes 14 GB of memory and minutes: it runs where IP_ADAPTER_SLOW is set.
"""

from __future__ import annotations

import gc
import os

import pytest
import torch

TOLERANCE = 1e-4


@pytest.fixture
def real(request, unets, adapters, both):
    """Real channels, once, and nothing kept: each is gigabytes."""
    unets.comfy_model.cache_clear()
    torch.set_num_threads(os.cpu_count() or 1)
    pair = both.Pair(getattr(unets, request.param), adapters.VIT_H)
    yield pair
    vars(pair).clear()
    unets.comfy_model.cache_clear()
    gc.collect()


def largest_error(both, pair, kind, size, mask=None):
    settings = [both.Setting(kind, pair.encoder.prompt(1, seed=0), 0.8, mask)]
    scales = [[0.8] * len(pair.family.widths)]
    masks = None if mask is None else [mask[None]]
    errors = []
    for call in pair.comfy(settings, "model", size):
        expected = pair.diffusers(call, [kind], [settings[0].prompt], scales, masks)
        errors.append(both.error(call.out, expected))
    return max(errors)


@pytest.mark.nightly
@pytest.mark.parametrize("real", ["SD15"], indirect=True)
def test_sd15(unets, both, real):
    unet = unets.comfy_model(real.family).model.diffusion_model
    assert sum(p.numel() for p in unet.parameters()) == 859_520_964
    assert largest_error(both, real, "base", (16, 16)) < TOLERANCE


@pytest.mark.slow
@pytest.mark.skipif(
    "IP_ADAPTER_SLOW" not in os.environ, reason="14 GB: set IP_ADAPTER_SLOW to run it"
)
@pytest.mark.parametrize("real", ["SDXL"], indirect=True)
def test_sdxl(unets, both, real):
    unet = unets.comfy_model(real.family).model.diffusion_model
    assert sum(p.numel() for p in unet.parameters()) == 2_567_463_684
    assert largest_error(both, real, "base", (32, 32), torch.rand(1, 256, 256)) < TOLERANCE
