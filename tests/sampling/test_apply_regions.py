"""Several images, each in its region, in one node, against the explicit truth."""

from __future__ import annotations

import pytest
import torch

from tests.support.sets import nightly

WHITE = torch.ones(1, 8, 8)


def masks(count: int) -> list[torch.Tensor]:
    """Soft ones that overlap, on the latent's own pixels, so that resizing them is no matter."""
    generator = torch.Generator().manual_seed(count)
    return [torch.rand(1, 8, 8, generator=generator) for _ in range(count)]


@pytest.fixture
def apply(small):
    def apply(
        prompts, given, overlap="normalize", family="tiny", model=None, adapter=None, **knobs
    ):
        """IPA_ApplyRegions, inputs as the host hands growing lists over: given as lists, or as
        dicts by the numbers of their sockets."""
        from comfyui_ip_adapter.nodes.apply import ApplyIPAdapterRegions

        prompts, given = (
            x if isinstance(x, dict) else dict(enumerate(x)) for x in (prompts, given)
        )
        return ApplyIPAdapterRegions.execute(
            model=model or small.model(family),
            adapter=adapter or small.adapter(family),
            # A request may hold them in any order.
            image_prompts={f"image_prompt{i}": p for i, p in reversed(prompts.items())},
            masks={f"mask{i}": mask for i, mask in given.items()},
            overlap=overlap,
            **small.knobs(**knobs),
        ).args[0]

    return apply


def shares(given, overlap, rest):
    """By hand."""
    total = sum(given)
    found = [m / total.clamp(min=1) for m in given] if overlap == "normalize" else given
    return [*found, (1 - total).clamp(min=0)] if rest else found


@pytest.mark.parametrize("family", ["sd15", *nightly("sdxl", "sdxl70")])
@pytest.mark.parametrize("overlap", ["normalize", "add"])
@pytest.mark.parametrize("rest", [False, True])
def test_each_image_acts_in_its_own_region(comparison, small, apply, family, overlap, rest):
    given, knobs = masks(2), {"weight": 0.8, "end_at": 0.5}
    prompts = [small.images(1 + i, seed=30 + i) for i in range(3 if rest else 2)]
    compared = comparison(family=family)
    for prompt, mask in zip(prompts, shares(given, overlap, rest), strict=True):
        compared.on_model(image_prompt=prompt, mask=mask, **knobs)
    compared.model = apply(prompts, given, overlap, family, **knobs)
    compared.check()


def test_a_mask_that_lets_nothing_act_is_told(small, apply, caplog):
    model, adapter, prompts = small.model("tiny"), small.adapter("tiny"), [small.images()] * 2
    black = torch.zeros(1, 8, 8)
    small.apply(model, adapter, prompts[0], mask=WHITE)
    apply(prompts, [WHITE])  # the rest, of which nothing is left, is no mistake
    small.apply(model, adapter, prompts[0], mask=black)
    apply(prompts, [WHITE, black])
    told = [r.getMessage() for r in caplog.records if r.name == "comfyui_ip_adapter"]
    assert [message.split()[0] for message in told] == ["mask", "mask1"]
    assert all("black everywhere" in message for message in told)


def test_the_adapter_is_loaded_once_for_all_regions(small, apply, monkeypatch):
    import comfy.model_management as memory

    adapter, loads = small.adapter("tiny"), []
    load = memory.load_models_gpu
    monkeypatch.setattr(memory, "load_models_gpu", lambda m, *a: (loads.append(m), load(m, *a)))
    apply([small.images()] * 3, masks(2), adapter=adapter)
    assert loads == [[adapter.patcher]]


def test_regions_share_one_curve(small, apply):
    """Given as points, too, which make a new curve each time."""
    from comfyui_ip_adapter.ip_adapter_core.comfyui.layers import KEY

    model = apply([small.images()] * 3, masks(2), weight_curve=[[0, 1], [1, 0]])
    assert len({side.schedule for pair in model.get_attachment(KEY) for side in pair}) == 1


def test_a_pair_of_sockets_that_nothing_comes_in_at(small, apply):
    pairs = [small.images(seed=i) for i in range(2)], masks(2)
    without, gap = (
        small.sample(apply(*(dict(zip(numbers, given, strict=True)) for given in pairs)))
        for numbers in ((0, 1), (0, 2))
    )
    assert torch.equal(without, gap)


def test_lambda_0_gives_the_model_back(small, apply):
    model = small.model("tiny")
    assert apply([small.images()], masks(1), model=model, weight=0.0) is model


@pytest.mark.parametrize(
    "prompts, given, message",
    [
        # A gap, as where the node behind a socket is muted.
        (
            (0, 1, 2),
            {0: WHITE, 2: WHITE},
            "3 image prompts do not go with 2 masks: nothing comes in at mask1",
        ),
        ((0, 2), {0: WHITE, 1: WHITE}, "nothing comes in at image_prompt1"),
        ((0, 1, 2), {1: WHITE}, "3 image prompts do not go with 1 masks: .* comes in at mask0"),
        ((0,), {}, "1 image prompts do not go with 0 masks: nothing comes in at masks"),
        ((0,), {0: WHITE, 1: WHITE}, "1 image prompts do not go with 2 masks"),
        ((0,), {0: torch.full((1, 4, 4), float("nan"))}, "mask contains NaN"),
        ((0,), {0: torch.ones(1, 0, 4)}, r"mask has shape \[1, 0, 4\]"),
    ],
)
def test_what_does_not_go_together(small, apply, prompts, given, message):
    with pytest.raises(ValueError, match=message):
        apply(dict.fromkeys(prompts, small.images()), given)
