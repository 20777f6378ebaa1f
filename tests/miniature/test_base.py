"""How the base is trained: which texts it hears, and what weighs how much."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from miniature import base
from miniature.scenes import KINDS, PLACES, SHAPES, caption, outlines, scenes


def test_a_caption_names_what_it_is_given():
    assert caption(3) == "a star"
    assert caption(3, colour=0) == "a red star"
    assert caption(3, 0, 2, 2) == "a striped red star, sky background"
    assert caption(3, background=1) == "a star, night background"
    assert caption(3, 0, place=2) == "a red star, top right"


def test_texts_name_what_the_scene_shows_and_often_the_shape_alone():
    rows = scenes(5, 4000)
    kinds = torch.stack([getattr(rows, kind) for kind in (*KINDS, "place")], 1)
    texts = base.all_texts()
    heard = [texts[row] for row in base.naming(kinds, torch.Generator().manual_seed(0))]
    for text, *given, place in zip(heard, *kinds.T.tolist(), strict=True):
        where = text.rpartition(", ")[2]
        assert where not in PLACES or where == PLACES[place]
        for kind, named in zip(("shape", "colour", "texture", "background"), given, strict=True):
            only = {"shape": given[0], kind: named}
            said = set(caption(**only).replace(",", "").split()) - {"a", "background"}
            others = {
                word
                for number in range(KINDS[kind])
                for word in caption(**(only | {kind: number})).replace(",", "").split()
            } - said
            assert not (others - {"a", "background", SHAPES[given[0]]}) & set(
                text.replace(",", "").split()
            ), (text, kind)
    share = {text: heard.count(text) / 4000 for text in ("", *map(caption, range(len(SHAPES))))}
    assert share.pop("") == pytest.approx(base.DROP_TEXT, abs=0.02)
    told = 1 - base.DROP_TEXT
    assert sum(share.values()) > told * (1 - base.PLACED) * base.SHAPE_ALONE - 0.03
    assert sum("red" in text for text in heard) / 4000 == pytest.approx(
        told * (1 - base.SHAPE_ALONE) * base.NAMED / KINDS["colour"], abs=0.02
    )
    placed = [text for text in heard if text.rpartition(", ")[2] in PLACES]
    assert len(placed) / 4000 == pytest.approx(told * base.PLACED, abs=0.03)
    assert not any("background" in text for text in placed)


def test_a_place_is_the_ninth_of_the_picture_that_holds_the_centre():
    """Against the mass of what is drawn, for the shapes whose mass is at their centre."""
    rows = scenes(8, 400)
    rows = rows[(rows.shape != SHAPES.index("triangle")) & (rows.shape != SHAPES.index("star"))]
    covered = outlines(rows, 64)
    at = (torch.arange(64) + 0.5) / 32 - 1
    mass = covered.sum((1, 2))
    x, y = (covered * at).sum((1, 2)) / mass, (covered * at[:, None]).sum((1, 2)) / mass
    sure = ((x.abs() - 0.06).abs() > 0.01) & ((y.abs() - 0.06).abs() > 0.01)
    assert sure.double().mean() > 0.5
    for left, top, place in zip(x[sure], y[sure], rows.place[sure], strict=True):
        words = [
            ("top" if top < -0.06 else "bottom" if top > 0.06 else ""),
            ("left" if left < -0.06 else "right" if left > 0.06 else ""),
        ]
        assert PLACES[place] == (" ".join(filter(None, words)) or "centre")


def test_the_loss_is_weighted_by_the_noise_that_is_added():
    """Recomputed in float64, for a network that always finds 0.25."""
    seen = {}

    def predict(noisy, times, context):
        seen.update(noisy=noisy, times=times)
        return torch.full_like(noisy, 0.25)

    latents = torch.randn(64, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(2)
    loss = base.denoising_loss(predict, latents, torch.zeros(64, 1, 768), generator)

    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    signal = (1 - betas).cumprod(0)[seen["times"]][:, None, None, None]
    noise = (seen["noisy"] - signal.sqrt() * latents) / (1 - signal).sqrt()
    errors = (noise - 0.25).square().mean((1, 2, 3))
    expected = (errors * ((1 - signal) / signal).sqrt().flatten()).mean()  # 1/√SNR
    torch.testing.assert_close(loss.double(), expected, rtol=1e-3, atol=0)


def test_the_base_ends_as_the_average_of_its_weights(monkeypatch):
    """Against the formula, for a network of one weight that grows by one a step."""

    class Tiny(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(2))

        def forward(self, noisy, times, context):
            return SimpleNamespace(sample=noisy * self.weight[0])

    tiny, rates = Tiny(), []

    def fit(name, optimizer, loss_at, steps, rate, clipped):
        assert [*map(id, clipped)] == [id(tiny.weight)]
        for step in range(steps):
            rates.append(rate(step))
            loss_at(step)
            tiny.weight.data += 1

    monkeypatch.setattr(base, "fit", fit)
    pool = torch.randn(8, 4, 2, 2), torch.stack([torch.zeros(8, dtype=torch.long)] * 5, 1)
    context = torch.zeros(len(base.all_texts()), 1, 8)
    base.train(tiny, pool, context, 0, range(100, 103), 200)
    average = 0.0
    for count in (1, 2, 3):
        average += (count - average) * (1 - count / (count + 10))
    assert tiny.weight.tolist() == pytest.approx([average] * 2)
    half = 0.02 + 0.98 / 2  # the middle of the cosine, while the optimizer warms up
    assert rates[0] == pytest.approx(base.PEAK * half / base.WARMUP)
