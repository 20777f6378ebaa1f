"""The network that reads the edges begins as one that lets them through, and adds nothing yet."""

from __future__ import annotations

import torch

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
