"""Attention couples: packs that repeat a conditional chunk's rows for the texts of its regions."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import interpolate

SIZE = 8
LEFT = torch.zeros(1, 1, SIZE, SIZE)
LEFT[..., : SIZE // 2] = 1


def couple(model, regions, *, keep_list: bool):
    """A clone whose conditional texts are those of `regions`, pairs of states and mask.

    `keep_list`: give ComfyUI's list of chunks back as it was only after the layer, as krita's
    tooling nodes do; otherwise never touch it, as the others do.
    """
    masks = torch.cat([mask for _, mask in regions])
    masks = masks / masks.sum(0, keepdim=True)
    count = len(regions)

    def rows_of(chunks, batch):
        order = []
        for i, chunk in enumerate(chunks):
            order += [*range(i * batch, (i + 1) * batch)] * (1 if chunk == 1 else count)
        return order

    def widen(n, context, value, options):
        chunks = list(options["cond_or_uncond"])
        batch = len(n) // len(chunks)
        order = rows_of(chunks, batch)
        options["chunks"] = chunks
        texts = []
        for i, chunk in enumerate(chunks):
            own = [context[i * batch : (i + 1) * batch]]
            texts += own if chunk == 1 else [s.repeat(batch, 1, 1) for s, _ in regions]
        if keep_list:
            wide = [c for chunk in chunks for c in [chunk] * (1 if chunk == 1 else count)]
            options["cond_or_uncond"][:] = wide
        joined = torch.cat(texts)
        return n[order], joined, joined

    def join(out, options):
        chunks = options["chunks"]
        batch = len(out) // sum(1 if chunk == 1 else count for chunk in chunks)
        if keep_list:
            options["cond_or_uncond"][:] = chunks
        height, width = options["activations_shape"][-2:]
        level = interpolate(masks, (height, width), mode="nearest").flatten(2).movedim(1, 2)
        parts, start = [], 0
        for chunk in chunks:
            rows = batch * (1 if chunk == 1 else count)
            own = out[start : start + rows]
            if chunk != 1:
                own = (own.unflatten(0, (count, batch)) * level[:, None]).sum(0)
            parts.append(own)
            start += rows
        return torch.cat(parts)

    clone = model.clone()
    clone.set_model_attn2_patch(widen)
    clone.set_model_attn2_output_patch(join)
    return clone


@pytest.fixture
def regions(small):
    return [(small.text(5)[0][0], LEFT), (small.text(6)[0][0], 1 - LEFT)]


def settings(case: str) -> dict:
    mask = torch.rand(1, 20, 20, generator=torch.Generator().manual_seed(3))
    return {"per latent": {"combine": "per_latent"}, "mask": {"mask": mask}, "one": {}}[case]


@pytest.mark.parametrize("keep_list", [False, True])
@pytest.mark.parametrize("first", ["couple", "image"])
@pytest.mark.parametrize("case", ["one", "per latent", "mask"])
@pytest.mark.parametrize("cfg", [3.0, 1.0])
def test_images_stand_beside_the_rows_of_every_region(
    small, truth, regions, case, first, cfg, keep_list
):
    texts = small.text(1), small.text(2)
    prompt = small.images(2 if case == "per latent" else 1)
    given, plain = settings(case), small.model()
    coupled = couple(plain, regions, keep_list=keep_list)
    if first == "couple":
        model = small.apply(coupled, small.adapter(), prompt, **given)
    else:
        applied = small.apply(plain, small.adapter(), prompt, **given)
        model = couple(applied, regions, keep_list=keep_list)
    sides = truth.sides(small.adapter(), prompt, **given)
    expected = truth.apply(coupled, small.LAYERS["sd15"], *zip(texts, sides, strict=True))
    latents = [small.run(small.guider(m, *texts, cfg=cfg)) for m in (model, expected, coupled)]
    truth.check(*latents, tolerance=1e-5)


def test_regions_of_one_text_are_no_couple(small, truth):
    texts = small.text(1), small.text(2)
    one = texts[0][0][0]
    model, positive, negative = small.apply_conditioning(
        small.model(), *texts, small.adapter(), small.images(2), combine="per_latent"
    )
    coupled = couple(model, [(one, LEFT), (one, 1 - LEFT)], keep_list=True)
    latents = [small.run(small.guider(m, positive, negative)) for m in (coupled, model)]
    truth.check(*latents, small.run(small.guider(small.model(), *texts)), tolerance=1e-5)


def test_rows_that_are_not_only_repeated_are_refused(small):
    """Eight rows of four would be a couple of three regions, if the rows were those of one text."""
    texts = small.text(1), small.text(2)

    def double(n, context, value, options):
        return tuple(x.repeat(2, 1, 1) for x in (n, context, value))

    def half(out, options):
        return out.chunk(2)[0]

    model = small.apply(small.model(), small.adapter(), small.images())
    model.set_model_attn2_patch(double)
    model.set_model_attn2_output_patch(half)
    with pytest.raises(RuntimeError, match=r"runs on 8 rows at once where .* beside 4"):
        small.run(small.guider(model, *texts))


def test_a_picture_in_a_regions_own_text_is_told(small, caplog):
    texts = small.text(1), small.text(2)
    given = small.adapter(), small.images()
    model, positive, negative = small.apply_conditioning(small.model(), *texts, *given)
    _, region, _ = small.apply_conditioning(small.model(), small.text(5), texts[1], *given)
    regions = [(region[0][0], LEFT), (small.text(6)[0][0], 1 - LEFT)]
    small.run(small.guider(couple(model, regions, keep_list=False), positive, negative))
    assert caplog.text.count("used without the prompt") == 1
