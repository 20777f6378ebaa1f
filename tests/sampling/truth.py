"""Decoupled cross-attention the slow way, as the measure of everything else.

W'k and W'v stay resident, K' and V' are computed at every call, λ multiplies the output, the window
is tested at every step, masks are resized for every layer, and the images of each row are looked up
by what that row *is*: its text says which conditioning, its place in the chunk which latent.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from comfy.ldm.modules.attention import optimized_attention
from comfy.patcher_extension import WrappersMP
from torch.nn.functional import interpolate, linear

KEY = "truth"


@dataclass
class Image:
    """One image prompt on one conditioning, with the settings of the Apply nodes.

    `features (N, embed)`: one row a latent with `per_latent`, all on every latent without.
    `steps`: a factor of λ at each fraction of the schedule where a step lies. `curve`: the same for
    every fraction. `latent_weights`: a factor a latent, the last one for those that follow.
    """

    adapter: object
    features: torch.Tensor
    weight: float = 1.0
    start_at: float = 0.0
    end_at: float = 1.0
    mask: torch.Tensor | None = None
    layer_weights: list[float] | None = None
    per_latent: bool = False
    steps: dict[float, float] | None = None
    latent_weights: list[float] | None = None
    curve: Callable[[float], float] | None = None

    def tokens(self, latent: int) -> torch.Tensor:
        features = self.features
        if self.per_latent:
            features = features[latent % len(features)][None]
        return self.adapter.module.tokens(features).double().flatten(0, 1)


def sides(adapter, prompt, **settings) -> tuple[list[Image], list[Image]]:
    """The positive and negative side of one image prompt, `combine` resolved by hand."""
    combine = settings.pop("combine", "concat")
    made = []
    for side in (prompt.positive, prompt.negative):
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
        return executor(x, timesteps, context, y, control, options, *args, **kwargs)

    clone.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, KEY, locate)
    clone.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, KEY, remember)

    def patch(number, before):
        def attend(q, k, v, options):
            out = (before or _text)(q, k, v, options).clone()
            rows = options[KEY]
            for row, number_of in enumerate(options.get("order", range(len(rows)))):
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
    if image.steps is not None:
        weight *= image.steps[_step(image.steps, options)]
    if image.curve is not None:
        weight *= image.curve(_fraction(options))
    if image.latent_weights is not None:
        weight *= image.latent_weights[min(latent, len(image.latent_weights) - 1)]
    out = weight * torch.cat(heads, -1)
    if image.mask is not None:
        out = out * _mask(image.mask, latent, place, options)
    return out.to(query.dtype)


def _step(steps, options) -> float:
    """The fraction whose sigma is the step's."""
    sampling, sigma = options["model_sampling"], float(options["sigmas"][0])
    return min(steps, key=lambda at: abs(sampling.percent_to_sigma(at) - sigma))


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
    mask = mask[latent % len(mask)].double()[None, None]
    level = interpolate(mask, whole, mode="bicubic", align_corners=False)[0, 0]
    y, x = top * height // rows, left * width // columns
    return level[y : y + height, x : x + width].reshape(-1, 1)


def check(found, expected, without, tolerance: float = 1e-4) -> None:
    """`found` is `expected`, measured by how much the images change of what is `without` them."""
    effect = float((expected - without).abs().max())
    assert effect > 0.01 * float(without.std()), "the images change too little to tell anything"
    error = float((found - expected).abs().max()) / effect
    assert error <= tolerance, f"relative error {error:.1e}"
