"""Where image prompts act: their shares in each layer, against explicit attention in float64."""

from __future__ import annotations

import gc

import pytest
import torch
from comfyui_ip_adapter.ip_adapter_core.attention_map import KEPT, blocks_of
from torch.nn.functional import interpolate, linear

from tests.support.sets import nightly

AT = (0.2, 0.5, 0.8)
ALL = [("all", None)]


@pytest.fixture
def record(host):
    from comfyui_ip_adapter.ip_adapter_core.comfyui import record

    return record


@pytest.fixture
def heat(small, record):
    """Samples with a guider of the recorded model, and gives the map of that run."""

    def heat(guider, kept, blocks=ALL, start=0, end=1, prompt=0, **options):
        latents = small.run(guider, **{"at": AT, **options})
        return kept.of(latents).heat(blocks, start, end, prompt)

    return heat


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


def expected(small, seen, family, adapter, prompts, weights, masks, at, blocks, which):
    """The mean share by hand: over layers of a block, then over blocks and steps."""
    size = (8, 8)
    total, count = 0.0, 0
    sigmas = {sigma for sigma, _ in seen}
    layers = [key for key, _ in small.LAYERS[family]]
    for sigma in sigmas & at:
        for block in dict.fromkeys(key[:2] for key in layers):
            if blocks is not None and block not in blocks:
                continue
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
            total = total + interpolate(maps, size, mode="bilinear")[:, 0]
            count += 1
    return total / count


@pytest.mark.parametrize("family", ["sd15", *nightly("sdxl", "sdxl70")])
@pytest.mark.parametrize(
    "blocks, start, end, which",
    [("all", 0.0, 1.0, 0), ("input, output 5", 0.0, 1.0, 2), ("middle", 0.4, 0.9, 1)],
)
def test_the_share_of_the_images(small, record, heat, queries, family, blocks, start, end, which):
    """Two prompts, one with a mask: the queries of a run with them, everything else by hand."""
    model, adapter = small.model(family), small.adapter(family)
    prompts = [small.images(seed=1), small.images(seed=2)]
    mask = torch.rand(1, 8, 8, generator=torch.Generator().manual_seed(3))
    watched, seen = queries(model, small.LAYERS[family])
    patched = small.apply(watched, adapter, prompts[0], weight=0.7)
    patched = small.apply(patched, adapter, prompts[1], weight=1.3, mask=mask)
    recorded, kept = record.recording(patched)
    guider = small.guider(recorded, small.text(1), small.text(2))
    found = heat(guider, kept, blocks_of(blocks), start, end, which)
    names = {"all": None, "middle": {("middle", 0)}}
    others = {("input", n) for n in range(12)} | {("output", 5)}
    sampling = model.model.model_sampling
    at = {sampling.percent_to_sigma(x) for x in AT if start <= x <= end}
    wanted = expected(
        *(small, seen, family, adapter, prompts, [0.7, 1.3], [None, mask]),
        *({float(torch.tensor(x)) for x in at}, names.get(blocks, others), which),
    )
    assert found.shape == (2, 8, 8) and float(wanted.std()) > 1e-3
    assert torch.allclose(found.double(), wanted, rtol=1e-4, atol=1e-6)


PIECES = [[0.1 * i, [0.2, 1.0, 0.0, 0.7, 0.4][i % 5]] for i in range(11)]


@pytest.mark.parametrize(
    "settings",
    [{"mask": torch.rand(1, 9, 9)}, {"end_at": 0.5}, {"weight_curve": PIECES}],
    ids=["mask", "window", "curve"],
)
def test_the_run_stays_the_same(small, record, settings):
    """Its latents to the bit, and its UNet calls."""
    model, calls = small.counted(small.model())
    patched = small.apply(model, small.adapter(), small.images(), **settings)
    recorded, kept = record.recording(patched)
    texts, latents = (small.text(1), small.text(2)), []
    for m in (recorded, patched):
        latents.append(small.run(small.guider(m, *texts), at=AT))
    assert torch.equal(*latents) and kept.of(latents[0]).shares
    assert calls == [4] * (2 * len(AT))


def test_in_half_precision(small, record, heat):
    """The same latents to the bit, and about the same map."""
    maps, texts = [], (small.text(1), small.text(2))
    for dtype in (torch.float32, torch.bfloat16):
        patched = small.apply(small.model(dtype=dtype), small.adapter(), small.images())
        recorded, kept = record.recording(patched)
        guider = small.guider(recorded, *texts)
        maps.append(heat(guider, kept, at=(0.5,)))
        bare = small.run(small.guider(patched, *texts), at=(0.5,))
        assert torch.equal(kept.runs[-1].samples, bare)
    assert maps[1].dtype == torch.float32
    assert float((maps[1] - maps[0]).abs().mean()) < 0.1 * float(maps[0].mean())


def test_outside_its_mask_a_prompt_has_no_share(small, record, heat):
    mask = torch.zeros(1, 64, 64)
    mask[:, :, :24] = 1
    patched = small.apply(small.model(), small.adapter(), small.images(), mask=mask)
    recorded, kept = record.recording(patched)
    guider = small.guider(recorded, small.text(1), small.text(2))
    found = heat(guider, kept, [("output", n) for n in (9, 10, 11)], size=16)
    assert float(found[:, :, 8:].abs().max()) < 1e-6 < float(found[:, :, :5].min())


