"""Noise for the negative side: what each kind does, and where it draws from."""

from __future__ import annotations

import pytest
import torch
from comfyui_ip_adapter.ip_adapter_core.negative_noise import KINDS, noise
from torch.utils.flop_counter import FlopCounterMode


def picture(height=48, width=64, count=1, seed=0):
    shape = count, height, width, 3
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(48, 64), (1, 1), (300, 500), (700, 3)])
def test_strength_0_is_the_picture(kind, shape):
    given = picture(*shape, count=2)
    before = given.clone()
    assert torch.equal(noise(given, kind, 0.0, 0.0, 1), given)
    noise(given, kind, 1.0, 0.0, 1)
    assert torch.equal(given, before)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strength", [0.3, 1.0])
@pytest.mark.parametrize("shape", [(48, 64), (300, 500), (1, 9)])
def test_values_and_shapes(kind, strength, shape):
    for blur in (0.0, 3.0):
        made = noise(picture(*shape, count=2), kind, strength, blur, 5)
        assert made.shape == (2, *shape, 3)
        assert made.dtype == torch.float32
        assert made.min() >= 0 and made.max() <= 1


@pytest.mark.parametrize("kind", KINDS)
def test_the_seed_decides_and_no_other_generator_is_touched(kind):
    given = picture(64, 64)
    state = torch.get_rng_state()
    first = noise(given, kind, 0.5, 0.0, 7)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    assert torch.equal(noise(given, kind, 0.5, 0.0, 7), first)
    assert not torch.equal(noise(given, kind, 0.5, 0.0, 8), first)
    assert noise(given, kind, 0.5, 0.0, 2**64 - 1).isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_of_a_batch_is_as_alone(kind):
    given = picture(40, 40, count=3)
    batch = noise(given, kind, 0.6, 0.0, 3)
    assert torch.equal(batch[:1], noise(given[:1], kind, 0.6, 0.0, 3))
    same = noise(given[:1].repeat(2, 1, 1, 1), kind, 0.6, 0.0, 3)
    assert not torch.equal(same[0], same[1])


@pytest.mark.parametrize("kind", ["gaussian", "dissolve"])
def test_strength_1_leaves_nothing_of_the_picture(kind):
    one, other = (noise(picture(seed=seed), kind, 1.0, 0.0, 4) for seed in (0, 1))
    assert torch.equal(one, other)


def test_gaussian_is_a_mixture_with_normal_noise_around_grey():
    grey, black = torch.full((1, 200, 200, 3), 0.5), torch.zeros(1, 200, 200, 3)
    alone = noise(grey, "gaussian", 1.0, 0.0, 0)
    assert abs(alone.mean() - 0.5) < 0.005
    inside = alone[(alone > 0) & (alone < 1)]  # what was clipped would narrow it
    assert 0.21 < inside.std() < 0.23  # of a normal one of 0.25, cut at two deviations
    quarter = noise(black, "gaussian", 0.25, 0.0, 0)
    kept = (alone > 0) & (alone < 1) & (quarter > 0)
    torch.testing.assert_close(quarter[kept], 0.25 * alone[kept])


@pytest.mark.parametrize("strength", [0.1, 0.6])
def test_dissolve_gives_its_share_of_pixels_random_colours(strength):
    given = picture(200, 200)
    made = noise(given, "dissolve", strength, 0.0, 2)
    changed = (made != given).any(-1)
    assert abs(changed.float().mean() - strength) < 0.02
    colours = made[changed]
    assert torch.allclose(colours.mean(0), torch.full((3,), 0.5), atol=0.02)
    assert torch.allclose(colours.std(0), torch.full((3,), 12**-0.5), atol=0.02)
    assert torch.corrcoef(colours.T)[0, 1].abs() < 0.05


@pytest.mark.parametrize("shape", [(64, 96), (65, 50), (5, 5), (16, 300)])
def test_shuffle_keeps_every_colour(shape):
    given = picture(*shape)
    made = noise(given, "shuffle", 1.0, 0.0, 2)
    assert not torch.equal(made, given)

    def ordered(image):
        return sorted(map(tuple, image.reshape(-1, 3).tolist()))

    assert ordered(made) == ordered(given)


