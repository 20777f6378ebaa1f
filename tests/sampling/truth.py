"""Decoupled cross-attention the slow way, as the measure of everything else.

W'k and W'v stay resident, K' and V' are computed at every call, λ multiplies the output, the window
is tested at every step, masks are resized for every layer, and the images of each row are looked up
by what that row *is*: its text says which conditioning, its place in the chunk which latent.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from comfy.ldm.modules.attention import optimized_attention
from comfy.patcher_extension import WrappersMP
from comfyui_ip_adapter.ip_adapter_core.comfyui.host import CurveInput
from torch.nn.functional import interpolate, linear

from tests.sampling import small

KEY = "truth"


@dataclass
class Image:
    """One image prompt on one conditioning, with the settings of the Apply nodes.

    `features (N, embed)`: one row a latent with `per_latent`, all on every latent without.
    `latent_weights`: a factor a latent, the last one for those that follow.
    """

    adapter: object
    features: torch.Tensor
    weight: float = 1.0
    start_at: float = 0.0
    end_at: float = 1.0
    mask: torch.Tensor | None = None
    layer_weights: list[float] | None = None
    per_latent: bool = False
    latent_weights: list[float] | None = None
    weight_curve: Any = None

    def tokens(self, latent: int) -> torch.Tensor:
        features = self.features
        if self.per_latent:
            features = features[latent % len(features)][None]
        return self.adapter.module.tokens(features).double().flatten(0, 1)


def sides(adapter, image_prompt, **settings) -> tuple[list[Image], list[Image]]:
    """The positive and negative side of one image prompt, `combine` resolved by hand."""
    combine = settings.pop("combine", "concat")
    made = []
    for side in (image_prompt.positive, image_prompt.negative):
        features = side.image_embeds
        if combine == "average":
            features = sum(features[1:], features[0])[None] / len(features)
        made.append([Image(adapter, features, per_latent=combine == "per_latent", **settings)])
    return made[0], made[1]


def apply(model, layers, *conditionings):
    """A clone of `model` on which each text has its images.

    `layers`: the written-out table of `small`. `conditionings`: pairs of a conditioning and the
    list of its `Image`s. A patch that `model` has in a slot is called for the text part.
    """
    clone = model.clone()
    texts = [(entry[0][0], images) for texts, images in conditionings for entry in texts]
    sampling = model.get_model_object("model_sampling")
    places: dict = {}  # of each conditioning: the whole latent's size, and its area

    def locate(executor, model, conds, x, *args, **kwargs):
        for entry in (entry for entries in conds for entry in entries or ()):
            places[entry["uuid"]] = tuple(x.shape[-2:]), entry.get("area")
        return executor(model, conds, x, *args, **kwargs)

    def remember(executor, x, timesteps, context, y, control, options, *args, **kwargs):
        chunks = options["cond_or_uncond"]
        window = options.get("context_window")
        latents = range(len(x) // len(chunks)) if window is None else _frames(window)
        latents = (options.get("ad_params") or {}).get("sub_idxs", latents)
        assert len(latents) * len(chunks) == len(x)
        rows = [
            (
                _images_of(context[chunk * len(latents) + i], texts),
                latent,
                places[options["uuids"][chunk]],
            )
            for chunk in range(len(chunks))
            for i, latent in enumerate(latents)
        ]
        options = {**options, KEY: rows, "latent_shape": x.shape[-2:], "model_sampling": sampling}
        options["chunks of the call"] = tuple(chunks)
        return executor(x, timesteps, context, y, control, options, *args, **kwargs)

    clone.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, KEY, locate)
    clone.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, KEY, remember)

    def patch(number, before):
        def attend(q, k, v, options):
            out = (before or _text)(q, k, v, options).clone()
            rows = options[KEY]
            for row, number_of in enumerate(_order(options["chunks of the call"], rows, len(q))):
                images, latent, place = rows[number_of]
                for image in images:
                    if _in_window(image, float(options["sigmas"][0]), sampling):
                        out[row] += _branch(image, number, q[row], latent, place, options)
            return out

        return attend

    slots = clone.model_options["transformer_options"].get("patches_replace", {}).get("attn2", {})
    befores = [slots.get(key, slots.get(key[:2])) for key, _ in layers]
    for number, ((key, _), before) in enumerate(zip(layers, befores, strict=True)):
        clone.set_model_attn2_replace(patch(number, before), *key)
    return clone


def _order(chunks, rows, found: int) -> list[int]:
    """Which row each of a layer's is: couples repeat those of texts that are not negative (1)."""
    batch, order = len(rows) // len(chunks), []
    positive = len(chunks) - chunks.count(1)
    times = (found - batch * chunks.count(1)) // (batch * positive) if positive else 1
    for i, chunk in enumerate(chunks):
        order += [*range(i * batch, (i + 1) * batch)] * (1 if chunk == 1 else times)
    assert len(order) == found
    return order


def _frames(window) -> list[int]:
    anchor = getattr(window, "causal_anchor_index", None)
    return [*([] if anchor is None else [anchor]), *window.index_list]


def _images_of(states, texts) -> list[Image]:
    """Which text a row carries; the host may have repeated it to the length of another."""
    found = [images for text, images in texts if torch.equal(states[: len(text)].float(), text)]
    assert len(found) == 1, f"a row has {len(found)} texts"
    return found[0]


