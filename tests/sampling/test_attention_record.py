"""Which prompts, texts and evaluations a record of the attention counts."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import l1_loss

from tests.support.sets import nightly

ALL = [("all", None)]
HALVES = torch.zeros(2, 1, 64, 64)
HALVES[0, :, :, :32] = HALVES[1, :, :, 32:] = 1


@pytest.fixture
def recording(host):
    from comfyui_ip_adapter.ip_adapter_core.comfyui.record import recording

    return recording


@pytest.fixture
def recorded(small, recording):
    """Runs a guider, made of the recorded model and the conditionings, and gives the record of it.
    One step unless told: there, the model sees the same latents whatever the guidance is."""

    def recorded(model, made, *conditionings, at=(0.5,), **options):
        watched, kept = recording(model)
        return kept.of(small.run(made(watched, *conditionings), at=at, **options))

    return recorded


@pytest.fixture(params=["one call", "split for memory"])
def memory(request):
    if request.param == "split for memory":
        request.getfixturevalue("split_for_memory")


def same(found, expected):
    """Of the same evaluation in another batch."""
    return torch.allclose(found, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("settings", [{}, {"weight_curve": [[0, 1], [1, 0.5]]}], ids=len)
def test_prompts_one_after_the_other(small, recorded, settings):
    """Both stand in the first slot of the call, each in its own steps."""
    model, adapter = small.model(), small.adapter()
    first = small.apply(model, adapter, small.images(seed=1), end_at=0.4, **settings)
    both = small.apply(first, adapter, small.images(seed=2), start_at=0.6, **settings)
    found = recorded(both, small.guider, small.text(1), small.text(2), at=(0.1, 0.3, 0.5, 0.7, 0.9))
    early, late = found.heat(ALL, 0, 0.4, 0), found.heat(ALL, 0.6, 1, 0)
    assert torch.equal(found.heat(ALL, 0, 1, 1), early) and not same(early, late)
    assert torch.equal(found.heat(ALL, 0, 1, 2), late)
    assert same(found.heat(ALL, 0, 1, 0), (early + late) / 2)


def test_sides_of_different_numbers_of_images(small, recorded, memory):
    """12 tokens on one side, 8 on the other: two slots, of which the negative's comes first."""
    images = replace(small.images(3), negative=small.images(2, seed=5).positive)
    model = small.apply(small.model(), small.adapter(), images)
    found = recorded(model, small.guider, small.text(1), small.text(2))
    one = found.heat(ALL, 0, 1, 1)
    assert torch.equal(one, found.heat(ALL, 0, 1, 0)) and float(one.min()) > 1e-3
    with pytest.raises(ValueError, match="prompt_number is 2, but 1 were applied"):
        found.heat(ALL, 0, 1, 2)


def test_texts_with_an_image_each(small, recorded, memory):
    """The conditioning route: each prompt is averaged over its own text alone."""
    model, adapter, blocks = small.model(), small.adapter(), [("output", n) for n in (9, 10, 11)]
    positives = []
    for seed, mask in enumerate(HALVES, 1):
        given = small.text(seed), small.text(9), adapter, small.images(seed=seed)
        model, positive, negative = small.apply_conditioning(model, *given, mask=mask)
        positives += positive
    found = recorded(model, small.guider, [*positives, *small.text(3)], negative, size=16)
    left, right = (found.heat(blocks, 0, 1, number) for number in (1, 2))
    assert float(left[..., 9:].abs().max()) < 1e-6 < float(left[..., :7].min())
    assert float(right[..., :7].abs().max()) < 1e-6 < float(right[..., 9:].min())
    assert same(found.heat(blocks, 0, 1, 0), (left + right) / 2)  # text 3 has none to count


def test_texts_that_share_an_image(small, recorded, memory):
    """They count alike, in one UNet call or in two."""
    model = small.apply(small.model(), small.adapter(), small.images())
    texts, negative = (small.text(1), small.text(2)), small.text(3)
    alone = [recorded(model, small.guider, text, negative).heat(ALL, 0, 1, 1) for text in texts]
    both = recorded(model, small.guider, [*texts[0], *texts[1]], negative).heat(ALL, 0, 1, 1)
    assert same(both, sum(alone) / 2) and not same(*alone)


def perp_neg_node(model, positive, middle, negative):
    """Evaluates `middle` from a function of its own."""
    from comfy.samplers import CFGGuider
    from comfy_extras.nodes_perpneg import PerpNeg

    guider = CFGGuider(PerpNeg.execute(model, middle, 1.0).args[0])
    guider.set_conds(positive, negative)
    guider.set_cfg(3.0)
    return guider


