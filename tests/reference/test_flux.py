"""Image prompts on Flux predict the same here as in diffusers: XLabs' by its own code, InstantX's
by an attention processor that is written from the formula."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import grid_sample

from tests.support.sets import nightly

TOLERANCE = 1e-5
SIZES = ["SMALL", *nightly("REAL_DEPTH", "REAL_WIDTH")]


def error(found, expected):
    return float((found - expected).abs().max() / expected.abs().max())


def ramp(count):
    return [0.2 + 0.8 * i / count for i in range(count)]


@pytest.mark.parametrize("size", SIZES)
def test_the_host_and_diffusers_agree_without_an_adapter(flux, size):
    size = getattr(flux, size)
    texts = flux.text(1, size), flux.text(2, size)
    for call in flux.recorded(flux.model(size), *texts, cfg=3.0):
        assert error(call.out, flux._call(flux.twin(size), call)) < TOLERANCE


@pytest.mark.parametrize("tokens", [4, 16])
@pytest.mark.parametrize("cfg", [1.0, 3.0])
@pytest.mark.parametrize("scale", [0.3, 1.0, "ramp"])
@pytest.mark.parametrize("size", SIZES)
def test_xlabs_as_diffusers_runs_it(flux, size, scale, cfg, tokens):
    size = getattr(flux, size)
    state, prompt = flux.xlabs(size, tokens), flux.images()
    scales = ramp(size.double) if scale == "ramp" else [scale] * size.double
    given = {"layer_weights": scales} if scale == "ramp" else {"weight": scale}
    texts = flux.text(1, size), flux.text(2, size)
    model = flux.small.apply(flux.model(size), flux.adapter(state), prompt, **given)
    calls = flux.recorded(model, *texts, cfg=cfg)
    assert sum(not p for call in calls for p in call.positive) == (2 if cfg > 1 else 0)
    for call in calls:
        if tokens == 4 or size is flux.REAL_WIDTH:  # diffusers takes others for 4
            truth = flux.by_diffusers(size, call, state, prompt, scales)
        else:
            truth = flux.expected(size, call, [(state, prompt, scales, 1.0)])
        assert error(call.out, truth) < TOLERANCE
        assert error(call.out, flux._call(flux.twin(size), call)) > 0.01


@pytest.mark.parametrize("cfg", [1.0, 3.0])
@pytest.mark.parametrize("scale", [0.3, 1.0])
@pytest.mark.parametrize("size", SIZES)
def test_instantx_as_its_formula(flux, size, scale, cfg):
    size = getattr(flux, size)
    state, prompt = flux.instantx(size), flux.images()
    texts = flux.text(1, size), flux.text(2, size)
    model = flux.small.apply(flux.model(size), flux.adapter(state), prompt, weight=scale)
    for call in flux.recorded(model, *texts, cfg=cfg):
        expected = flux.expected(size, call, [(state, prompt, scale, 1.0)])
        assert error(call.out, expected) < TOLERANCE
        assert error(expected, flux._call(flux.twin(size), call)) > 0.01


@pytest.mark.parametrize("scaling", ["V only", "K+V"])
@pytest.mark.parametrize("kind", ["xlabs", "instantx"])
def test_layer_weights(flux, kind, scaling, monkeypatch, tmp_path):
    """The node has a number for every block, of which XLabs' adapters take those of double ones."""
    import folder_paths
    from comfyui_ip_adapter.nodes.weights import LayerWeights

    monkeypatch.setattr(folder_paths, "temp_directory", str(tmp_path))
    size, scales = flux.SMALL, [0.4, 1.5, 0.0, 0.7, 0.2, 2.0, 1.0]
    names = [f"double {i}" for i in range(3)] + [f"single {i}" for i in range(4)]
    changes = ", ".join(f"{name}: {scale}" for name, scale in zip(names, scales, strict=True))
    weights = LayerWeights.execute(flux.model(), "uniform", changes, scaling).args[0]
    state, prompt = flux.FILES[kind](size), flux.images()
    adapter = flux.adapter(state)
    model = flux.small.apply(flux.model(), adapter, prompt, layer_weights=weights)
    for call in flux.recorded(model, flux.text(1), flux.text(2), cfg=2.0):
        of_v, of_both = (
            flux.expected(size, call, [(state, prompt, scales, 1.0)], keys)
            for keys in (False, True)
        )
        truth, other = (of_v, of_both) if scaling == "V only" else (of_both, of_v)
        assert error(call.out, truth) < TOLERANCE
        assert error(call.out, other) > 1e-3


def over_patches(mask, height, width):
    """A mask `(1, H, W)` at the picture's patches, as diffusers' masks are resized: `(1, L, 1)`."""
    y, x = ((torch.arange(n).double() + 0.5) / n * 2 - 1 for n in (height, width))
    grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)[None]
    options = {"mode": "bicubic", "padding_mode": "border", "align_corners": False}
    return grid_sample(mask[None].double(), grid, **options).float().flatten(1)[..., None]


@pytest.mark.parametrize("references", [0, 1], ids=["", "Kontext"])
@pytest.mark.parametrize("side", [(8, 12), (7, 11)], ids=["even", "odd"])
@pytest.mark.parametrize("kind", ["xlabs", "instantx", "both"])
def test_masks_and_two_adapters(flux, kind, side, references):
    """Rows that have no place in the picture take the mask's mean."""
    size, model, prompts = flux.SMALL, flux.model(), []
    masks = [torch.rand(1, 16, 24), torch.rand(1, 9, 7)]
    kinds = ["xlabs", "instantx"] if kind == "both" else [kind]
    for i, (name, mask) in enumerate(zip(kinds, masks, strict=False)):
        state, prompt = flux.FILES[name](size), flux.images(seed=30 + i)
        model = flux.small.apply(model, flux.adapter(state), prompt, weight=0.7, mask=mask)
        prompts.append((state, prompt, 0.7, over_patches(mask, 4, 6)))
    more = {"reference_latents": [torch.randn(1, 4, 6, 8)]} if references else {}
    texts = flux.text(1, **more), flux.text(2, **more)
    for call in flux.recorded(model, *texts, cfg=2.0, size=side):
        assert len(call.references) == references
        assert error(call.out, flux.expected(size, call, prompts)) < TOLERANCE
