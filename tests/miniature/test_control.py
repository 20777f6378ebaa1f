"""Control and second base: what they begin as, what trains, and what is kept of a low rank."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from torch import nn

from miniature import base, control
from miniature.scenes import render, scenes


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