@pytest.mark.parametrize("strength", [0.25, 0.5, 1.0])
def test_shuffle_moves_its_share_of_whole_cells(strength):
    """64 × 96 pixels are 16 × 24 cells of 4 × 4, each here of a colour of its own."""
    colours = torch.rand(16, 24, 3, generator=torch.Generator().manual_seed(0))
    given = colours.repeat_interleave(4, 0).repeat_interleave(4, 1)[None]
    made = noise(given, "shuffle", strength, 0.0, 2)[0]
    cells = made.unflatten(1, (24, 4)).unflatten(0, (16, 4)).movedim(1, 2)
    assert torch.equal(cells, cells[:, :, :1, :1].expand_as(cells)), "a cell was cut"
    moved = (cells[:, :, 0, 0] != colours).any(-1)
    assert moved.sum() == round(strength * 16 * 24)


@pytest.mark.parametrize("kind", ["gaussian", "dissolve"])
def test_grains_are_as_large_as_an_encoder_sees(kind):
    """448 pixels are 224 grains: each of 2 × 2 pixels, so that resizing does not average them."""
    made = noise(torch.zeros(1, 448, 600, 3), kind, 1.0, 0.0, 0)
    grains = made[:, ::2, ::2]
    assert torch.equal(made, grains.repeat_interleave(2, 1).repeat_interleave(2, 2))
    assert (grains[:, 1:] != grains[:, :-1]).float().mean() > 0.8


def blurred(given, sigma):
    """Edges and all, by a matrix for each axis."""
    made = given.double()
    for dim in (1, 2):
        places = torch.arange(given.shape[dim], dtype=torch.float64)
        weights = torch.exp(-((places[:, None] - places) ** 2) / (2 * sigma**2))
        weights /= weights.sum(1, keepdim=True)
        made = torch.tensordot(made, weights, dims=([dim], [1])).movedim(-1, dim)
    return made.float()


@pytest.mark.parametrize(
    "shape, blur, error",
    [
        ((224, 300), 7.5, 1e-4),
        ((40, 900), 32.0, 1e-4),
        ((70, 1500), 32.0, 5e-3),  # 10 pixels: made of a smaller picture, as are the next
        ((600, 448), 16.0, 5e-3),
        ((900, 700), 32.0, 5e-3),
        ((90, 60), 1e4, 5e-3),
        ((90, 60), 1e308, 5e-3),
        ((90, 60), 1e-320, 0.0),
    ],
)
def test_blur_is_a_gaussian_up_to_the_edges(shape, blur, error):
    given = (picture(*shape) > 0.5).float()
    given[:, : shape[0] // 2, shape[1] // 3 :] *= 0.2
    truth = blurred(given, min(blur, 1e9) * min(shape) / 224) if blur > 1e-9 else given
    found = noise(given, "dissolve", 0.0, blur, 0)
    torch.testing.assert_close(found, truth, atol=error, rtol=0)


@pytest.mark.parametrize("shape", [(64, 30000), (30000, 64), (1000, 1500), (1, 4000)])
def test_blur_costs_no_more_where_pictures_are_large(shape):
    given = picture(*shape)
    with FlopCounterMode(display=False) as counter:
        found = noise(given, "dissolve", 0.0, 32.0, 0)
    assert found.isfinite().all()
    assert counter.get_total_flops() < 1000 * shape[0] * shape[1]


def test_grey_and_transparent_pictures():
    given = torch.rand(1, 20, 20, 4)
    made = noise(given, "dissolve", 0.5, 0.0, 0)
    assert torch.equal(made, noise(given[..., :3], "dissolve", 0.5, 0.0, 0))
    grey = given[..., :1]
    assert torch.equal(noise(grey, "shuffle", 0.0, 0.0, 0), grey.repeat(1, 1, 1, 3))


@pytest.mark.parametrize(
    "changed, said",
    [
        ({"kind": "salt"}, "kind is 'salt'; expected one of gaussian, dissolve, shuffle"),
        ({"strength": 1.5}, "strength is 1.5; expected 0"),
        ({"strength": float("nan")}, "strength is nan"),
        ({"blur": -1.0}, "blur is -1.0; expected a finite"),
        ({"blur": float("inf")}, "blur is inf"),
        ({"image": torch.rand(0, 8, 8, 3)}, r"image holds no pixels \(shape \[0, 8, 8, 3\]\)"),
        ({"image": torch.full((1, 8, 8, 3), torch.nan)}, "image contains NaN"),
    ],
)
def test_what_cannot_be(changed, said):
    given = {"image": picture(), "kind": "gaussian", "strength": 1.0, "blur": 0.0, "seed": 0}
    with pytest.raises(ValueError, match=said):
        noise(**{**given, **changed})
