"""Keys and shapes of the public checkpoints, written down, so that nothing must be imported.

Every function returns ``{key: shape}`` in the layout that ComfyUI's loaders read. Linear
and convolution weights are ``(out, in, ...)``; a bias follows its weight.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

Layout = dict[str, tuple[int, ...]]
HINT_WIDTHS = (3, 16, 16, 32, 32, 96, 96, 256)


@dataclass(frozen=True)
class UNet:
    """A UNet of the Stable Diffusion family whose levels are all ``width`` channels wide.

    ``depths``: transformer blocks per residual block, one tuple a level (0 is no transformer).
    """

    depths: tuple[tuple[int, ...], ...]
    middle: int
    context: int
    linear: bool = False
    vector: int | None = None
    width: int = 320

    @property
    def layers(self) -> int:
        """Cross-attention layers: down, up (one residual block more a level), middle."""
        return sum(sum(level) + sum(level) + level[-1] for level in self.depths) + self.middle


SD15_MINI = UNet(depths=((1,),), middle=1, context=768)
SDXL_MINI = UNet(((0, 0), (2, 2), (10, 10)), middle=10, context=2048, linear=True, vector=2816)


def dense(name: str, out: int, *rest: int, bias: bool = True) -> Layout:
    """A linear layer or convolution."""
    weight: Layout = {f"{name}.weight": (out, *rest)}
    return {**weight, f"{name}.bias": (out,)} if bias else weight


def norm(name: str, width: int) -> Layout:
    """A layer or group normalisation."""
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def prefixed(prefix: str, layout: Layout) -> Layout:
    """The same layout with ``prefix`` before every key."""
    return {prefix + key: shape for key, shape in layout.items()}


def _merge(parts: Iterable[Layout]) -> Layout:
    return {key: shape for part in parts for key, shape in part.items()}


def _residual(name: str, into: int, out: int, time: int) -> Layout:
    parts = [
        norm(f"{name}.in_layers.0", into),
        dense(f"{name}.in_layers.2", out, into, 3, 3),
        dense(f"{name}.emb_layers.1", out, time),
        norm(f"{name}.out_layers.0", out),
        dense(f"{name}.out_layers.3", out, out, 3, 3),
    ]
    if into != out:
        parts.append(dense(f"{name}.skip_connection", out, into, 1, 1))
    return _merge(parts)


def _transformer(name: str, depth: int, spec: UNet) -> Layout:
    width, window = spec.width, () if spec.linear else (1, 1)
    parts = [norm(f"{name}.norm", width), dense(f"{name}.proj_in", width, width, *window)]
    for i in range(depth):
        block = f"{name}.transformer_blocks.{i}"
        for attention, context in (("attn1", width), ("attn2", spec.context)):
            parts += [
                dense(f"{block}.{attention}.to_q", width, width, bias=False),
                dense(f"{block}.{attention}.to_k", width, context, bias=False),
                dense(f"{block}.{attention}.to_v", width, context, bias=False),
                dense(f"{block}.{attention}.to_out.0", width, width),
            ]
        parts += [
            dense(f"{block}.ff.net.0.proj", 8 * width, width),
            dense(f"{block}.ff.net.2", width, 4 * width),
            *(norm(f"{block}.norm{n}", width) for n in (1, 2, 3)),
        ]
    return _merge([*parts, dense(f"{name}.proj_out", width, width, *window)])


def _encoder(spec: UNet) -> tuple[Layout, int]:
    """Time embedding, input blocks and middle block, and how many input blocks there are."""
    width, time = spec.width, 4 * spec.width
    parts = [dense("time_embed.0", time, width), dense("time_embed.2", time, time)]
    if spec.vector:
        parts.append(dense("label_emb.0.0", time, spec.vector))
        parts.append(dense("label_emb.0.2", time, time))
    parts.append(dense("input_blocks.0.0", width, 4, 3, 3))
    count = 1
    for n, level in enumerate(spec.depths):
        if n:
            parts.append(dense(f"input_blocks.{count}.0.op", width, width, 3, 3))
            count += 1
        for depth in level:
            parts.append(_residual(f"input_blocks.{count}.0", width, width, time))
            if depth:
                parts.append(_transformer(f"input_blocks.{count}.1", depth, spec))
            count += 1
    parts += [
        _residual("middle_block.0", width, width, time),
        _transformer("middle_block.1", spec.middle, spec),
        _residual("middle_block.2", width, width, time),
    ]
    return _merge(parts), count


def unet(spec: UNet) -> Layout:
    """ComfyUI's ``UNetModel``, without the ``model.diffusion_model.`` prefix."""
    encoder, _ = _encoder(spec)
    parts, count, width = [encoder], 0, spec.width
    for n, level in reversed(list(enumerate(spec.depths))):
        depths = [*level, level[-1]]
        for i, depth in enumerate(depths):
            parts.append(_residual(f"output_blocks.{count}.0", 2 * width, width, 4 * width))
            if depth:
                parts.append(_transformer(f"output_blocks.{count}.1", depth, spec))
            if n and i == len(depths) - 1:
                up = f"output_blocks.{count}.{2 if depth else 1}.conv"
                parts.append(dense(up, width, width, 3, 3))
            count += 1
    return _merge([*parts, norm("out.0", width), dense("out.2", 4, width, 3, 3)])


