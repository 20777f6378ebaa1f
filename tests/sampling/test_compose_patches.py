"""Patches of the host's own nodes, put on the model before the image prompt or after it."""

from __future__ import annotations

import pytest
import torch

SIZE = 16


def freeu(model):
    from comfy_extras.nodes_freelunch import FreeU

    return FreeU.execute(model, 1.1, 1.2, 0.9, 0.2)


def freeu_v2(model):
    from comfy_extras.nodes_freelunch import FreeU_V2

    return FreeU_V2.execute(model, 1.3, 1.4, 0.9, 0.2)


def hypertile(model):
    from comfy_extras.nodes_hypertile import HyperTile

    return HyperTile.execute(model, 64, 2, 1, False)


def token_merging(model):
    from comfy_extras.nodes_tomesd import TomePatchModel

    return TomePatchModel.execute(model, 0.5)


def differential_diffusion(model):
    from comfy_extras.nodes_differential_diffusion import DifferentialDiffusion

    return DifferentialDiffusion.execute(model, 1.0)


def downscale(model):
    """To 5 x 5 where a mask has 8 x 8 and 4 x 4."""
    from comfy_extras.nodes_model_downscale import PatchModelAddDownscale

    return PatchModelAddDownscale.execute(model, 3, 1.6, 0.0, 0.5, True, "bicubic", "bicubic")


def rescale_cfg(model):
    from comfy_extras.nodes_model_advanced import RescaleCFG

    return RescaleCFG().patch(model, 0.7)


NODES = [
    freeu,
    freeu_v2,
    hypertile,
    token_merging,
    differential_diffusion,
    downscale,
    rescale_cfg,
]


@pytest.fixture(scope="module")
def run(small):
    """Sampling with what any of the nodes needs: a denoise mask, and their random numbers."""
    denoise = torch.linspace(0, 1, SIZE).expand(1, 1, SIZE, SIZE)
    latent = torch.randn(1, 4, SIZE, SIZE, generator=torch.Generator().manual_seed(5))

    def run(model):
        torch.manual_seed(0)
        guider = small.guider(model, small.text(1), small.text(2))
        return small.run(guider, size=SIZE, batch=1, denoise_mask=denoise, latent=latent)

    return run


def with_node(node, model):
    out = node(model)
    return getattr(out, "args", out)[0]  # some nodes return a plain tuple


@pytest.mark.parametrize("node", NODES, ids=lambda n: n.__name__)
def test_both_act_in_either_order(small, truth, run, node):
    # Merging chooses tokens by their similarity: rounding must not decide.
    model = small.model(dtype=torch.float64 if node is token_merging else torch.float32)
    adapter, images, texts = small.adapter(), small.images(), (small.text(1), small.text(2))
    # Of the latent's size: layers of a size that no level has get theirs from this one.
    mask = torch.rand(1, SIZE, SIZE, generator=torch.Generator().manual_seed(6))
    settings = {"mask": mask, "weight": 0.8}
    sides = truth.sides(adapter, images, **settings)
    alone = with_node(node, model)
    before = run(alone)
    assert not torch.equal(before, run(model)), "the node itself does nothing"
    expected = run(truth.apply(alone, small.SD15_LAYERS, *zip(texts, sides, strict=True)))
    node_first = small.apply(alone, adapter, images, **settings)
    images_first = with_node(node, small.apply(model, adapter, images, **settings))
    for patched in (node_first, images_first):
        truth.check(run(patched), expected, before)
    assert torch.equal(run(alone), before)
