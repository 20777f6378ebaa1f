"""Where image prompts act: their shares in each layer, against explicit attention in float64, and
which prompts, texts and evaluations a record of them counts."""

from __future__ import annotations

import gc
from collections import Counter
from dataclasses import replace

import pytest
import torch
from comfyui_ip_adapter.ip_adapter_core.attention_map import KEPT, blocks_of
from torch.nn.functional import interpolate, l1_loss, linear

from tests.support.sets import nightly

AT = (0.2, 0.5, 0.8)
ALL = [("all", None)]
WHOLE = ALL, 0, 1, 0  # all blocks, steps and prompts
FIRST, SECOND = (ALL, 0, 1, 1), (ALL, 0, 1, 2)
HALVES = torch.zeros(2, 1, 64, 64)
HALVES[0, :, :, :32] = HALVES[1, :, :, 32:] = 1


@pytest.fixture
def record(host):
    from comfyui_ip_adapter.ip_adapter_core.comfyui import record

    return record


@pytest.fixture
def recorded(small, record):
    """Samples with a recorded model, and gives the record of that run. One step unless told:
    there, the model sees the same latents whatever the guidance is."""

    def recorded(model, *texts, guider=small.guider, at=(0.5,), **options):
        watched, kept = record.recording(model)
        made = guider(watched, *(texts or (small.text(1), small.text(2))))
        return kept.of(small.run(made, at=at, **options))

    return recorded


@pytest.fixture
def patched(small):
    return small.apply(small.model("tiny"), small.adapter("tiny"), small.images())


def same(found, expected):
    """Of the same evaluation in another batch."""
    return torch.allclose(found, expected, rtol=1e-3, atol=1e-5)


@pytest.fixture
def queries(small):
    """A clone of a model, and the queries and the text's part of every layer and positive row that
    it is run with, by (sigma, layer)."""

    def queries(model, layers):
        from comfy.ldm.modules.attention import optimized_attention

        clone, seen = model.clone(), {}

        def patch(key):
            def look(q, k, v, options):
                heads = options["n_heads"]
                text = optimized_attention(q, k, v, heads, transformer_options=options)
                kinds = options["cond_or_uncond"]
                parts = zip(q.chunk(len(kinds)), text.chunk(len(kinds)), kinds, strict=True)
                sigma = float(options["sigmas"][0])
                for query, out, kind in parts:
                    if kind == 0:
                        shape = options["activations_shape"][-2:]
                        seen.setdefault((sigma, key), []).append((query, out, heads, shape))
                return text

            return look

        for key, _ in layers:
            clone.set_model_attn2_replace(patch(key), *key)
        return clone, seen

    return queries


def attended(module, number, tokens, query, heads):
    """Attn(Q, K', V') of one row, float64."""
    layer = module.ip_adapter[str(2 * number + 1)]
    key, value = (linear(tokens, w.weight.double()) for w in (layer.to_k_ip, layer.to_v_ip))
    parts = (x.double().chunk(heads, -1) for x in (query, key, value))
    return torch.cat(
        [(q @ k.T / q.shape[-1] ** 0.5).softmax(-1) @ v for q, k, v in zip(*parts, strict=True)], -1
    )


def expected(layers, seen, adapter, prompts, weights, masks, sigmas, blocks, which):
    """The mean share by hand: over layers of a block, then over blocks and steps."""
    total, count = 0.0, 0
    for sigma in {sigma for sigma, _ in seen} & sigmas:
        for block in blocks:
            own = [key for key in layers if key[:2] == block]
            maps = 0.0
            for key in own:
                number = layers.index(key)
                for query, text, heads, shape in seen[sigma, key]:
                    shares = []
                    for q, t in zip(query, text, strict=True):
                        norms = []
                        for prompt, weight, mask in zip(prompts, weights, masks, strict=True):
                            tokens = adapter.module.tokens(prompt.positive.image_embeds)
                            out = attended(adapter.module, number, tokens.double()[0], q, heads)
                            if mask is not None:
                                level = interpolate(mask[None].double(), shape, mode="bicubic")
                                out = out * level.reshape(-1, 1)
                            norms.append((weight * out).norm(dim=-1))
                        whole = t.double().norm(dim=-1) + sum(norms)
                        chosen = norms if which == 0 else [norms[which - 1]]
                        shares.append((sum(chosen) / whole).reshape(1, *shape))
                    maps = maps + torch.stack(shares) / len(own)
            total = total + interpolate(maps, (8, 8), mode="bilinear")[:, 0]
            count += 1
    return total / count


