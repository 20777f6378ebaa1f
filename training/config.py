"""Options of train.py and cache.py, in sections; each has its default and the reason for it.

Names are those of diffusers' and accelerate's example scripts where they have one, and the
reference scripts' (tencent-ailab/IP-Adapter, tutorial_train.py) else.
"""

from __future__ import annotations

import typing
from collections.abc import Sequence
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from typing import Any, Literal, TypeVar

from docstring_parser import parse_from_object
from jsonargparse import ArgumentParser

from .data.buckets import check_multiple
from .data.randomness import check_drop_rates
from .errors import TrainingError

Config = TypeVar("Config")
Variant = Literal["base", "plus", "full", "faceid"]
"""What is trained of `ip_adapter_core.variants.Variant`."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Frozen models."""

    pretrained_model_name_or_path: str
    """Diffusion model that stays frozen: a diffusers folder, a hub id, or a checkpoint file."""
    pretrained_vae_model_name_or_path: str | None = None
    """Another VAE than the model's own, such as `madebyollin/sdxl-vae-fp16-fix`."""
    image_encoder_path: str | None = None
    """`open_clip:ViT-H-14/laion2b_s32b_b79k` as in the paper, any other `open_clip:MODEL/WEIGHTS`
    or `open_clip:MODEL@FILE`, or a transformers CLIP vision model (folder or hub id); of all
    variants but faceid."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Data."""

    train_data_dir: str | None = None
    """Images and captions: a folder, the reference's JSON, a `datasets` folder, or WebDataset
    shards (`shards/{000..099}.tar`, for train.py only)."""
    data_root_path: str | None = None
    """Folder that file names in a JSON are relative to; default: the JSON's own."""
    caption_column: str | None = None
    """Column of the captions; default: `text`, `caption` or `prompt`, whichever is there. Of a list
    of captions each sample is given one, drawn anew."""
    default_caption: str | None = None
    """Caption of images that have none; an empty one trains these without text."""
    resolution: int = 512
    """Pixels of the shortest side, center-cropped, a multiple of 8: the paper's. SDXL ends with
    1024. (A cache has its own.)"""
    enable_bucket: bool = False
    """Keep aspect ratios: buckets of about resolution² pixels, sides multiples of 64."""
    validation_split_column: str | None = None
    """Column that keeps rows from training: true, or one of the texts validation, val, test,
    held_out; all else is trained on. Their loss is measured at each of validation_steps. (To
    cache.py too.)"""
    balance_column: str | None = None
    """Column whose values (a class, a hand) are to be seen equally often: each sample's row is
    drawn, with replacement, with probability 1 / (values × rows of its value). An empty cell is a
    value too. (To cache.py too.)"""
    dataloader_num_workers: int = 4
    """Processes that read images, for each process of the launch."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns that say which rows are trained on, and how often."""
        given = filter(None, (self.validation_split_column, self.balance_column))
        return tuple(dict.fromkeys(given))

    def __post_init__(self) -> None:
        check_multiple("resolution", self.resolution)
        check_at_least(self, dataloader_num_workers=0)


@dataclass(frozen=True, kw_only=True)
class FaceConfig(DataConfig):
    """Faces, which FaceID reads in place of an image encoder's features."""

    face_encoder: str | None = None
    """Folder of insightface's model pack (buffalo_l), read by onnxruntime: each picture's largest
    face is embedded. A picture without a face is left out, as one that cannot be read."""
    face_embedding_column: str | None = None
    """Column with each row's face embedding instead: 512 numbers, or the name of a .npy file with
    them; in shards a file `*.NAME.npy` of the sample, or the key of its .json. A row without one is
    left out. face_encoder then reads the validation's pictures alone."""


