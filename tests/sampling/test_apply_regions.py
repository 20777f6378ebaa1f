"""Several images, each in its region, in one node, against the explicit truth."""

from __future__ import annotations

import pytest
import torch

from tests.support.sets import nightly


def masks(count: int) -> list[torch.Tensor]:
    """Soft ones that overlap, on the latent's own pixels, so that resizing them is no matter."""
    generator = torch.Generator().manual_seed(count)
    return [torch.rand(1, 8, 8, generator=generator) for _ in range(count)]


def apply(model, adapter, prompts, given, overlap="normalize", **settings):
    """IPA_ApplyRegions, inputs as the host hands growing lists over: given as lists, or as dicts
    by the numbers of their sockets."""
    from comfyui_ip_adapter.nodes.apply import ApplyIPAdapterRegions

    knobs = {"weight": 1.0, "start_at": 0.0, "end_at": 1.0, "combine": "concat", **settings}
    prompts, given = (x if isinstance(x, dict) else dict(enumerate(x)) for x in (prompts, given))
    return ApplyIPAdapterRegions.execute(
        model=model,
        adapter=adapter,
        # A request may hold them in any order.
        image_prompts={f"image_prompt{i}": p for i, p in reversed(prompts.items())},
        masks={f"mask{i}": mask for i, mask in given.items()},
        overlap=overlap,
        **knobs,
    ).args[0]


def shares(given, overlap, rest):
    """By hand."""
    total = sum(given)
    found = [m / total.clamp(min=1) for m in given] if overlap == "normalize" else given
    return [*found, (1 - total).clamp(min=0)] if rest else found


@pytest.mark.parametrize("family", ["sd15", *nightly("sdxl", "sdxl70")])
@pytest.mark.parametrize("overlap", ["normalize", "add"])
@pytest.mark.parametrize("rest", [False, True])
def test_each_image_acts_in_its_own_region(small, truth, family, overlap, rest):
    model, adapter = small.model(family), small.adapter(family)
    given = masks(2)
    prompts = [small.images(1 + i, seed=30 + i) for i in range(3 if rest else 2)]
    texts = small.text(1), small.text(2)
    knobs = {"weight": 0.8, "end_at": 0.5}
    sides = [], []
    for prompt, mask in zip(prompts, shares(given, overlap, rest), strict=True):
        both = truth.sides(adapter, prompt, mask=mask, **knobs)
        for side, images in zip(sides, both, strict=True):
            side += images
    expected = truth.apply(model, small.LAYERS[family], *zip(texts, sides, strict=True))
    patched = apply(model, adapter, prompts, given, overlap, **knobs)
    truth.check(*(small.run(small.guider(m, *texts)) for m in (patched, expected, model)))


def test_it_is_several_apply_nodes_in_a_row(small):
    model, adapter, given = small.model(), small.adapter(), masks(2)
    prompts = [small.images(seed=i) for i in (1, 2)]
    texts = small.text(1), small.text(2)
    row = model
    for prompt, mask in zip(prompts, given, strict=True):
        row = small.apply(row, adapter, prompt, mask=mask)
    one = apply(model, adapter, prompts, given, "add")
    assert torch.equal(*(small.run(small.guider(m, *texts)) for m in (one, row)))


def test_a_mask_that_lets_nothing_act_is_told(small, caplog):
    model, adapter, prompts = small.model("tiny"), small.adapter("tiny"), [small.images()] * 2
    black, white = torch.zeros(1, 8, 8), torch.ones(1, 8, 8)
    small.apply(model, adapter, prompts[0], mask=white)
    apply(model, adapter, prompts, [white])  # the rest, of which nothing is left, is no mistake
    small.apply(model, adapter, prompts[0], mask=black)
    apply(model, adapter, prompts, [white, black])
    told = [r.getMessage() for r in caplog.records if r.name == "comfyui_ip_adapter"]
    assert [message.split()[0] for message in told] == ["mask", "mask1"]
    assert all("black everywhere" in message for message in told)


def test_the_adapter_is_loaded_once_for_all_regions(small, monkeypatch):
    import comfy.model_management as memory

    adapter, loads = small.adapter("tiny"), []
    load = memory.load_models_gpu
    monkeypatch.setattr(memory, "load_models_gpu", lambda m, *a: (loads.append(m), load(m, *a)))
    apply(small.model("tiny"), adapter, [small.images()] * 3, masks(2))
    assert loads == [[adapter.patcher]]


def test_regions_share_one_curve(small):
    """Given as points, too, which make a new curve each time."""
    from comfyui_ip_adapter.ip_adapter_core.comfyui.layers import KEY

    model = apply(
        small.model("tiny"),
        small.adapter("tiny"),
        [small.images()] * 3,
        masks(2),
        weight_curve=[[0, 1], [1, 0]],
    )
    assert len({side.schedule for pair in model.get_attachment(KEY) for side in pair}) == 1


def test_a_pair_of_sockets_that_nothing_comes_in_at(small):
    given, prompts = masks(2), [small.images(seed=i) for i in range(2)]
    results = []
    for numbers in ((0, 2), (0, 1)):
        model = apply(
            *(small.model("tiny"), small.adapter("tiny")),
            dict(zip(numbers, prompts, strict=True)),
            dict(zip(numbers, given, strict=True)),
        )
        results.append(small.run(small.guider(model, small.text(1), small.text(2))))
    assert torch.equal(*results)


@pytest.mark.parametrize(
    "prompts, given, message",
    [
        ((0, 1, 2), (0, 2), "3 image prompts do not go with 2 masks: nothing comes in at mask1"),
        ((0, 2), (0, 1), "nothing comes in at image_prompt1"),
        ((0, 1, 2), (1,), "nothing comes in at mask0"),
        ((0,), (), "1 image prompts do not go with 0 masks: nothing comes in at masks"),
    ],
    ids=str,
)
def test_a_gap_among_the_sockets(small, prompts, given, message):
    """As where the node behind a socket is muted."""
    prompts = dict.fromkeys(prompts, small.images())
    given = dict(zip(given, masks(3), strict=False))
    with pytest.raises(ValueError, match=message):
        apply(small.model("tiny"), small.adapter("tiny"), prompts, given)


def test_lambda_0_gives_the_model_back(small):
    model = small.model()
    assert apply(model, small.adapter(), [small.images()], masks(1), weight=0.0) is model


@pytest.mark.parametrize(
    "prompts, given, message",
    [
        (2, [], "2 image prompts do not go with 0 masks"),
        (1, masks(2), "1 image prompts do not go with 2 masks"),
        (3, masks(1), "3 image prompts do not go with 1 masks"),
        (1, [torch.full((1, 4, 4), float("nan"))], "mask contains NaN"),
        (1, [torch.ones(1, 0, 4)], r"mask has shape \[1, 0, 4\]"),
        (2, [torch.ones(2, 4, 4), torch.ones(3, 4, 4)], "2 masks and another 3"),
    ],
    ids=str,
)
def test_what_does_not_go_together(small, prompts, given, message):
    with pytest.raises(ValueError, match=message):
        apply(small.model(), small.adapter(), [small.images()] * prompts, given)
