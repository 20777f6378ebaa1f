"""The pack's own sockets."""

from __future__ import annotations

from comfy_api.latest import io

IPAdapter = io.Custom("IP_ADAPTER")
ImagePrompt = io.Custom("IMAGE_PROMPT")
LayerWeights = io.Custom("LAYER_WEIGHTS")
LatentWeights = io.Custom("LATENT_WEIGHTS")
AttentionRecord = io.Custom("ATTENTION_RECORD")