@dataclass(frozen=True, kw_only=True)
class FeatureCacheConfig:
    """Cached data."""

    feature_cache_dir: str | None = None
    """Folder that training/cache.py wrote for these models, in place of train_data_dir: about twice
    as fast. Images have the sizes that it has."""


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """Adapter."""

    variant: Variant = "base"
    """base: 4 tokens from the embedding; plus (fine-grained): 16 from a resampler; full: one a
    patch; faceid: 4 from the embedding of a face, with a LoRA of rank 128 on all attention."""
    resampler_dim: int | None = None
    """Width of the plus variant's resampler, a multiple of 64; default: 768 for SD1.5, 1280 for
    SDXL, the published adapters'. This pack reads any size off the file; other loaders take the
    published one."""
    resampler_depth: int = 4
    """Layers of that network: the published adapters'."""
    pretrained_ip_adapter_path: str | None = None
    """Adapter to start from (the next stage, a fine-tune) instead of from scratch."""


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Loss."""

    i_drop_rate: float = 0.05
    """Share of samples without the image: guidance needs them (paper, section 4.1.2)."""
    t_drop_rate: float = 0.05
    """Share of samples without the text: image-only prompts need them."""
    ti_drop_rate: float = 0.05
    """Share of samples without either."""
    prediction_type: Literal["auto", "epsilon", "v_prediction"] = "auto"
    """What the model predicts; auto reads its own configuration."""
    snr_gamma: float | None = None
    """Min-SNR weighting (arXiv 2303.09556), usually 5; off as in the paper."""
    debiased_estimation_loss: bool = False
    """Weight the loss by 1/√SNR (arXiv 2310.08442), so that what is decided in strong noise, color
    and composition, is learnt sooner; off as in the paper."""
    noise_offset: float = 0.0
    """Offset of each channel's mean, usually 0.05 for darker darks; off as in the paper."""
    zero_terminal_snr: bool = False
    """Rescale the noise schedule to end in pure noise (arXiv 2305.08891); for v_prediction models
    trained so."""


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Optimizer."""

    max_train_steps: int = 1_000_000
    """Optimizer steps: the paper's. A small set shows its reference after some thousands."""
    train_batch_size: int = 8
    """Samples a process and forward pass: the paper's, on 8 devices."""
    gradient_accumulation_steps: int = 1
    """Forward passes an optimizer step; 8 on one device make the paper's batch of 64."""
    learning_rate: float = 1e-4
    """The paper's; 1e-5 for SDXL's stage at 1024 pixels."""
    lr_scheduler: Literal["constant", "constant_with_warmup", "cosine", "linear", "polynomial"] = (
        "constant"
    )
    """How the learning rate goes on: constant as in the paper."""
    lr_warmup_steps: int = 0
    """Steps of linear warm-up; give an lr_scheduler constant_with_warmup or one that decays."""
    adam_weight_decay: float = 0.01
    """The paper's, on matrices only: decaying norms and biases helps nothing."""
    use_8bit_adam: bool = False
    """AdamW of bitsandbytes: saves 6 of 8 bytes a trained parameter; it needs a GPU."""
    max_grad_norm: float | None = None
    """Largest gradient norm, usually 1; off as in the paper."""
    use_ema: bool = False
    """Average the weights; the average is what is saved as the adapter and sampled from."""
    ema_decay: float = 0.9999
    """Decay of that average, for long runs."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Run."""

    output_dir: str
    """Folder for checkpoints, samples and logs. If it holds a run with these options, that is
    resumed."""
    resume_from_checkpoint: Literal["latest"] = "latest"
    """A run always resumes from the last checkpoint in output_dir; start another in another one."""
    mixed_precision: Literal["no", "fp16", "bf16"] | None = None
    """Of the frozen models and the arithmetic; the adapter's weights stay float32. Default: what
    `accelerate config` or `accelerate launch --mixed_precision` says."""
    gradient_checkpointing: bool = False
    """Compute the UNet's activations twice instead of keeping them: less memory, 30 % slower."""
    torch_compile: bool = False
    """torch.compile the UNet: minutes at the start, faster steps after."""
    seed: int = 0
    """All randomness is a function of this and a sample's number."""
    checkpointing_steps: int = 2000
    """Steps between checkpoints: what a crash can cost."""
    checkpoints_total_limit: int = 3
    """Checkpoints to keep; older ones are deleted."""
    logging_steps: int = 50
    """Steps between logged means: a number read from a GPU waits for it."""
    report_to: str = "tensorboard"
    """Any tracker of accelerate: tensorboard, wandb, comet_ml, aim, mlflow, … or none.
    metrics.jsonl and report.html are written with any."""


