"""Layer weights for the model at hand, their picture, and weights of latents."""

from __future__ import annotations

import itertools

import pytest
import torch


@pytest.fixture
def layer_weights(nodes, small, monkeypatch, tmp_path):
    import folder_paths

    monkeypatch.setattr(folder_paths, "temp_directory", str(tmp_path))
    node = nodes["IPA_LayerWeights"]
    return lambda family, *given: node.execute(small.model(family), *given)


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_a_preset_with_changes(layer_weights, small, family):
    changes = "middle: 0.3\ninput 4: 2"
    weights, _, listed = layer_weights(family, "composition", changes).args
    layout = {
        "sd15": {("input", 7): 0.25, ("input", 8): 1.0, ("input", 4): 2.0, ("middle", 0): 0.3},
        "sdxl": {("input", 8): 1.0, ("input", 4): 2.0, ("middle", 0): 0.3},
    }[family]
    assert weights == [layout.get(key[:2], 0.0) for key, _ in small.LAYERS[family]]
    assert "input 4: 2" in listed.splitlines() and "middle: 0.3" in listed.splitlines()


def test_the_picture_has_a_bar_a_layer_as_high_as_its_weight(layer_weights):
    """Found by colour alone: down the columns of the picture, runs of a bar's colour."""
    changes = "\n".join(["all: 0", "input 1: 1", "middle: 0.5", "output 11: 0.25"])
    made = layer_weights("sd15", "uniform", changes)
    assert len(made.ui.as_dict()["images"]) == 1
    profile = made.args[1]
    assert profile.shape == (1, 320, 768, 3) and profile.min() >= 0 and profile.max() <= 1
    saturated = profile[0].amax(-1) - profile[0].amin(-1) > 0.3
    heights = saturated.sum(0)
    edges = torch.nonzero(heights[1:] != heights[:-1])[:, 0].tolist()
    bars = [int(heights[a + 1]) for a, b in itertools.pairwise(edges) if b - a > 20]
    tall = [bar for bar in bars if bar > 5]
    assert len(tall) == 3
    assert [bar / tall[0] for bar in tall] == pytest.approx([1, 0.5, 0.25], abs=0.02)


def test_an_unknown_preset(layer_weights):
    with pytest.raises(ValueError, match="no preset 'stile'"):
        layer_weights("sd15", "stile", "")


def test_weights_per_latent_times_a_curve(nodes):
    node = nodes["IPA_LatentWeights"]
    assert node.execute("0: 0, 4: 1", 0).args[0] == [0, 0.25, 0.5, 0.75, 1]
    falling = {"points": [[0, 1], [1, 0]], "interpolation": "linear"}
    found = node.execute("0: 0, 4: 1", 0, falling).args[0]
    assert found == pytest.approx([0, 0.25 * 0.75, 0.25, 0.75 * 0.25, 0])
    assert node.execute("2", 1, falling).args[0] == [2.0]
    with pytest.raises(ValueError, match=r"^curve is 'up'; expected the output of a Curve Editor"):
        node.execute("2", 1, "up")
    with pytest.raises(ValueError, match=r"^curve has the points"):
        node.execute("2", 1, [[0, float("inf")]])