@pytest.mark.parametrize("anchor", [False, True])
def test_frames_of_context_windows_find_their_places(small, record, heat, anchor):
    """Each frame's weight is its number, so its share must rise from frame to frame. The anchor
    that the host puts before a window, and discards, does not count."""
    from comfy_extras.nodes_context_windows import ContextWindowsManualNode

    weights = [0.1 * frame for frame in range(7)]
    patched = small.apply(small.model(), small.adapter(), small.images(), latent_weights=weights)
    recorded, kept = record.recording(patched)
    (windowed,) = ContextWindowsManualNode.execute(
        model=recorded,
        context_length=4,
        context_overlap=2,
        context_schedule="standard_static",
        context_stride=1,
        closed_loop=False,
        fuse_method="pyramid",
        dim=0,
        freenoise=False,
        causal_window_fix=anchor,
    ).args
    same = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).expand(7, -1, -1, -1)
    guider = small.guider(windowed, small.text(1), small.text(2))
    shares = heat(guider, kept, at=(0.4,), noise=same.clone()).mean((1, 2))
    assert len(shares) == 7 and float(shares[0]) == 0
    assert (shares.diff() > 0).all()
    seen = kept.runs[-1].shares
    assert {(len(share.frames), share.maps.shape[1]) for share in seen} == {(4, 4)}


def test_each_runs_latents_find_its_map(small, record):
    """Of the last runs, whatever ran after them."""
    patched = small.apply(small.model("tiny"), small.adapter("tiny"), small.images())
    recorded, kept = record.recording(patched)
    guider, latents, maps = small.guider(recorded, small.text(1), small.text(2)), [], []
    for seed in range(KEPT + 1):
        latents.append(small.run(guider, at=(0.5,), seed=seed))
        maps.append(kept.runs[-1].heat(ALL, 0, 1, 0))
    for made, own in zip(latents[1:], maps[1:], strict=True):
        assert torch.equal(kept.of(made).heat(ALL, 0, 1, 0), own)
    assert not any(torch.allclose(own, maps[-1], rtol=1e-3) for own in maps[:-1])
    with pytest.raises(ValueError, match=f"of none of the {KEPT} sampling runs"):
        kept.of(latents[0])


def test_large_maps_make_room(small, record, monkeypatch):
    patched = small.apply(small.model("tiny"), small.adapter("tiny"), small.images())
    recorded, kept = record.recording(patched)
    guider = small.guider(recorded, small.text(1), small.text(2))
    small.run(guider, at=(0.5,), seed=0)
    for limit, left in ((2.5, 2), (1.5, 1), (0.5, 1)):
        monkeypatch.setattr(record, "LIMIT", limit * kept.runs[-1].nbytes)
        for seed in range(3):
            made = small.run(guider, at=(0.5,), seed=seed)
        assert len(kept.runs) == left and kept.of(made) is kept.runs[-1]


def test_an_interrupted_run_leaves_nothing(small, record, heat):
    patched = small.apply(small.model("tiny"), small.adapter("tiny"), small.images())
    recorded, kept = record.recording(patched)
    guider = small.guider(recorded, small.text(1), small.text(2))

    def stop(*args):
        raise InterruptedError

    with pytest.raises(InterruptedError):
        small.run(guider, at=AT, callback=stop)
    assert not kept.runs
    assert heat(guider, kept).shape == (2, 8, 8)
    blocks = {key[:2] for key, _ in small.TINY_LAYERS}
    assert len(kept.runs[-1].shares) == len(AT) * len(blocks)


def test_no_keys_and_values_stay_behind(small, record):
    """A node's output outlives the run: what lies on the device must not."""
    from comfyui_ip_adapter.ip_adapter_core.comfyui.prompt_rows import PreparedPrompt

    patched = small.apply(small.model(), small.adapter(), small.images())
    recorded, kept = record.recording(patched)
    small.run(small.guider(recorded, small.text(1), small.text(2)), at=AT)
    gc.collect()
    alive = [thing for thing in gc.get_objects() if isinstance(thing, PreparedPrompt)]
    assert alive == [] and kept.runs[-1].shares


def test_what_was_not_recorded(small, record, heat):
    model, texts = small.model(), (small.text(1), small.text(2))
    recorded, kept = record.recording(model)
    with pytest.raises(ValueError, match="Nothing has been recorded"):
        kept.of(torch.rand(2, 4, 8, 8))
    with pytest.raises(ValueError, match="No image prompt was in force"):
        heat(small.guider(recorded, *texts), kept)  # without a prompt
    recorded, kept = record.recording(small.apply(model, small.adapter(), small.images()))
    latents = small.run(small.guider(recorded, *texts), at=AT)
    for asked, message in (
        ((ALL, 0.3, 0.4, 0), r"No step .* between 0.3 and 0.4"),
        (([("output", 0)], 0, 1, 0), r"'output 0', .* some of input 1, .*middle"),
        ((ALL, 0, 1, 2), "prompt_number is 2, but 1 were applied"),
    ):
        with pytest.raises(ValueError, match=message):
            kept.of(latents).heat(*asked)