@pytest.mark.parametrize("family", ["sd15", *nightly("sdxl", "sdxl70")])
@pytest.mark.parametrize(
    "blocks, start, end, which",
    [("all", 0.0, 1.0, 0), ("input, output 5", 0.0, 1.0, 2), ("middle", 0.4, 0.9, 1)],
)
def test_the_share_of_the_images(small, recorded, queries, family, blocks, start, end, which):
    """Two prompts, one with a mask: the queries of a run with them, everything else by hand."""
    model, adapter = small.model(family), small.adapter(family)
    prompts = [small.images(seed=1), small.images(seed=2)]
    mask = torch.rand(1, 8, 8, generator=torch.Generator().manual_seed(3))
    watched, seen = queries(model, small.LAYERS[family])
    patched = small.apply(watched, adapter, prompts[0], weight=0.7)
    patched = small.apply(patched, adapter, prompts[1], weight=1.3, mask=mask)
    found = recorded(patched, at=AT).heat(blocks_of(blocks), start, end, which)
    layers = [key for key, _ in small.LAYERS[family]]
    of_layers = dict.fromkeys(key[:2] for key in layers)
    asked = {
        "all": of_layers,
        "middle": [("middle", 0)],
        "input, output 5": [b for b in of_layers if b[0] == "input" or b == ("output", 5)],
    }[blocks]
    at = [model.model.model_sampling.percent_to_sigma(x) for x in AT if start <= x <= end]
    wanted = expected(
        *(layers, seen, adapter, prompts, [0.7, 1.3], [None, mask]),
        *({float(torch.tensor(x)) for x in at}, asked, which),
    )
    assert found.shape == (2, 8, 8) and float(wanted.std()) > 1e-3
    assert torch.allclose(found.double(), wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "settings",
    [{"mask": torch.rand(1, 9, 9)}, {"end_at": 0.5}, {"weight_curve": [[0, 1], [0.5, 0], [1, 1]]}],
    ids=["mask", "window", "curve"],
)
def test_the_run_stays_the_same(small, recorded, settings):
    """Its latents to the bit, and its UNet calls."""
    model, calls = small.counted(small.model("tiny"))
    patched = small.apply(model, small.adapter("tiny"), small.images(), **settings)
    found = recorded(patched, at=AT)
    assert torch.equal(found.samples, small.sample(patched, at=AT)) and found.shares
    assert calls == [4] * (2 * len(AT))


def test_in_half_precision(small, recorded):
    """The same latents to the bit, and about the same map."""
    maps = []
    for dtype in (torch.float32, torch.bfloat16):
        given = small.model("tiny", dtype=dtype), small.adapter("tiny"), small.images()
        patched = small.apply(*given)
        found = recorded(patched)
        maps.append(found.heat(*WHOLE))
        assert torch.equal(found.samples, small.sample(patched, at=(0.5,)))
    assert maps[1].dtype == torch.float32
    assert float((maps[1] - maps[0]).abs().mean()) < 0.1 * float(maps[0].mean())


@pytest.mark.parametrize("anchor", [False, True])
def test_frames_of_context_windows_find_their_places(small, recorded, windowed, anchor):
    """Each frame's weight is its number, so its share must rise from frame to frame. The anchor
    that the host puts before a window, and discards, does not count."""
    given = small.model("tiny"), small.adapter("tiny"), small.images()
    patched = small.apply(*given, latent_weights=[0.1 * frame for frame in range(7)])

    def guider(model, *texts):
        return small.guider(windowed(model, fix=anchor), *texts)

    noise = torch.randn(1, 4, 8, 8).expand(7, -1, -1, -1)
    found = recorded(patched, guider=guider, noise=noise.clone())
    shares = found.heat(*WHOLE).mean((1, 2))
    assert len(shares) == 7 and float(shares[0]) == 0
    assert (shares.diff() > 0).all()
    assert {(len(share.frames), share.maps.shape[1]) for share in found.shares} == {(4, 4)}


