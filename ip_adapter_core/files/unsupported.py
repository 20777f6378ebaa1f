"""Relatives of the IP-Adapter that need more than an image encoder, recognised by their keys."""

from __future__ import annotations

from collections.abc import Mapping

from .header import Shaped

FACE_EMBEDDING = 512  # width of a face-recognition embedding (ArcFace)


def unsupported_kind(weights: Mapping[str, Shaped]) -> str | None:
    """Name of the unsupported kind of adapter that these tensors make, or None."""

    def width(key: str, axis: int) -> int | None:
        tensor = weights.get(key)
        return tensor.shape[axis] if tensor is not None and tensor.ndim > axis else None

    if any("double_stream" in key or key.startswith("ip_adapter_proj_model.") for key in weights):
        return "a Flux IP-Adapter"
    if any(".norm_ip." in key or key.startswith("image_proj.time_") for key in weights):
        return "an SD3 IP-Adapter"
    if "ip_adapter.0.to_k_ip.weight" in weights:
        family = {3072: "a Flux", 1536: "an SD3", 2432: "an SD3"}.get(
            width("ip_adapter.0.to_k_ip.weight", 0) or 0, "a transformer's (Flux, SD3, …)"
        )
        return f"{family} IP-Adapter"
    if "image_proj.perceiver_resampler.proj_in.weight" in weights:
        return "a FaceID Plus IP-Adapter (it reads face embeddings)"
    if any("_lora." in key for key in weights if key.startswith("ip_adapter.")):
        return "a FaceID IP-Adapter (it carries LoRA weights and reads face embeddings)"
    if width("image_proj.proj.0.weight", 1) == FACE_EMBEDDING or (
        "image_proj.norm.weight" in weights and "image_proj.proj.2.weight" in weights
    ):
        return "a FaceID IP-Adapter (it reads face embeddings)"
    if width("image_proj.proj_in.weight", 1) == FACE_EMBEDDING:
        return "an InstantID adapter (it reads face embeddings)"
    if width("image_proj.latents", 2) == 2048:
        return "a Kolors IP-Adapter"
    return None
