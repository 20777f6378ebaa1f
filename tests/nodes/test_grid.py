"""Every weight with every start, and the sheet of their pictures."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _temporary(host, monkeypatch, tmp_path):
    import folder_paths

    monkeypatch.setattr(folder_paths, "temp_directory", str(tmp_path))


@pytest.fixture
def values(nodes):
    return nodes["IPA_GridValues"].execute


@pytest.fixture
def draw(nodes):
    return lambda *given: nodes["IPA_DrawGrid"].execute(*given).args[0]


def test_every_pair(values):
    weights, starts = values("0.5, 1", "0, 0.2, 0.4").args
    assert list(zip(weights, starts, strict=True)) == [
        *[(0.5, 0), (1, 0), (0.5, 0.2), (1, 0.2), (0.5, 0.4), (1, 0.4)]
    ]


def test_each_picture_stands_where_its_values_say(values, draw):
    """Pictures of one colour each: weight in red, start in green."""
    weights, starts = values("0.25, 0.5, 1", "0, 0.4").args
    pictures = [
        torch.tensor([w, s, 0.0]).expand(2, 64, 64, 3) for w, s in zip(weights, starts, strict=True)
    ]
    sheet = draw(pictures, weights, starts)[0]
    seen = {}
    for w, s in zip(weights, starts, strict=True):
        place = ((sheet - torch.tensor([w, s, 0.0])).abs().amax(-1) < 0.01).nonzero()
        assert len(place) >= 100 * 100
        seen[w, s] = place.float().mean(0)
    for s in (0, 0.4):
        assert seen[0.25, s][1] < seen[0.5, s][1] < seen[1, s][1]
    assert all(seen[w, 0][0] < seen[w, 0.4][0] for w in (0.25, 0.5, 1))


def test_grey_pictures_of_one_channel(draw):
    grey = torch.tensor([0.25, 0.75]).view(2, 1, 1, 1).expand(2, 64, 64, 1)
    sheet = draw([*grey.split(1)], [0.5, 1.0], [0.0, 0.0])
    assert torch.equal(sheet, draw([*grey.expand(-1, -1, -1, 3).split(1)], [0.5, 1.0], [0.0, 0.0]))


@pytest.mark.parametrize(
    "count, weights, starts",
    [
        (3, [0.5, 1.0, 0.5, 1.0], [0.0, 0.0, 0.4, 0.4]),
        (4, [0.5, 1.0, 0.5, 1.0], [0.0, 0.4]),
        (4, [0.5, 0.5, 1.0, 1.0], [0.0, 0.0, 0.4, 0.4]),  # as many pairs, two of them twice
        (2, [0.5, 1.0], [0.0, 0.4]),
    ],
)
def test_pictures_that_fill_no_grid(draw, count, weights, starts):
    with pytest.raises(ValueError, match=f"{count} pictures do not fill a grid of 2 weights"):
        draw([torch.zeros(1, 8, 8, 3)] * count, weights, starts)


def test_pictures_of_different_sizes(draw):
    pictures = [torch.zeros(1, 8, 8, 3), torch.zeros(1, 8, 16, 3)]
    with pytest.raises(ValueError, match="of 8×8 and 16×8 pixels; expected all of one size"):
        draw(pictures, [0.5, 1.0], [0.0, 0.0])


@pytest.mark.parametrize("weight, start", [(1 / 3, 1 / 3), (-2 / 3, 1e-3), (1.0, 0.0)])
def test_words_have_room(draw, weight, start):
    """No ink at the left edge, and some of it between there and the picture."""
    sheet = draw([torch.zeros(1, 64, 64, 3)], [weight], [start])[0]
    ink = sheet.amin(-1) > 0.5
    assert not ink[:, :3].any()
    first = int(ink.any(0).nonzero()[0])
    assert first < 40


@pytest.mark.parametrize(
    "given, message",
    [
        (("1", "2"), "starts has 2; expected 0 … 1"),
        (("0.5, 1, 0.5", "0"), "weights has 0.5 more than once"),
        (("1", "0; 0.2; 0.2"), "starts has 0.2 more than once"),
        (("-5.5", "0"), "weights has -5.5"),
    ],
)
def test_values_that_cannot_be(values, given, message):
    with pytest.raises(ValueError, match=message):
        values(*given)