def test_each_runs_latents_find_its_map(small, record, patched):
    """Of the last runs, whatever ran after them."""
    model, kept = record.recording(patched)
    latents, maps = [], []
    for seed in range(KEPT + 1):
        latents.append(small.sample(model, at=(0.5,), seed=seed))
        maps.append(kept.runs[-1].heat(*WHOLE))
    for made, own in zip(latents[1:], maps[1:], strict=True):
        assert torch.equal(kept.of(made).heat(*WHOLE), own)
    assert not any(torch.allclose(own, maps[-1], rtol=1e-3) for own in maps[:-1])
    with pytest.raises(ValueError, match=f"of none of the {KEPT} sampling runs"):
        kept.of(latents[0])


def test_large_maps_make_room(small, record, patched, monkeypatch):
    model, kept = record.recording(patched)
    small.sample(model, at=(0.5,))
    for limit, left in ((2.5, 2), (1.5, 1), (0.5, 1)):
        monkeypatch.setattr(record, "LIMIT", limit * kept.runs[-1].nbytes)
        for seed in range(3):
            made = small.sample(model, at=(0.5,), seed=seed)
        assert len(kept.runs) == left and kept.of(made) is kept.runs[-1]


def test_an_interrupted_run_leaves_nothing(small, record, patched):
    model, kept = record.recording(patched)

    def stop(*args):
        raise InterruptedError

    with pytest.raises(InterruptedError):
        small.sample(model, at=AT, callback=stop)
    assert not kept.runs
    found = kept.of(small.sample(model, at=AT))
    assert found.heat(*WHOLE).shape == (2, 8, 8)
    assert len(found.shares) == len(AT) * len(small.TINY_LAYERS)


def test_no_keys_and_values_stay_behind(small, record, patched):
    """A node's output outlives the run: what lies on the device must not."""
    from comfyui_ip_adapter.ip_adapter_core.comfyui.prompt_rows import PreparedPrompt

    model, kept = record.recording(patched)
    small.sample(model)
    gc.collect()
    alive = [thing for thing in gc.get_objects() if isinstance(thing, PreparedPrompt)]
    assert alive == [] and kept.runs[-1].shares


def test_a_run_without_a_prompt(small, recorded):
    with pytest.raises(ValueError, match="No image prompt was in force"):
        recorded(small.model("tiny")).heat(*WHOLE)


@pytest.mark.parametrize("settings", [{}, {"weight_curve": [[0, 1], [1, 0.5]]}], ids=len)
def test_prompts_one_after_the_other(small, recorded, settings):
    """Both stand in the first slot of the call, each in its own steps."""
    model, adapter = small.model("tiny"), small.adapter("tiny")
    first = small.apply(model, adapter, small.images(seed=1), end_at=0.4, **settings)
    both = small.apply(first, adapter, small.images(seed=2), start_at=0.6, **settings)
    found = recorded(both, at=(0.1, 0.3, 0.5, 0.7, 0.9))
    early, late = found.heat(ALL, 0, 0.4, 0), found.heat(ALL, 0.6, 1, 0)
    assert torch.equal(found.heat(*FIRST), early) and not same(early, late)
    assert torch.equal(found.heat(*SECOND), late)
    assert same(found.heat(*WHOLE), (early + late) / 2)


def test_sides_of_different_numbers_of_images(small, recorded, memory):
    """12 tokens on one side, 8 on the other: two slots, of which the negative's comes first."""
    images = replace(small.images(3), negative=small.images(2, seed=5).positive)
    found = recorded(small.apply(small.model("tiny"), small.adapter("tiny"), images))
    one = found.heat(*FIRST)
    assert torch.equal(one, found.heat(*WHOLE)) and float(one.min()) > 1e-3
    with pytest.raises(ValueError, match="prompt_number is 2, but 1 were applied"):
        found.heat(*SECOND)


def test_texts_with_an_image_each(small, recorded, memory):
    """The conditioning route: each prompt is averaged over its own text alone."""
    model, adapter, positives = small.model("tiny"), small.adapter("tiny"), []
    for seed, mask in enumerate(HALVES, 1):
        given = small.text(seed), small.text(9), adapter, small.images(seed=seed)
        model, positive, negative = small.apply_conditioning(model, *given, mask=mask)
        positives += positive
    found = recorded(model, [*positives, *small.text(3)], negative, size=16)
    left, right = found.heat(*FIRST), found.heat(*SECOND)
    assert float(left[..., 9:].abs().max()) < 1e-6 < float(left[..., :7].min())
    assert float(right[..., :7].abs().max()) < 1e-6 < float(right[..., 9:].min())
    assert same(found.heat(*WHOLE), (left + right) / 2)  # text 3 has none to count


