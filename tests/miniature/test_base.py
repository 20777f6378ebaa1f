"""How the base is trained: which texts it hears, and what weighs how much."""

from __future__ import annotations

import pytest
import torch

from miniature import base
from miniature.scenes import KINDS, PLACES, SHAPES, caption, outlines, scenes
from miniature.text import states


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


def test_states_of_many_texts_are_those_of_each(monkeypatch):
    captions = [caption(shape) for shape in range(3)]
    alone = torch.cat([states([one]) for one in captions])
    monkeypatch.setattr("miniature.text._AT_ONCE", 2)
    together = states(captions)
    assert together.shape == (3, 77, 768)
    assert float((together - alone).abs().max()) < 1e-4 * float(alone.abs().max())
    assert not torch.allclose(together[0], together[2])
    halved = states(captions, stored=torch.float16)
    assert halved.dtype == torch.float16 and torch.equal(halved, together.half())
