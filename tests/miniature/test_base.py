"""How bases and control are trained: texts, what weighs how much, and what a low rank keeps."""

from __future__ import annotations

from collections import OrderedDict
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from miniature import base, control
from miniature.scenes import KINDS, PLACES, SHAPES, caption, outlines, render, scenes


def test_a_caption_names_what_it_is_given():
    assert caption(3) == "a star"
    assert caption(3, colour=0) == "a red star"
    assert caption(3, 0, 2, 2) == "a striped red star, sky background"
    assert caption(3, background=1) == "a star, night background"
    assert caption(3, 0, place=2) == "a red star, top right"


def words(*texts):
    return {word for text in texts for word in text.replace(",", "").split()} - {"a", "background"}


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
            all_of_kind = (caption(**(only | {kind: number})) for number in range(KINDS[kind]))
            others = words(*all_of_kind) - words(caption(**only)) - {SHAPES[given[0]]}
            assert not others & words(text), (text, kind)
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

    class Tiny(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(2))

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


def test_edges_come_through_a_new_network_and_nothing_is_added():
    torch.manual_seed(0)
    made = control.Control()
    rows = scenes(5, 8)
    hints = made.input_hint_block(control.edges(render(rows))).detach()
    none = made.input_hint_block(torch.zeros(1, 3, 64, 64)).detach()
    assert hints.shape == (8, 320, 8, 8)
    assert 0.1 < float((hints - none).std()) < 10
    given = torch.randn(8, 4, 8, 8), torch.full((8,), 500)
    added = made(base.new(0), *given, control.edges(render(rows)))
    assert [x.shape for x in added] == [(8, 320, 8, 8)] * 2
    assert not any(x.any() for x in added)


def new_net():
    layers = [nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    blocks = nn.Sequential(*layers, nn.Linear(8, 5))
    return nn.Sequential(OrderedDict(blocks=blocks, head=nn.Linear(5, 2))).requires_grad_(False)


@pytest.fixture
def net():
    torch.manual_seed(0)
    return new_net()


def test_a_low_rank_begins_as_no_change_and_only_it_trains(net):
    given = torch.randn(4, 3, 6, 6)
    before = net(given)
    changes = control.add_low_rank(net, 2, ("blocks.",))
    assert set(changes) == {"blocks.0.weight", "blocks.4.weight"}
    assert torch.equal(net(given), before)
    trained = {name for name, p in net.named_parameters() if p.requires_grad}
    assert trained == {
        f"blocks.{n}.parametrizations.weight.0.{m}" for n in (0, 4) for m in ("up", "down")
    }


def test_what_is_kept_merges_into_what_was_trained(net):
    plain = {key: x.clone() for key, x in net.state_dict().items()}
    changes = control.add_low_rank(net, 2, ("blocks.",))
    for change in changes.values():
        nn.init.normal_(change.up, std=0.3)
    merged = control.merged(plain, control.factors(changes))
    assert merged.keys() == plain.keys()
    other = new_net()
    other.load_state_dict(merged)
    given = torch.randn(4, 3, 6, 6)
    torch.testing.assert_close(other(given), net(given))
    for key, x in merged.items():
        assert torch.equal(x, plain[key]) != (key in changes), key
    change = (merged["blocks.0.weight"] - plain["blocks.0.weight"]).flatten(1)
    assert torch.linalg.matrix_rank(change, rtol=1e-4) == 2


def test_halves_and_strangers_are_refused(net):
    state = net.state_dict()
    up, down = torch.ones(5, 1), torch.ones(1, 8)
    with pytest.raises(KeyError, match="nothing"):
        control.merged(state, {"nothing.up": up, "nothing.down": down})
    for half in ({"blocks.4.weight.up": up}, {"blocks.4.weight.down": down}):
        with pytest.raises(KeyError, match=r"blocks\.4\.weight"):
            control.merged(state, half)