@dataclass(frozen=True, kw_only=True)
class ValidationConfig:
    """Validation."""

    validation_steps: int = 0
    """Steps between contact sheets of validation_image, with CLIP-I and CLIP-T, and between
    measurements of the loss of validation_split_column's rows, the first before training; 0: none.
    Loss says little: look at the sheets."""
    validation_image: Sequence[str] = ()
    """References of the sheets, best ones that are not in the training set."""
    validation_prompt: Sequence[str] = ("", "best quality, high quality")
    """Texts; the empty one is image-only."""
    validation_scale: Sequence[float] = (0.0, 0.5, 1.0)
    """λ, one column each; 0 is the model without the adapter (with faceid's LoRA, which λ leaves
    at 1, as other loaders do)."""
    validation_num_inference_steps: int = 50
    """DDIM steps: the paper's."""
    validation_guidance_scale: float = 7.5
    """The paper's."""
    validation_clip_model: str | None = None
    """CLIP model that scores the samples (`openai/clip-vit-large-patch14` as in the paper, or
    `open_clip:MODEL/WEIGHTS`); none: no scores."""

    @property
    def draws_sheets(self) -> bool:
        """Whether contact sheets are drawn."""
        return bool(self.validation_steps and self.validation_image)


@dataclass(frozen=True, kw_only=True)
class TrainConfig(
    ValidationConfig,
    RunConfig,
    OptimizerConfig,
    LossConfig,
    AdapterConfig,
    FeatureCacheConfig,
    FaceConfig,
    ModelConfig,
):
    """Train an IP-Adapter (arXiv 2308.06721). Defaults are the paper's where it names them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.train_data_dir and not self.feature_cache_dir:
            raise TrainingError(
                "Neither train_data_dir nor feature_cache_dir is given: --train_data_dir FOLDER "
                "trains from images, --feature_cache_dir FOLDER from what training/cache.py made "
                "of them."
            )
        check_encoder(self, self.variant == "faceid", f"variant {self.variant}")
        if self.draws_sheets and self.variant == "faceid" and not self.face_encoder:
            raise TrainingError(
                "validation_steps is set, but nothing embeds the faces of validation_image: give "
                "--face_encoder FOLDER beside the column, or set validation_steps to 0."
            )
        at_least_one = (
            *("max_train_steps", "train_batch_size", "gradient_accumulation_steps"),
            *("checkpointing_steps", "checkpoints_total_limit", "logging_steps", "resampler_depth"),
        )
        check_at_least(self, **dict.fromkeys(at_least_one, 1))
        if self.resampler_dim is not None:
            check_multiple("resampler_dim", self.resampler_dim, of=64, why="the width of a head")
        check_drop_rates(self.i_drop_rate, self.t_drop_rate, self.ti_drop_rate)
        if self.validation_steps and not (self.validation_image or self.validation_split_column):
            raise TrainingError(
                "validation_steps is set, but there is no validation image: name some with "
                "--validation_image a.jpg b.jpg, or rows to hold out with "
                "--validation_split_column NAME, or set validation_steps to 0."
            )
        if self.lr_warmup_steps and self.lr_scheduler == "constant":
            raise TrainingError(
                f"lr_warmup_steps is {self.lr_warmup_steps}, but the lr_scheduler 'constant' has "
                "no warm-up: give --lr_scheduler constant_with_warmup, or leave lr_warmup_steps "
                "out."
            )

    def identity(self) -> dict[str, Any]:
        """Return the options that decide what a step computes: a resumed run must keep them."""
        free = FREE if self.lr_scheduler.startswith("constant") else FREE - {"max_train_steps"}
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in free}


def names(*sections: type) -> set[str]:
    """Return the names of the options of some sections."""
    return {field.name for section in sections for field in fields(section)}  # type: ignore[arg-type]


# Options that may change when a run is resumed: they decide how long, how fast and how visibly, not
# what is learnt. Paths may move: what lies there is compared by its fingerprint, and so is the
# global batch.
FREE = names(ModelConfig, RunConfig, ValidationConfig) - {"seed", "mixed_precision"} | {
    *("train_data_dir", "data_root_path", "feature_cache_dir", "dataloader_num_workers"),
    *("pretrained_ip_adapter_path", "train_batch_size", "max_train_steps", "face_encoder"),
}


def check_encoder(config: Any, faces: bool, what: str) -> None:
    """Raise TrainingError unless the options name an encoder of what is read, and no other.

    `faces`: whether that is faces; `what`: the option that says so.
    """
    reads = (
        "faces, of --face_encoder FOLDER (insightface's buffalo_l) or --face_embedding_column NAME"
        if faces
        else "images, of --image_encoder_path such as open_clip:ViT-H-14/laion2b_s32b_b79k"
    )
    options = {"image_encoder_path": False, "face_encoder": True, "face_embedding_column": True}
    given = [name for name in options if getattr(config, name, None)]
    for name in given:
        if options[name] != faces:
            raise TrainingError(
                f"{what} reads {reads}, but {name} is '{getattr(config, name)}'. Leave it out, or "
                "choose what reads it: --variant, or --features of cache.py."
            )
    if not given:
        raise TrainingError(f"{what} reads {reads}, but none is given. Give one.")


def check_at_least(config: Any, **least: int) -> None:
    """Raise TrainingError if an option of `config` is given and below what `least` says."""
    for name, bound in least.items():
        value = getattr(config, name)
        if value is not None and value < bound:
            raise TrainingError(f"{name} is {value}; expected at least {bound}.")


def parse(config: type[Config], script: str, arguments: Sequence[str] | None = None) -> Config:
    """Read a config from `--config FILE.yaml` and the command line, which wins.

    Lists are given as `--name a b c`, switches as `--name` or `--name true`. Ends the program with
    a message that names the option if a value cannot be. The bases of the dataclass `config` are
    the sections of the help.
    """
    parser = ArgumentParser(prog=script, description=config.__doc__)
    parser.add_argument("--config", action="config", help="YAML file with any of these options.")
    types = typing.get_type_hints(config)
    added: set[str] = set()
    for section in filter(is_dataclass, reversed(config.__mro__)):
        group = parser.add_argument_group((section.__doc__ or "").rstrip("."))
        told = {param.arg_name: param.description for param in parse_from_object(section).params}
        for field in fields(section):
            if field.name not in added:
                added.add(field.name)
                group.add_argument(
                    f"--{field.name}", help=told[field.name], **_argument(field, types[field.name])
                )
    found = parser.parse_args(arguments).as_dict()
    found.pop("config", None)
    try:
        return config(**found)
    except ValueError as error:
        parser.error(str(error))
        raise  # never reached: error() ends the program


def _argument(field: Field[Any], kind: Any) -> dict[str, Any]:
    several = typing.get_origin(kind) is Sequence
    given: dict[str, Any] = {"type": kind}
    if kind is bool:
        given |= {"nargs": "?", "const": True}
    elif several:
        given |= {"type": typing.get_args(kind)[0], "nargs": "*"}
    if field.default is MISSING:
        return given | {"required": True}
    return given | {"default": list(field.default) if several else field.default}
