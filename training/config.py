"""Every setting of a training run, its default and the reason for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

from jsonargparse import ArgumentParser, set_parsing_settings

from ip_adapter_core.variants import Variant

from .data.buckets import LATENT_STEP

set_parsing_settings(docstring_parse_attribute_docstrings=True)


@dataclass(frozen=True)
class Settings:
    """Train an IP-Adapter (arXiv 2308.06721). Defaults are the paper's where it names them."""

    base: str
    """Diffusion model that stays frozen: a diffusers folder, a hub id, or a checkpoint file."""
    image_encoder: str
    """`open_clip:ViT-H-14/laion2b_s32b_b79k` as in the paper, any other `open_clip:MODEL/WEIGHTS`,
    or a transformers CLIP vision model (folder or hub id)."""
    out: str
    """Folder for checkpoints, samples and logs. If it holds a run of these settings, that goes
    on."""
    vae: str | None = None
    """Another VAE than the base's own, such as `madebyollin/sdxl-vae-fp16-fix`."""
    data: str | None = None
    """Pictures and captions: a folder, the reference's JSON, a `datasets` folder, or WebDataset
    shards (`shards/{000..099}.tar`). Not needed with `cache`."""
    image_root: str | None = None
    """Folder that file names in a JSON are relative to; default: the JSON's own."""
    caption_column: str | None = None
    """Column of the captions; default: `text`, `caption` or `prompt`, whichever is there."""
    default_caption: str | None = None
    """Caption of pictures that have none; an empty one trains these without text."""
    cache: str | None = None
    """Folder that training/cache.py wrote for this base and encoder: about twice as fast. Pictures
    have the sizes that it has."""

    variant: Variant = "base"
    """base: 4 tokens from the embedding; plus: 16 from a resampler (fine-grained); full: one a
    patch."""
    resampler_dim: int | None = None
    """Width of the plus variant's resampler, a multiple of 64; default: 768 for SD1.5,
    1280 for SDXL, the published adapters'. This pack reads any size off the file; other loaders
    take the published one."""
    resampler_depth: int = 4
    """Layers of that network: the published adapters'."""
    adapter: str | None = None
    """Checkpoint to start from (the next stage, a fine-tune) instead of from scratch."""

    size: int = 512
    """Pixels of the shortest side, centre-cropped, a multiple of 8: the paper's. SDXL ends with
    1024. (A cache has its own.)"""
    buckets: bool = False
    """Keep aspect ratios: buckets of about size², sides multiples of 64."""
    drop_image: float = 0.05
    """Share of samples without the image: guidance needs them (paper, section 4.1.2)."""
    drop_text: float = 0.05
    """Share of samples without the text: image-only prompts need them."""
    drop_both: float = 0.05
    """Share of samples without either."""
    prediction: Literal["auto", "epsilon", "v_prediction"] = "auto"
    """What the base predicts; auto reads its own configuration."""
    min_snr_gamma: float | None = None
    """Min-SNR weighting (arXiv 2303.09556), usually 5; off as in the paper."""
    debiased_estimation: bool = False
    """Weight the loss by 1/√SNR (arXiv 2310.08442), so that what is decided in strong noise, colour
    and composition, is learnt sooner; off as in the paper."""
    noise_offset: float = 0.0
    """Offset of each channel's mean, usually 0.05 for darker darks; off as in the paper."""
    zero_terminal_snr: bool = False
    """Rescale the schedule to end in pure noise (arXiv 2305.08891); for v_prediction bases
    trained so."""

    steps: int = 1_000_000
    """Optimiser steps: the paper's. A small set shows its reference after some thousands."""
    batch_size: int = 8
    """Samples a process and forward pass: the paper's, on 8 devices."""
    accumulation: int = 1
    """Forward passes an optimiser step; 8 on one device make the paper's batch of 64."""
    learning_rate: float = 1e-4
    """The paper's; 1e-5 for SDXL's stage at 1024 pixels."""
    schedule: Literal["constant", "constant_with_warmup", "cosine", "linear", "polynomial"] = (
        "constant"
    )
    """How the learning rate goes on: constant as in the paper."""
    warmup_steps: int = 0
    """Steps of linear warm-up; give schedule constant_with_warmup or one that decays."""
    weight_decay: float = 0.01
    """The paper's, on matrices only: decaying norms and biases helps nothing."""
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    """adamw8bit (bitsandbytes) saves 6 of 8 bytes a trained parameter; it needs a GPU."""
    clip_norm: float | None = None
    """Largest gradient norm, usually 1; off as in the paper."""
    ema: float | None = None
    """Decay of an average of the weights, usually 0.9999 for long runs; it is what is saved as the
    adapter and sampled from."""

    precision: Literal["fp32", "fp16", "bf16"] | None = None
    """Of the frozen parts and the arithmetic; the adapter's weights stay float32. Default: what
    `accelerate config` or `accelerate launch --mixed_precision` says, fp32 for its "no"."""
    gradient_checkpointing: bool = False
    """Compute the UNet's activations twice instead of keeping them: less memory, 30 % slower."""
    compile: bool = False
    """torch.compile the UNet: minutes at the start, faster steps after."""
    seed: int = 0
    """All randomness is a function of this and a sample's number."""
    workers: int = 4
    """Processes that read pictures, for each training process."""

    save_every: int = 2000
    """Steps between checkpoints: what a crash can cost."""
    keep: int = 3
    """Checkpoints to keep; older ones are deleted."""

    validate_every: int = 0
    """Steps between contact sheets with CLIP-I and CLIP-T; 0: none. Loss says little: look at
    these."""
    validation_references: Sequence[str] = ()
    """Pictures, best ones that are not in the training set."""
    validation_prompts: Sequence[str] = ("", "best quality, high quality")
    """Texts; the empty one is image-only."""
    validation_weights: Sequence[float] = (0.0, 0.5, 1.0)
    """λ, one column each; 0 is the base without the adapter."""
    validation_steps: int = 50
    """DDIM steps: the paper's."""
    validation_guidance: float = 7.5
    """The paper's."""
    validation_clip: str | None = None
    """CLIP model that scores the samples (`openai/clip-vit-large-patch14` as in the paper, or
    `open_clip:MODEL/WEIGHTS`); none: no scores."""

    log_every: int = 50
    """Steps between logged means: a number read from a GPU waits for it."""
    log_with: str = "tensorboard"
    """Any tracker of accelerate: tensorboard, wandb, comet_ml, aim, mlflow, … or none."""

    def __post_init__(self) -> None:
        if not self.data and not self.cache:
            raise ValueError(
                "Neither data nor cache is given: --data FOLDER trains from pictures, "
                "--cache FOLDER from what training/cache.py made of them."
            )
        for name in POSITIVE:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 1.")
        if self.size % LATENT_STEP:
            raise ValueError(
                f"size is {self.size}; expected a multiple of {LATENT_STEP}, the pixels of one "
                "latent."
            )
        if self.resampler_dim is not None and (self.resampler_dim < 64 or self.resampler_dim % 64):
            raise ValueError(
                f"resampler_dim is {self.resampler_dim}; expected a multiple of 64, the width of "
                "a head."
            )
        drops = self.drop_image, self.drop_text, self.drop_both
        if min(drops) < 0 or sum(drops) > 1:
            raise ValueError(
                f"drop_image, drop_text and drop_both are {drops}; expected shares of the samples "
                "between 0 and 1 whose sum is at most 1."
            )
        if self.validate_every and not self.validation_references:
            raise ValueError(
                "validate_every is set, but there is no validation reference: name pictures with "
                "--validation_references '[a.jpg, b.jpg]', or set validate_every to 0."
            )
        if self.warmup_steps and self.schedule == "constant":
            raise ValueError(
                f"warmup_steps is {self.warmup_steps}, but the schedule 'constant' has no warm-up: "
                "give --schedule constant_with_warmup, or leave warmup_steps out."
            )

    def deciding(self) -> dict[str, Any]:
        """Those that decide what a step computes: a run that goes on must keep them."""
        free = FREE if self.schedule.startswith("constant") else FREE - {"steps"}
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in free}


POSITIVE = (
    *("size", "steps", "batch_size", "accumulation", "save_every", "keep", "log_every"),
    "resampler_depth",
)

# May change when a run goes on: they decide how long, how fast and how visibly, not what is learnt.
# Paths may move: what lies there is compared by its fingerprint, and so is the global batch.
FREE = {
    *("base", "vae", "image_encoder", "adapter", "out", "data", "image_root", "cache"),
    "batch_size",
    *("steps", "gradient_checkpointing", "compile", "workers", "save_every", "keep"),
    *("log_every", "log_with"),
    *(field.name for field in fields(Settings) if field.name.startswith("validat")),
}


def parse(arguments: Sequence[str] | None = None) -> Settings:
    """Settings from `--config FILE.yaml` and the command line, which wins.

    Ends the program with a message that names the setting if a value cannot be.
    """
    parser = ArgumentParser(prog="train.py", description=Settings.__doc__)
    parser.add_argument("--config", action="config", help="YAML file of any of these settings.")
    parser.add_class_arguments(Settings)
    found = parser.parse_args(arguments).as_dict()
    found.pop("config", None)
    try:
        return Settings(**found)
    except ValueError as error:
        parser.error(str(error))
        raise  # never reached: error() ends the program
