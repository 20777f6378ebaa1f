"""Equal captions of a batch go through the text encoders once, and come out where they were."""

from __future__ import annotations

import pytest
import torch

from ip_adapter_core.variants import FAMILIES
from tests.support import small_models as small
from training.models.base import load_base
from training.models.frozen import Tokenise, text_states


@pytest.mark.parametrize("family", FAMILIES)
def test_as_one_by_one_with_less_work(family, tmp_path):
    small.base(tmp_path / "base", family, levels=2)
    base = load_base(str(tmp_path / "base"))
    tokenise = Tokenise(base.text)
    captions = ["a b", "c", "a b", "", "c", "a b"]
    tokens = [torch.stack(ids) for ids in zip(*map(tokenise, captions), strict=True)]
    rows = []
    hooks = [
        encoder.register_forward_pre_hook(lambda _, given: rows.append(len(given[0])))
        for _, encoder in base.text
    ]
    states, pooled = text_states(base.text, tokens)
    for hook in hooks:
        hook.remove()
    assert rows == [3] * len(base.text)
    for i in range(len(captions)):
        alone, alone_pooled = text_states(base.text, [ids[i : i + 1] for ids in tokens])
        assert torch.allclose(states[i], alone[0], atol=1e-5)
        assert (pooled is None) == (alone_pooled is None) == (family == "sd15")
        if pooled is not None:
            assert torch.allclose(pooled[i], alone_pooled[0], atol=1e-5)
