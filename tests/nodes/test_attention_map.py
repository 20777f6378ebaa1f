"""The heat map over the finished picture."""

from __future__ import annotations

import pytest
import torch
from comfyui_ip_adapter.ip_adapter_core.attention_map import RecordedRun, Share

ASKED = {"blocks": "all", "start_at": 0.0, "end_at": 1.0, "prompt_number": 0, "opacity": 0.6}


@pytest.fixture
def attention_map(nodes, monkeypatch, tmp_path):
    """The node, on a record of one run: at every (sigma, block) of `seen` one map for each prompt,
    `(latents, prompts, height, width)`. Sigma is 10 at the start of the schedule, 0 at its end."""
    import folder_paths
    from comfyui_ip_adapter.ip_adapter_core.comfyui.record import AttentionRecorder

    monkeypatch.setattr(folder_paths, "temp_directory", str(tmp_path))

    def attention_map(seen, picture, **asked):
        maps = next(iter(seen.values()))
        count, prompts, *size = maps.shape
        made = torch.rand(count, 4, *size)
        numbers = (tuple(range(1, prompts + 1)),)
        shares = [
            Share(sigma, block, tuple(range(count)), numbers, maps[None])
            for (sigma, block), maps in seen.items()
        ]
        record = AttentionRecorder()
        record.runs.append(RecordedRun(made, prompts, lambda at: 10 * (1 - at), shares))
        given = {"record": record, "samples": {"samples": made}, "image": picture}
        return nodes["IPA_AttentionMap"].execute(**given, **{**ASKED, **asked})

    return attention_map


def once(maps):
    """Of one prompt in one block at one step."""
    return {(5.0, ("middle", 0)): maps[:, None]}


def test_it_lies_over_the_picture(attention_map):
    """The left half of the latent is where the image acted: brighter colours there, more of them
    with more opacity, and the map itself at the picture's size."""
    maps = torch.zeros(1, 8, 12)
    maps[:, :, :6] = 0.4
    picture = torch.rand(1, 64, 96, 3, generator=torch.Generator().manual_seed(0))
    made = attention_map(once(maps), picture)
    assert len(made.ui.as_dict()["images"]) == 1
    overlay, heat = made.args
    assert overlay.shape == (1, 64, 96, 3) and heat.shape == (1, 64, 96)
    assert torch.allclose(heat[:, :, :30], torch.tensor(0.4), atol=0.02)
    assert float(heat[:, :, 60:].max()) < 0.02
    assert float(overlay[:, :, :36].mean()) > float(overlay[:, :, 60:].mean()) + 0.3
    assert torch.equal(attention_map(once(maps), picture, opacity=0.0).args[0], picture)
    alone = attention_map(once(maps), picture, opacity=1.0).args[0]
    assert float(alone[:, :, :30].std(dim=(0, 1, 2)).max()) < 0.02


@pytest.mark.parametrize(
    "asked, value",
    [
        ({}, 0.55),
        ({"prompt_number": 1}, 0.25),
        ({"prompt_number": 2}, 0.3),
        ({"start_at": 0.2}, 0.7),
        ({"end_at": 0.2}, 0.4),
        ({"blocks": "input 1", "prompt_number": 1}, 0.1),
    ],
)
def test_each_setting_chooses(attention_map, asked, value):
    """Prompts 0.1 and 0.3 in an early step's block, 0.4 and 0.3 in a late one's."""
    early, late = (
        torch.tensor(x)[None, :, None, None].expand(1, 2, 4, 4) for x in ([0.1, 0.3], [0.4, 0.3])
    )
    seen = {(9.0, ("input", 1)): early, (5.0, ("middle", 0)): late}
    heat = attention_map(seen, torch.rand(1, 32, 32, 3), **asked).args[1]
    assert torch.allclose(heat, torch.tensor(value))


@pytest.mark.parametrize(
    "picture, message",
    [
        ((3, 16, 16, 3), "image holds 3 pictures, but samples 2 latents"),
        ((2, 16, 24, 3), "image is 24×16 pixels"),
    ],
)
def test_pictures_that_do_not_fit(attention_map, picture, message):
    with pytest.raises(ValueError, match=message):
        attention_map(once(torch.rand(2, 8, 8)), torch.rand(picture))
