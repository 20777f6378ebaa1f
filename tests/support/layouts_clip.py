"""Keys and shapes of the CLIP encoders and of IP-Adapter's published files."""

from __future__ import annotations

from collections.abc import Sequence

from tests.support.checkpoint_layouts import Layout, dense, norm, prefixed

VOCABULARY, POSITIONS = 49408, 77


def _layers(prefix: str, width: int, count: int) -> Layout:
    """Transformer layers with the names of the transformers library."""
    layout: Layout = {}
    for i in range(count):
        layer = f"{prefix}encoder.layers.{i}"
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            layout |= dense(f"{layer}.self_attn.{name}", width, width)
        layout |= norm(f"{layer}.layer_norm1", width) | norm(f"{layer}.layer_norm2", width)
        layout |= dense(f"{layer}.mlp.fc1", 4 * width, width)
        layout |= dense(f"{layer}.mlp.fc2", width, 4 * width)
    return layout


def clip_text_l() -> Layout:
    """CLIP ViT-L's text encoder (SD1.5's, SDXL's first), beginning with ``text_model.``."""
    embeddings: Layout = {
        "text_model.embeddings.token_embedding.weight": (VOCABULARY, 768),
        "text_model.embeddings.position_embedding.weight": (POSITIONS, 768),
    }
    layers = _layers("text_model.", 768, 12)
    return embeddings | layers | norm("text_model.final_layer_norm", 768)


def clip_text_g() -> Layout:
    """OpenCLIP ViT-bigG's text encoder, SDXL's second, with OpenCLIP's names."""
    width = 1280
    layout: Layout = {
        "token_embedding.weight": (VOCABULARY, width),
        "positional_embedding": (POSITIONS, width),
        "text_projection": (width, width),
        "logit_scale": (),
        **norm("ln_final", width),
    }
    for i in range(32):
        block = f"transformer.resblocks.{i}"
        layout |= {
            f"{block}.attn.in_proj_weight": (3 * width, width),
            f"{block}.attn.in_proj_bias": (3 * width,),
            **dense(f"{block}.attn.out_proj", width, width),
            **norm(f"{block}.ln_1", width),
            **norm(f"{block}.ln_2", width),
            **dense(f"{block}.mlp.c_fc", 4 * width, width),
            **dense(f"{block}.mlp.c_proj", width, 4 * width),
        }
    return layout


def clip_vision(width: int, layers: int, projection: int) -> Layout:
    """A CLIP image encoder with 14-pixel patches of 224-pixel pictures (257 positions)."""
    layout: Layout = {
        "vision_model.embeddings.class_embedding": (width,),
        "vision_model.embeddings.patch_embedding.weight": (width, 3, 14, 14),
        "vision_model.embeddings.position_embedding.weight": (257, width),
        **norm("vision_model.pre_layrnorm", width),
        **_layers("vision_model.", width, layers),
        **norm("vision_model.post_layernorm", width),
    }
    return layout | dense("visual_projection", projection, width, bias=False)


def linear_projection(features: int, context: int, tokens: int = 4) -> Layout:
    """``image_proj`` of a base adapter: features (image_embeds) to tokens of ``context``."""
    return dense("proj", tokens * context, features) | norm("norm", context)


def full_projection(features: int, context: int) -> Layout:
    """``image_proj`` of a full adapter: every hidden state becomes a token."""
    return (
        dense("proj.0", features, features)
        | dense("proj.2", context, features)
        | norm("proj.3", context)
    )


def resampler(features: int, context: int, width: int, tokens: int = 16) -> Layout:
    """``image_proj`` of a fine-grained adapter: 4 layers, heads of 64."""
    inner = width // 64 * 64
    layout: Layout = {
        "latents": (1, tokens, width),
        **dense("proj_in", width, features),
        **dense("proj_out", context, width),
        **norm("norm_out", context),
    }
    for i in range(4):
        layout |= {
            **norm(f"layers.{i}.0.norm1", width),
            **norm(f"layers.{i}.0.norm2", width),
            **dense(f"layers.{i}.0.to_q", inner, width, bias=False),
            **dense(f"layers.{i}.0.to_kv", 2 * inner, width, bias=False),
            **dense(f"layers.{i}.0.to_out", width, inner, bias=False),
            **norm(f"layers.{i}.1.0", width),
            **dense(f"layers.{i}.1.1", 4 * width, width, bias=False),
            **dense(f"layers.{i}.1.3", width, 4 * width, bias=False),
        }
    return layout


def ip_adapter(projection: Layout, widths: Sequence[int], context: int) -> Layout:
    """A whole file: the projection, then W'k and W'v a layer, numbered 1, 3, 5, …"""
    layout = prefixed("image_proj.", projection)
    for i, width in enumerate(widths):
        for name in ("to_k_ip", "to_v_ip"):
            layout |= dense(f"ip_adapter.{2 * i + 1}.{name}", width, context, bias=False)
    return layout