def controlnet(spec: UNet) -> Layout:
    """ComfyUI's ``ControlNet`` for that UNet: its encoder, the hint's, and an output each."""
    encoder, count = _encoder(spec)
    widths = [*HINT_WIDTHS, spec.width]
    hint = [
        dense(f"input_hint_block.{2 * i}", widths[i + 1], widths[i], 3, 3)
        for i in range(len(HINT_WIDTHS))
    ]
    zero = [dense(f"zero_convs.{i}.0", spec.width, spec.width, 1, 1) for i in range(count)]
    out = dense("middle_block_out.0", spec.width, spec.width, 1, 1)
    return _merge([encoder, *hint, *zero, out])


def _vae_side(name: str, ends: tuple[int, int], widths: Sequence[int], blocks: int) -> Layout:
    """Encoder (``down``) or decoder (``up``); ``widths`` in the order of the data's way."""
    up = name == "decoder"
    into, top = widths[0], widths[-1]
    parts, levels = [dense(f"{name}.conv_in", into, ends[0], 3, 3)], len(widths)

    def residual(key: str, into: int, out: int) -> None:
        parts.extend((norm(f"{key}.norm1", into), dense(f"{key}.conv1", out, into, 3, 3)))
        parts.extend((norm(f"{key}.norm2", out), dense(f"{key}.conv2", out, out, 3, 3)))
        if into != out:
            parts.append(dense(f"{key}.nin_shortcut", out, into, 1, 1))

    for n, width in enumerate(widths):
        level = f"{name}.up.{levels - 1 - n}" if up else f"{name}.down.{n}"
        for i in range(blocks):
            residual(f"{level}.block.{i}", into, width)
            into = width
        if n < levels - 1:
            parts.append(dense(f"{level}.{'up' if up else 'down'}sample.conv", into, into, 3, 3))
    middle = widths[0] if up else top
    residual(f"{name}.mid.block_1", middle, middle)
    residual(f"{name}.mid.block_2", middle, middle)
    parts.append(norm(f"{name}.mid.attn_1.norm", middle))
    for key in ("q", "k", "v", "proj_out"):
        parts.append(dense(f"{name}.mid.attn_1.{key}", middle, middle, 1, 1))
    parts += [norm(f"{name}.norm_out", top), dense(f"{name}.conv_out", ends[1], top, 3, 3)]
    return _merge(parts)


def vae() -> Layout:
    """Stable Diffusion's autoencoder, without the ``first_stage_model.`` prefix."""
    widths = (128, 256, 512, 512)
    return {
        **_vae_side("encoder", (3, 8), widths, blocks=2),
        **_vae_side("decoder", (4, 3), widths[::-1], blocks=3),
        **dense("quant_conv", 8, 8, 1, 1),
        **dense("post_quant_conv", 4, 4, 1, 1),
    }
