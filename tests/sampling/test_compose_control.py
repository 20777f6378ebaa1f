"""ControlNets and T2I-Adapters on the same conditionings."""

from __future__ import annotations

import pytest
import torch

from tests.support.sets import nightly


def controlnet(small, **_):
    import comfy.cldm.cldm
    import comfy.controlnet

    layout = {k: v for k, v in small.CONFIGS["sd15"].items() if k != "out_channels"}
    layout["transformer_depth"] = layout["transformer_depth"][:]  # it takes them off the list
    net = comfy.cldm.cldm.ControlNet(**layout, hint_channels=3)
    small.fill(net.requires_grad_(False), seed=30)
    return comfy.controlnet.ControlNet(net, load_device=small.CPU)


def t2i_adapter(small):
    import comfy.controlnet
    from comfy.t2i_adapter.adapter import Adapter_light

    net = Adapter_light(channels=[32, 64, 128, 128], nums_rb=1, cin=3 * 64)
    small.fill(net.requires_grad_(False), seed=31)
    return comfy.controlnet.T2IAdapter(net, 3, 8, "nearest-exact", device=small.CPU)


CONTROLS = [controlnet, t2i_adapter]


def hinted(control, seed, window=(0.0, 1.0)):
    hint = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(seed))
    return control.copy().set_cond_hint(hint, 0.7, window)


@pytest.mark.parametrize("sides", ["both", "each its own", *nightly("positive")])
@pytest.mark.parametrize("kind", CONTROLS, ids=lambda c: c.__name__)
def test_control_and_images(small, truth, kind, sides):
    window = {"start_at": 0.5}
    model, adapter, images = small.model(), small.adapter(), small.images()
    net = kind(small)
    first, second = hinted(net, 1), hinted(net, 2, (0.0, 0.4))
    positive = small.text(1, control=first, control_apply_to_uncond=sides == "both")
    negative = small.text(2, **({"control": second} if sides == "each its own" else {}))
    texts = positive, negative
    rules = truth.sides(adapter, images, **window)
    expected = truth.apply(model, small.SD15_LAYERS, *zip(texts, rules, strict=True))
    patched = small.apply(model, adapter, images, **window)
    (patched, calls), (plain, plain_calls) = small.counted(patched), small.counted(model)
    before = small.run(small.guider(plain, *texts))
    uncontrolled = small.run(small.guider(model, small.text(1), small.text(2)))
    assert not torch.allclose(before, uncontrolled, atol=0.1), "the control does nothing"
    truth.check(
        small.run(small.guider(patched, *texts)),
        small.run(small.guider(expected, *texts)),
        before,
    )
    assert calls == plain_calls
    assert torch.equal(small.run(small.guider(model, *texts)), before)
