"""The squares that are cut out of pictures."""

from __future__ import annotations

import itertools

import pytest
import torch
from comfyui_ip_adapter.ip_adapter_core.crops import square_at, tiles


def places(height, width, count=1):
    """Pictures whose pixels say their picture, row and column."""
    axes = torch.arange(count), torch.arange(height), torch.arange(width)
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).float()


def box(square):
    """Top, left, side; fails for what is no square piece of one picture."""
    assert square.shape[0] == square.shape[1]
    top, left = (int(square[0, 0, i]) for i in (1, 2))
    expected = places(top + len(square), left + len(square))[0, top:, left:, 1:]
    assert torch.equal(square[..., 1:], expected)
    return top, left, len(square)


@pytest.mark.parametrize(
    "shape, point, expected",
    [
        ((100, 100), (0.2, 0.9), (0, 0, 100)),
        ((100, 300), (0.5, 0.5), (0, 100, 100)),
        ((100, 300), (0.25, 0.9), (0, 25, 100)),
        ((100, 300), (0.0, 0.5), (0, 0, 100)),
        ((100, 300), (1.0, 0.5), (0, 200, 100)),
        ((300, 100), (0.9, 0.5), (100, 0, 100)),
        ((300, 100), (0.5, 0.6), (130, 0, 100)),
        ((300, 100), (0.5, 1.0), (200, 0, 100)),
        ((1, 7), (0.9, 0.0), (0, 6, 1)),
    ],
)
def test_the_square_around_a_point(shape, point, expected):
    squares = square_at(places(*shape, count=2), *point)
    assert [box(square) for square in squares] == [expected] * 2
    assert squares[:, 0, 0, 0].tolist() == [0, 1]


@pytest.mark.parametrize("x, y, said", [(-0.1, 0, "x is -0.1"), (0, float("nan"), "y is nan")])
def test_a_point_outside(x, y, said):
    with pytest.raises(ValueError, match=f"{said}; expected a fraction"):
        square_at(places(4, 8), x, y)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(
    "short, long, grid, along, side",
    [
        (100, 100, 1, 1, 100),
        (100, 101, 1, 2, 100),
        (100, 200, 1, 2, 100),
        (100, 210, 1, 3, 100),
        (1, 30, 1, 30, 1),
        (100, 100, 2, 2, 50),
        (101, 101, 2, 2, 51),
        (1000, 1024, 2, 2, 512),
        (1000, 1024, 4, 4, 256),
        (512, 768, 2, 3, 256),
        (100, 310, 3, 9, 35),
        (2, 2, 4, 2, 1),
    ],
)
def test_tiles_cover_everything(short, long, grid, along, side, turned):
    height, width = (long, short) if turned else (short, long)
    image = places(height, width, count=2)
    cut = tiles(image, grid)
    across = min(grid, short)
    assert cut.shape == (2 * across * along, side, side, 3)
    boxes = [box(tile) for tile in cut]
    assert boxes[: len(boxes) // 2] == boxes[len(boxes) // 2 :] == sorted(set(boxes))
    assert (cut[:, 0, 0, 0] == torch.arange(2).repeat_interleave(across * along)).all()
    covered = torch.zeros(height, width, dtype=torch.bool)
    for top, left, side in boxes:
        covered[top : top + side, left : left + side] = True
    assert covered.all()
    for axis, length in ((0, height), (1, width)):
        starts = sorted({b[axis] for b in boxes})
        assert (starts[0], starts[-1]) == (0, length - side)
        steps = [b - a for a, b in itertools.pairwise(starts)]
        assert not steps or max(steps) - min(steps) <= 1, "not evenly spaced"


def test_a_strip_of_too_many():
    assert len(tiles(places(1, 64))) == 64
    with pytest.raises(ValueError, match="4000×1 pixels makes 4000 tiles; at most 64"):
        tiles(places(1, 4000))


@pytest.mark.parametrize("grid", [0, 5])
def test_grids_that_cannot_be(grid):
    with pytest.raises(ValueError, match=f"grid is {grid}; expected 1 … 4"):
        tiles(places(8, 8), grid)