def test_texts_that_share_an_image(small, recorded, patched, memory):
    """They count alike, in one UNet call or in two."""
    texts, negative = (small.text(1), small.text(2)), small.text(3)
    alone = [recorded(patched, text, negative).heat(*FIRST) for text in texts]
    both = recorded(patched, [*texts[0], *texts[1]], negative).heat(*FIRST)
    assert same(both, sum(alone) / 2) and not same(*alone)


@pytest.mark.parametrize(
    "name",
    [
        *("dual_cfg", "perp_neg", "perp_neg_node", "perturbed_attention", "self_attention"),
        *nightly("cfg_1", "dual_cfg_nested", "dual_cfg_1"),
    ],
)
def test_the_positive_side_of_every_guidance(
    small, recorded, guidances, empty_text, patched, memory, name
):
    """As plain guidance of the texts that get the image, with nothing evaluated twice."""
    first, second, negative = (small.text(seed) for seed in (1, 2, 3))
    followed = [*first, *second] if name.startswith("dual") else first

    def perp_neg_node(model, positive, middle, negative):
        return small.guider(empty_text(model, middle), positive, negative)

    guider = perp_neg_node if name == "perp_neg_node" else getattr(guidances, name)
    # The host's self-attention guidance blurs by an attention of several places.
    plain = recorded(patched, followed, negative, size=16)
    found = recorded(patched, first, second, negative, guider=guider, size=16)
    assert same(found.heat(*FIRST), plain.heat(*FIRST))


def test_a_guider_of_two_models(small, recorded, patched):
    """The negative text is evaluated alone, by another model."""
    from comfy_extras import nodes_custom_sampler

    if not hasattr(nodes_custom_sampler, "Guider_DualModel"):
        pytest.skip("this ComfyUI has no guider of two models")

    def two_models(model, positive, negative):
        guider = nodes_custom_sampler.Guider_DualModel(model, small.model("tiny", seed=7))
        guider.set_conds(positive, negative)
        guider.set_cfg(3.0)
        return guider

    found, plain = (recorded(patched, guider=made) for made in (two_models, small.guider))
    assert same(found.heat(*FIRST), plain.heat(*FIRST))


@pytest.mark.parametrize("name", ["cfg", "perturbed_attention"])
def test_steps_that_are_evaluated_twice(small, recorded, guidances, patched, name):
    """Heun's sampler comes to a step from the one before, and goes on from it."""
    texts = (small.text(seed) for seed in (1, 2, 3))
    found = recorded(patched, *texts, guider=getattr(guidances, name), at=AT, sampler="heun")
    counts = Counter(share.sigma for share in found.shares if share.block == ("middle", 0))
    assert [counts[sigma] for sigma in sorted(counts, reverse=True)] == [1, 2, 2]
    steps = [found.heat(ALL, x - 0.1, x + 0.1, 0) for x in AT]
    assert same(found.heat(*WHOLE), sum(steps) / 3)
    assert float(l1_loss(steps[0], steps[2])) > 1e-4


def test_a_sampler_that_enlarges_the_latents(small, recorded, enlarging):
    """Every step is recorded, at the size that the latents have there."""
    patched = small.apply(small.model(), small.adapter(), small.images())
    found = recorded(patched, at=AT, sampler=enlarging)
    sizes = sorted({share.maps.shape[-1] for share in found.shares if share.block[0] == "input"})
    assert len({share.sigma for share in found.shares}) == 3
    assert sizes[-1] == found.samples.shape[-1] == 16 and len(sizes) > 4
    assert found.heat(ALL, 0.8, 1, 0).shape == (2, 16, 16)


def test_a_compiled_model(small, record, recorded, traced):
    """Recorded as one that is not, between runs that are not recorded."""
    given = small.model("two layers"), small.adapter("two layers"), small.images()
    patched = small.apply(*given)
    plain, compiled = recorded(patched, at=AT), traced(patched)
    for _ in range(2):
        assert torch.allclose(small.sample(compiled, at=AT), plain.samples, rtol=1e-4, atol=1e-4)
        found = recorded(compiled, at=AT)
        assert torch.equal(found.samples, plain.samples)
        assert [s.sigma for s in found.shares] == [s.sigma for s in plain.shares]
        assert torch.equal(found.heat(*WHOLE), plain.heat(*WHOLE))
    late = traced(record.recording(patched)[0])
    assert torch.equal(small.sample(late, at=AT), plain.samples)
