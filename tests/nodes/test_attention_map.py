"""The heat map over the finished picture."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch


@pytest.fixture
def attention_map(nodes, monkeypatch, tmp_path):
    import folder_paths

    monkeypatch.setattr(folder_paths, "temp_directory", str(tmp_path))

    def attention_map(maps, picture, opacity=0.6):
        record = SimpleNamespace(heat=lambda *asked: maps)
        given = (record, picture, "all", 0.0, 1.0, 0, opacity)
        return nodes["IPA_AttentionMap"].execute(*given)

    return attention_map


def test_it_lies_over_the_picture(attention_map):
    """The left half of the latent is where the image acted: brighter colours there, more of them
    with more opacity, and the map itself at the picture's size."""
    maps = torch.zeros(1, 8, 8)
    maps[:, :, :4] = 0.4
    picture = torch.rand(1, 64, 96, 3, generator=torch.Generator().manual_seed(0))
    overlay, heat = attention_map(maps, picture).args
    assert overlay.shape == (1, 64, 96, 3) and heat.shape == (1, 64, 96)
    assert torch.allclose(heat[:, :, :30], torch.tensor(0.4), atol=0.02)
    assert float(heat[:, :, 60:].max()) < 0.02
    assert float(overlay[:, :, :36].mean()) > float(overlay[:, :, 60:].mean()) + 0.3
    assert torch.equal(attention_map(maps, picture, 0.0).args[0], picture)
    alone = attention_map(maps, picture, 1.0).args[0]
    assert float(alone[:, :, :30].std(dim=(0, 1, 2)).max()) < 0.02


def test_a_preview_is_shown(attention_map):
    shown = attention_map(torch.rand(2, 8, 8), torch.rand(2, 16, 16, 4)).ui.as_dict()
    assert len(shown["images"]) == 2


def test_pictures_of_another_run(attention_map):
    with pytest.raises(ValueError, match="image holds 3 pictures, but 2 latents"):
        attention_map(torch.rand(2, 8, 8), torch.rand(3, 16, 16, 3))


def test_the_record_node_gives_a_model_and_what_watches_it(nodes, small):
    patched = small.apply(small.model(), small.adapter(), small.images())
    recorded, record = nodes["IPA_RecordAttention"].execute(patched).args
    small.run(small.guider(recorded, small.text(1), small.text(2)))
    assert record.heat(None, 0.0, 1.0, 0).shape == (2, 8, 8)
    assert recorded is not patched
