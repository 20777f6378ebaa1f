"""The demo's pictures without ComfyUI: the same core and stand-in weights, in diffusers.

Shows that ``ip_adapter_core`` is plain torch: an attention processor that calls its two
functions is all that diffusers needs.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from tools import miniature
from tools.ask import Ask
from tools.host import load_pack
from tools.layouts_clip import POSITIONS

load_pack()

from comfyui_ip_adapter.ip_adapter_core import checkpoint  # noqa: E402
from comfyui_ip_adapter.ip_adapter_core.attention import add, image_attention  # noqa: E402
from comfyui_ip_adapter.ip_adapter_core.prompt import (  # noqa: E402
    ImageFeatures,
    ImagePrompt,
    fold,
    layer_weights,
    tokens,
    unpack,
)

_UNET: dict[str, Any] = {
    "block_out_channels": (320,),
    "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("CrossAttnUpBlock2D",),
    "layers_per_block": 1,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
_VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}
_TEXT: dict[str, Any] = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12}
_TEXT |= {"num_attention_heads": 12, "eos_token_id": 49407}
_VISION: dict[str, Any] = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24}
_VISION |= {"num_attention_heads": 16, "patch_size": 14, "projection_dim": 768}
_MEAN, _STD = (0.4815, 0.4578, 0.4082), (0.2686, 0.2613, 0.2758)
_START, _END = 49406, 49407


class DecoupledAttention:
    """A diffusers attention processor: text attention plus the core's image attention."""

    def __init__(self, key: Tensor, value: Tensor) -> None:
        """K' and V' of this layer, ``(B, T, C)``, λ folded in."""
        self.key, self.value = key, value

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, **_: Any
    ) -> Tensor:
        query = attn.to_q(hidden_states)
        key, value = attn.to_k(encoder_hidden_states), attn.to_v(encoder_hidden_states)
        out = image_attention(query, key, value, attn.heads)  # Attn(Q, K, V) of the text
        out = add(out, image_attention(query, self.key, self.value, attn.heads), None)
        return attn.to_out[0](out)


def _loaded(model: nn.Module, state: dict[str, Tensor]) -> Any:
    model.load_state_dict({key: tensor.float() for key, tensor in state.items()})
    return model.eval().requires_grad_(False)


def _part(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}


class Pipeline:
    """Text encoder, image encoder, UNet, VAE and adapter of the stand-ins, in float32."""

    def __init__(self) -> None:
        import transformers as hf
        from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
        from diffusers.loaders import single_file_utils as single

        state = load_file(miniature.path("checkpoint"))
        unet: Any = UNet2DConditionModel(**_UNET)
        vae: Any = AutoencoderKL(**_VAE)
        converted = single.convert_ldm_unet_checkpoint(dict(state), dict(unet.config))
        self.unet = _loaded(unet, converted)
        self.vae = _loaded(vae, single.convert_ldm_vae_checkpoint(dict(state), dict(vae.config)))
        text = hf.CLIPTextModel(hf.CLIPTextConfig(**_TEXT))
        bare = "final_layer_norm.weight" in text.state_dict()  # transformers 5 has no text_model
        prefix = "cond_stage_model.transformer." + ("text_model." if bare else "")
        self.text = _loaded(text, _part(state, prefix))
        vision = hf.CLIPVisionModelWithProjection(hf.CLIPVisionConfig(**_VISION))
        self.vision = _loaded(vision, load_file(miniature.path("clip_vision")))
        self.adapter = checkpoint.load(miniature.path("adapter")).float()
        self.scheduler: Any = DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
        )

    def encode_text(self, text: str) -> Tensor:
        """``(1, 77, 768)``. Words become numbers by hash: the weights are random anyway, and the
        real vocabulary comes with ComfyUI."""
        words = [zlib.crc32(word.encode()) % _START for word in text.split()][: POSITIONS - 2]
        ids = [_START, *words, _END] + [_END] * (POSITIONS - 2 - len(words))
        return self.text(input_ids=torch.tensor([ids])).last_hidden_state

    def encode_image(self, picture: Image.Image) -> ImagePrompt:
        """The image prompt, with the zero image of a base adapter against it."""
        side = min(picture.size)
        square = picture.convert("RGB").resize((224, 224), box=(0, 0, side, side))
        pixels = torch.from_numpy(np.asarray(square, dtype=np.float32) / 255).movedim(-1, 0)
        mean, std = (torch.tensor(x)[:, None, None] for x in (_MEAN, _STD))
        images = torch.stack([(pixels - mean) / std, torch.zeros_like(pixels)])
        out = self.vision(pixel_values=images, output_hidden_states=True)
        embeds, hidden = out.image_embeds, out.hidden_states[-2]
        zero = ImageFeatures(torch.zeros_like(embeds[:1]), hidden[1:])
        return ImagePrompt(ImageFeatures(embeds[:1], hidden[:1]), zero, "CLIP ViT-L/14")

    def install(self, prompt: ImagePrompt, weight: float) -> None:
        """Lay the prompt, times λ, over the UNet's cross-attention layers."""
        positive, negative = tokens(self.adapter, prompt, "concat")
        rows = torch.cat([negative, positive])  # as the latents: without, with guidance
        spec = self.adapter.spec
        packed = fold(self.adapter.keys_values(rows), layer_weights(spec, weight, None))
        layers = iter(unpack(packed, spec.layer_dims))
        plain = self.unet.attn_processors
        ours = {n: DecoupledAttention(*next(layers)) for n in plain if ".attn2." in n}
        self.unet.set_attn_processor({**plain, **ours})

    def sample(self, ask: Ask, on_step: Callable[[int], None]) -> Image.Image:
        """One picture with whatever prompt is installed."""
        context = torch.cat([self.encode_text(ask.negative), self.encode_text(ask.prompt)])
        generator = torch.Generator().manual_seed(ask.seed)
        latent = torch.randn(1, 4, ask.size // 8, ask.size // 8, generator=generator)
        self.scheduler.set_timesteps(ask.steps)
        for i, t in enumerate(self.scheduler.timesteps):
            both = self.unet(latent.repeat(2, 1, 1, 1), t, encoder_hidden_states=context).sample
            plain, guided = both.chunk(2)
            noise = plain + ask.guidance * (guided - plain)
            latent = self.scheduler.step(noise, t, latent).prev_sample
            on_step(i + 1)
        pixels = self.vae.decode(latent / 0.18215).sample[0].movedim(0, -1)
        return Image.fromarray(((pixels / 2 + 0.5).clamp(0, 1) * 255).byte().numpy())


@torch.inference_mode()
def pictures(ask: Ask, on_step: Callable[..., None]) -> list[tuple[float, Image.Image]]:
    """The sheet's pictures, λ and picture each; ``on_step(λ, step, steps=)`` after each step."""
    pipeline = Pipeline()
    prompt = pipeline.encode_image(ask.reference)
    plain = dict(pipeline.unet.attn_processors)
    made = []
    for weight in ask.weights:
        pipeline.unet.set_attn_processor(dict(plain))
        if weight:
            pipeline.install(prompt, weight)
        step = partial(on_step, weight, steps=ask.steps)
        made.append((weight, pipeline.sample(ask, step)))
    return made
