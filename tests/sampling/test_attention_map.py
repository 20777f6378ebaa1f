"""Where image prompts act: their shares in each layer, against explicit attention in float64."""

from __future__ import annotations

import gc

import pytest
import torch
from torch.nn.functional import interpolate, linear

AT = (0.2, 0.5, 0.8)


@pytest.fixture
def record(host):
    from comfyui_ip_adapter.ip_adapter_core.host import record

    return record


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


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
@pytest.mark.parametrize(
    "blocks, start, end, which",
    [("all", 0.0, 1.0, 0), ("input, output 1", 0.0, 1.0, 2), ("middle", 0.4, 0.9, 1)],
)
def test_the_share_of_the_images(small, record, queries, family, blocks, start, end, which):
    """Two prompts, one with a mask: the queries of a run with them, everything else by hand."""
    model, adapter = small.model(family), small.adapter(family)
    prompts = [small.images(seed=1), small.images(seed=2)]
    mask = torch.rand(1, 8, 8, generator=torch.Generator().manual_seed(3))
    watched, seen = queries(model, small.LAYERS[family])
    patched = small.apply(watched, adapter, prompts[0], weight=0.7)
    patched = small.apply(patched, adapter, prompts[1], weight=1.3, mask=mask)
    recorded, kept = record.recording(patched)
    small.run(small.guider(recorded, small.text(1), small.text(2)), at=AT)
    found = kept.heat(record.blocks_of(blocks), start, end, which)
    names = {"all": None, "middle": {("middle", 0)}}
    others = {("input", n) for n in range(12)} | {("output", 1)}
    sampling = model.model.model_sampling
    at = {sampling.percent_to_sigma(x) for x in AT if start <= x <= end}
    wanted = expected(
        *(small, seen, family, adapter, prompts, [0.7, 1.3], [None, mask]),
        *({float(torch.tensor(x)) for x in at}, names.get(blocks, others), which),
    )
    assert found.shape == (2, 8, 8) and float(wanted.std()) > 1e-3
    assert torch.allclose(found.double(), wanted, rtol=1e-4, atol=1e-6)


def test_the_latents_stay_the_same_to_the_bit(small, record):
    model, texts = small.model(), (small.text(1), small.text(2))
    patched = small.apply(model, small.adapter(), small.images(), mask=torch.rand(1, 9, 9))
    recorded, kept = record.recording(patched)
    assert torch.equal(*(small.run(small.guider(m, *texts)) for m in (recorded, patched)))
    assert kept.shares


def test_outside_its_mask_a_prompt_has_no_share(small, record):
    mask = torch.zeros(1, 64, 64)
    mask[:, :, :24] = 1
    patched = small.apply(small.model(), small.adapter(), small.images(), mask=mask)
    recorded, kept = record.recording(patched)
    small.run(small.guider(recorded, small.text(1), small.text(2)), at=AT, size=16)
    found = kept.heat({("output", n) for n in (9, 10, 11)}, 0, 1, 0)
    assert float(found[:, :, 8:].abs().max()) < 1e-6 < float(found[:, :, :5].min())


def test_frames_of_context_windows_find_their_places(small, record):
    """Each frame's weight is its number, so its share must rise from frame to frame."""
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
        causal_window_fix=False,
    ).args
    same = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).expand(7, -1, -1, -1)
    guider = small.guider(windowed, small.text(1), small.text(2))
    small.run(guider, at=(0.4,), noise=same.clone())
    shares = kept.heat(None, 0, 1, 0).mean((1, 2))
    assert len(shares) == 7 and float(shares[0]) == 0
    assert (shares.diff() > 0).all()


def test_it_holds_the_last_run_alone(small, record):
    patched = small.apply(small.model(), small.adapter(), small.images())
    recorded, kept = record.recording(patched)
    guider = small.guider(recorded, small.text(1), small.text(2))
    small.run(guider, at=AT)
    first = kept.heat(None, 0, 1, 0)
    small.run(guider, at=AT, batch=1, seed=2)
    assert kept.heat(None, 0, 1, 0).shape == (1, 8, 8) and first.shape == (2, 8, 8)
    assert len(kept.shares) == len(AT) * len({key[:2] for key, _ in small.SD15_LAYERS})


def test_no_keys_and_values_stay_behind(small, record):
    """A node's output outlives the run: what lies on the device must not."""
    from comfyui_ip_adapter.ip_adapter_core.host.conditioning import PreparedPrompt

    patched = small.apply(small.model(), small.adapter(), small.images())
    recorded, kept = record.recording(patched)
    small.run(small.guider(recorded, small.text(1), small.text(2)), at=AT)
    gc.collect()
    alive = [thing for thing in gc.get_objects() if isinstance(thing, PreparedPrompt)]
    assert alive == [] and kept.shares


def test_what_was_not_recorded(small, record):
    model, texts = small.model(), (small.text(1), small.text(2))
    recorded, kept = record.recording(model)
    with pytest.raises(ValueError, match="Nothing has been recorded"):
        kept.heat(None, 0, 1, 0)
    small.run(small.guider(recorded, *texts), at=AT)  # without a prompt
    with pytest.raises(ValueError, match="Nothing has been recorded"):
        kept.heat(None, 0, 1, 0)
    recorded, kept = record.recording(small.apply(model, small.adapter(), small.images()))
    small.run(small.guider(recorded, *texts), at=AT)
    for asked, message in (
        ((None, 0.3, 0.4, 0), r"No step .* between 0.3 and 0.4"),
        (({("output", 0)}, 0, 1, 0), r"expected some of input 1, .*middle"),
        ((None, 0, 1, 2), "image_prompt is 2, but 1 were in force"),
    ):
        with pytest.raises(ValueError, match=message):
            kept.heat(*asked)


@pytest.mark.parametrize("text", ["up 1", "input 1.2", "8", "middle, everything"])
def test_blocks_that_mean_nothing(record, text):
    with pytest.raises(ValueError, match="expected all, input, middle, output"):
        record.blocks_of(text)


def test_blocks(record):
    assert record.blocks_of("all") is None and record.blocks_of(" ") is None
    assert record.blocks_of("Input 8; output 1") == {("input", 8), ("output", 1)}
    assert ("output", 11) in record.blocks_of("output")