@pytest.mark.parametrize(
    "name",
    [
        *("dual_cfg", "perp_neg", "perp_neg_node", "perturbed_attention", "self_attention"),
        *nightly("cfg_1", "dual_cfg_nested", "dual_cfg_1"),
    ],
)
def test_the_positive_side_of_every_guidance(small, recorded, guidances, memory, name):
    """As plain guidance of the texts that get the image, with nothing evaluated twice."""
    model = small.apply(small.model(), small.adapter(), small.images())
    first, second, negative = (small.text(seed) for seed in (1, 2, 3))
    followed = [*first, *second] if name.startswith("dual") else first
    size = 16 if name == "self_attention" else 8  # the host blurs by an attention of several places
    plain = recorded(model, guidances.cfg, followed, second, negative, size=size)
    made = perp_neg_node if name == "perp_neg_node" else getattr(guidances, name)
    found = recorded(model, made, first, second, negative, size=size)
    assert same(found.heat(ALL, 0, 1, 1), plain.heat(ALL, 0, 1, 1))


def test_a_guider_of_two_models(small, recorded):
    """The negative text is evaluated alone, by another model."""
    from comfy_extras.nodes_custom_sampler import Guider_DualModel

    def two_models(model, positive, negative):
        guider = Guider_DualModel(model, small.model(seed=7))
        guider.set_conds(positive, negative)
        guider.set_cfg(3.0)
        return guider

    model = small.apply(small.model(), small.adapter(), small.images())
    texts = small.text(1), small.text(2)
    found, plain = (recorded(model, made, *texts) for made in (two_models, small.guider))
    assert same(found.heat(ALL, 0, 1, 1), plain.heat(ALL, 0, 1, 1))


@pytest.mark.parametrize("name", ["cfg", "perturbed_attention"])
def test_steps_that_are_evaluated_twice(small, recorded, guidances, name):
    """Heun's sampler comes to a step from the one before, and goes on from it."""
    model, at = small.apply(small.model(), small.adapter(), small.images()), (0.2, 0.5, 0.8)
    texts = small.text(1), small.text(2), small.text(3)
    found = recorded(model, getattr(guidances, name), *texts, at=at, sampler="heun")
    counts = Counter(share.sigma for share in found.shares if share.block == ("middle", 0))
    assert [counts[sigma] for sigma in sorted(counts, reverse=True)] == [1, 2, 2]
    steps = [found.heat(ALL, x - 0.1, x + 0.1, 0) for x in at]
    assert same(found.heat(ALL, 0, 1, 0), sum(steps) / 3)
    assert float(l1_loss(steps[0], steps[2])) > 1e-4


def test_a_sampler_that_enlarges_the_latents(small, recorded):
    """Every step is recorded, at the size that the latents have there."""
    from comfy_extras.nodes_advanced_samplers import SamplerLCMUpscale

    (sampler,) = SamplerLCMUpscale.execute(2.0, -1, "bilinear").args
    model = small.apply(small.model(), small.adapter(), small.images())
    texts, at = (small.text(1), small.text(2)), (0.2, 0.5, 0.8)
    found = recorded(model, small.guider, *texts, at=at, sampler=sampler)
    sizes = sorted({share.maps.shape[-1] for share in found.shares if share.block[0] == "input"})
    assert len({share.sigma for share in found.shares}) == 3
    assert sizes[-1] == found.samples.shape[-1] == 16 and len(sizes) > 4
    assert found.heat(ALL, 0.8, 1, 0).shape == (2, 16, 16)


@pytest.fixture
def traced(host):
    """The node's steps with a backend that traces only."""
    from comfy_extras import nodes_torch_compile as node

    def traced(model):
        clone = model.clone()
        options = {"guard_filter_fn": node.skip_torch_compile_dict}
        node.set_torch_compile_wrapper(model=clone, backend="eager", options=options)
        return clone

    torch.compiler.reset()
    yield traced
    torch.compiler.reset()


def test_a_compiled_model(small, recorded, recording, traced):
    """Recorded as one that is not, between runs that are not recorded."""
    model = small.apply(small.model("tiny"), small.adapter("tiny"), small.images())
    texts, at = (small.text(1), small.text(2)), (0.2, 0.5, 0.8)
    plain = recorded(model, small.guider, *texts, at=at)
    compiled = traced(model)
    for _ in range(2):
        made = small.run(small.guider(compiled, *texts), at=at)
        assert torch.allclose(made, plain.samples, rtol=1e-4, atol=1e-4)
        found = recorded(compiled, small.guider, *texts, at=at)
        assert torch.equal(found.samples, plain.samples)
        assert [s.sigma for s in found.shares] == [s.sigma for s in plain.shares]
        assert torch.equal(found.heat(ALL, 0, 1, 0), plain.heat(ALL, 0, 1, 0))
    late = traced(recording(model)[0])
    assert torch.equal(small.run(small.guider(late, *texts), at=at), plain.samples)
