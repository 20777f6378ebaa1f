"""A change of low rank in every weight: what it starts as, what trains, and what is kept of it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from miniature import low_rank


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8)])
        self.blocks.append(nn.Linear(8, 5))
        self.head = nn.Linear(5, 2)

    def forward(self, x):
        x = self.blocks[1](self.blocks[0](x)).mean((2, 3))
        return self.head(self.blocks[2](x))


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net().requires_grad_(False)


def test_it_begins_as_no_change_and_only_it_trains(net):
    given = torch.randn(4, 3, 6, 6)
    before = net(given)
    changes = low_rank.add(net, 2, ("blocks.",))
    assert set(changes) == {"blocks.0.weight", "blocks.2.weight"}
    assert torch.equal(net(given), before)
    trained = {name for name, p in net.named_parameters() if p.requires_grad}
    assert trained == {
        f"blocks.{n}.parametrizations.weight.0.{m}" for n in (0, 2) for m in ("up", "down")
    }


def test_what_is_kept_merges_into_what_was_trained(net):
    plain = {key: x.clone() for key, x in net.state_dict().items()}
    changes = low_rank.add(net, 2, ("blocks.",))
    for change in changes.values():
        nn.init.normal_(change.up, std=0.3)
    merged = low_rank.merged(plain, low_rank.factors(changes))
    assert merged.keys() == plain.keys()
    other = Net()
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
        low_rank.merged(state, {"nothing.up": up, "nothing.down": down})
    for half in ({"blocks.2.weight.up": up}, {"blocks.2.weight.down": down}):
        with pytest.raises(KeyError, match=r"blocks\.2\.weight"):
            low_rank.merged(state, half)