def _in_window(image: Image, sigma: float, sampling) -> bool:
    start, end = (sampling.percent_to_sigma(p) for p in (image.start_at, image.end_at))
    return end <= sigma <= start


def _text(q, k, v, options):
    return optimized_attention(q, k, v, options["n_heads"], transformer_options=options)


def _branch(image: Image, number: int, query, latent: int, place, options) -> torch.Tensor:
    """λ · mask · Attn(Q, K', V') of one row, `(L, C)`."""
    layer = image.adapter.module.ip_adapter[str(2 * number + 1)]
    tokens = image.tokens(latent)
    key, value = (linear(tokens, w.weight.double()) for w in (layer.to_k_ip, layer.to_v_ip))
    heads = []
    parts = (x.double().chunk(options["n_heads"], -1) for x in (query, key, value))
    for q, k, v in zip(*parts, strict=True):
        scores = (q @ k.T / q.shape[-1] ** 0.5).exp()
        heads.append(scores / scores.sum(-1, keepdim=True) @ v)
    weight = image.weight * (image.layer_weights[number] if image.layer_weights else 1.0)
    if image.weight_curve is not None:
        weight *= CurveInput.from_raw(image.weight_curve).interp(_fraction(options))
    if image.latent_weights is not None:
        weight *= image.latent_weights[min(latent, len(image.latent_weights) - 1)]
    out = weight * torch.cat(heads, -1)
    if image.mask is not None:
        out = out * _mask(image.mask, latent, place, options)
    return out.to(query.dtype)


def _fraction(options) -> float:
    """Where in the schedule the sigma lies, by halving."""
    sampling, sigma = options["model_sampling"], float(options["sigmas"][0])
    low, high = 0.0, 1.0
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if sampling.percent_to_sigma(middle) > sigma else (low, middle)
    return (low + high) / 2


def _mask(mask, latent: int, place, options) -> torch.Tensor:
    """`(L, 1)`: the mask over the whole picture at this layer's scale, cut to the area."""
    height, width = options["activations_shape"][-2:]
    rows, columns = options["latent_shape"]
    (full_rows, full_columns), area = place
    top, left = area[2:] if area else (0, 0)
    whole = (full_rows * height // rows, full_columns * width // columns)
    masks = mask.double().reshape(-1, 1, 1, *mask.shape[-2:])
    level = interpolate(masks[latent % len(masks)], whole, mode="bicubic")[0, 0]
    y, x = top * height // rows, left * width // columns
    return level[y : y + height, x : x + width].reshape(-1, 1)


def check(found, expected, without, tolerance: float = 1e-4) -> None:
    """`found` is `expected`, measured by how much the images change of what is `without` them."""
    effect = float((expected - without).abs().max())
    assert effect > 0.01 * float(without.std()), "the images change too little to tell anything"
    error = float((found - expected).abs().max()) / effect
    assert error <= tolerance, f"relative error {error:.1e}"


def joined(model, *conditionings):
    """Plain guidance: all but the last conditioning are positive."""
    *positives, negative = conditionings
    return small.guider(model, [entry for texts in positives for entry in texts], negative)


class Comparison:
    """A model and conditionings with image prompts, beside the truth of them.

    Settings are those of the Apply nodes, `adapter` and `image_prompt` included.
    """

    def __init__(self, *texts, model=None, family="tiny"):
        self.family = family
        self.plain = self.model = model or small.model(family)
        self.texts = texts or (small.text(1), small.text(2))
        self.conditionings = list(self.texts)
        self.images: list[list[Image]] = [[] for _ in self.texts]

    def on_model(self, positives: int = 1, **settings) -> Comparison:
        """IPA_Apply. `positives`: how many of the conditionings, the first ones, are positive."""
        given = self._given(settings)
        self.model = small.apply(self.model, **given)
        positive, negative = sides(**given)
        for number, images in enumerate(self.images):
            images += positive if number < positives else negative
        return self

    def on_texts(self, positive: int | None = 0, negative: int | None = -1, **settings):
        """IPA_ApplyConditioning on the conditionings of these numbers, or on one not used."""
        given, numbers = self._given(settings), (positive, negative)
        texts = [small.text(99) if n is None else self.conditionings[n] for n in numbers]
        self.model, *made = small.apply_conditioning(self.model, *texts, **given)
        for number, conditioning, images in zip(numbers, made, sides(**given), strict=True):
            if number is not None:
                self.conditionings[number] = conditioning
                self.images[number] += images
        return self

    def _given(self, settings) -> dict[str, Any]:
        return {"adapter": small.adapter(self.family), "image_prompt": small.images(), **settings}

    def check(self, guider=joined, change=None, tolerance: float = 1e-4, **options):
        """Sample with all of that: the latents are the truth's, in no more UNet calls than without.
        Returns them: with the images, true ones, and without images.

        `change`: what is done to each model last. `options`: of `small.run`.
        """
        true = apply(
            self.plain, small.LAYERS[self.family], *zip(self.texts, self.images, strict=True)
        )
        latents, counts = [], []
        for model in (self.model, true, self.plain):
            watched, calls = small.counted(model)
            given = self.conditionings if model is self.model else self.texts
            torch.manual_seed(0)
            made = guider(change(watched) if change else watched, *given)
            latents.append(small.run(made, **options))
            counts.append(calls)
        assert counts[0] == counts[2]
        check(*latents, tolerance)
        return latents
