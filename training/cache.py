"""Cache what the frozen encoders give, so that training is about twice as fast. The commands:

    accelerate launch training/cache.py --base stable-diffusion-v1-5/stable-diffusion-v1-5 \\
        --image_encoder open_clip:ViT-H-14/laion2b_s32b_b79k --data pictures --out cache
    accelerate launch training/train.py --base … --image_encoder … --cache cache --out run

Every process of the launch writes shards of its own; the same command again goes on where a killed
one stopped. A sample of SD1.5 takes 182 KiB with image_embeds (64 latents, 116 text, 2 image), 643
more with penultimate_hidden_states. Every setting: `cache.py --help`.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Literal

if __name__ == "__main__":  # as a script: what is imported lies beside this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from accelerate import PartialState
from jsonargparse import ArgumentParser, set_parsing_settings
from tqdm import tqdm

from ip_adapter_core.variants import FEATURE_KINDS, FeatureKind
from training.caching import writer as cache_writing
from training.caching.dataset import CachedDataset
from training.caching.format import Manifest
from training.data.buckets import LATENT_STEP, by_aspect, square
from training.data.dataset import RawDataset
from training.data.randomness import NoiseSettings
from training.data.sources import Columns, open_source
from training.data.webdataset import is_stream
from training.errors import TrainingError
from training.launch import begin
from training.models.base import load_encoders
from training.models.frozen import FrozenEncoders, ImageEncoder

set_parsing_settings(docstring_parse_attribute_docstrings=True)
logger = logging.getLogger("training")

PATIENCE = timedelta(days=7)  # processes share the shards by number, not by how fast they are
NO_DRAWS = NoiseSettings(0, 0.0, 0.0, 0.0, 1, 0.0)  # what training draws, it draws anew


@dataclass(frozen=True)
class CacheSettings:
    """Cache what VAE, text encoders and image encoder give."""

    base: str
    """Diffusion model: a diffusers folder, a hub id, or a checkpoint file. Its UNet is not read."""
    image_encoder: str
    """`open_clip:MODEL/WEIGHTS`, `open_clip:MODEL@FILE`, or a transformers CLIP vision model."""
    data: str
    """Pictures and captions: a folder, the reference's JSON, or a `datasets` folder."""
    out: str
    """Folder for the cache."""
    vae: str | None = None
    """Another VAE than the base's own, such as `madebyollin/sdxl-vae-fp16-fix`."""
    image_root: str | None = None
    """Folder that file names in a JSON are relative to; default: the JSON's own."""
    caption_column: str | None = None
    """Column of the captions; default: `text`, `caption` or `prompt`, whichever is there."""
    default_caption: str | None = None
    """Caption of pictures that have none; an empty one trains without text."""

    size: int = 512
    """Pixels of the shortest side, centre-cropped, a multiple of 8: the paper's. SDXL ends with
    1024."""
    buckets: bool = False
    """Keep aspect ratios: buckets of about size², sides multiples of 64."""
    features: Literal[FeatureKind, "both"] = "image_embeds"
    """image_embeds for the base variant, penultimate_hidden_states for plus and full."""

    precision: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    """Of the encoders. auto: float16 on a GPU, as finely as it is stored, float32 on a CPU."""
    stored: Literal["float16", "bfloat16", "float32"] = "float16"
    """Of the files. bfloat16 is coarser, but nothing exceeds it."""
    shard_rows: int = 256
    """Rows a file: 48 to 216 MB of SD1.5. It is what a kill can cost each process."""
    batch_size: int = 16
    """Pictures encoded at once. The last bit of the results may depend on it."""
    workers: int = 4
    """Processes that read pictures, for each process of the launch."""

    def __post_init__(self) -> None:
        for name, least in (("shard_rows", 1), ("batch_size", 1), ("workers", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least {least}.")
        if self.size < 1 or self.size % LATENT_STEP:
            raise ValueError(
                f"size is {self.size}; expected a multiple of {LATENT_STEP}, the pixels of one "
                "latent."
            )

    @property
    def kinds(self) -> tuple[FeatureKind, ...]:
        return FEATURE_KINDS if self.features == "both" else (self.features,)


def parse(arguments: Sequence[str] | None = None) -> CacheSettings:
    """Settings from `--config FILE.yaml` and the command line, which wins."""
    parser = ArgumentParser(prog="cache.py", description=CacheSettings.__doc__)
    parser.add_argument("--config", action="config", help="YAML file of any of these settings.")
    parser.add_class_arguments(CacheSettings)
    found = parser.parse_args(arguments).as_dict()
    found.pop("config", None)
    try:
        return CacheSettings(**found)
    except ValueError as error:
        parser.error(str(error))
        raise  # never reached: error() ends the program


def make(settings: CacheSettings) -> CachedDataset:
    """Write what is missing of the cache; every process of a launch calls this. Returns it whole.

    Raises TrainingError for what a user can mend.
    """
    if is_stream(settings.data):
        raise TrainingError(
            f"'{settings.data}' are WebDataset shards, whose samples have no numbers to go on at. "
            "Train from them without a cache, or unpack them into a folder of pictures."
        )
    state, out = begin(PATIENCE), Path(settings.out)
    claimed = cache_writing.claimed(out) if state.is_main_process else nullcontext()
    with claimed, _one_thread(state.device):
        with state.main_process_first():
            source = open_source(
                settings.data,
                image_root=settings.image_root,
                columns=Columns(text=settings.caption_column),
                default_caption=settings.default_caption,
            )
            size = settings.size
            buckets = by_aspect(source, size, out) if settings.buckets else square(size)
        encoders = _encoders(settings, state.device)
        manifest = Manifest(
            rows=len(source),
            shard_rows=settings.shard_rows,
            features=settings.kinds,
            dtype=settings.stored,
            sizes=buckets.sizes,
            parts={**encoders.fingerprints, "data": source.fingerprint},
            names={**encoders.names, "data": settings.data},
        )
        with state.main_process_first():
            if state.is_main_process:
                cache_writing.begin(out, manifest, encoders)
        missing = cache_writing.missing_shards(out, manifest)
        state.wait_for_everyone()  # all have looked before anybody writes
        mine = missing[state.process_index :: state.num_processes]
        preprocess = encoders.image_encoder.preprocess
        dataset = RawDataset(source, encoders.tokenise, preprocess, buckets, NO_DRAWS)
        reading = cache_writing.Reading(settings.batch_size, settings.workers)
        with _bar(state, sum(len(manifest.rows_of(shard)) for shard in mine)) as bar:
            cache_writing.write_shards(dataset, encoders, out, manifest, mine, reading, bar)
        state.wait_for_everyone()
    return CachedDataset(out, settings.kinds[0], NO_DRAWS)


def _bar(state: PartialState, rows: int) -> tqdm:
    note = "caching"
    if state.num_processes > 1:
        note += f" (the first of {state.num_processes} processes)"
    return tqdm(total=rows, desc=note, disable=not state.is_local_main_process, unit="row")


@contextmanager
def _one_thread(device: torch.device) -> Iterator[None]:
    """On a CPU, sums depend on the number of threads, and so would the bytes. Processes use the
    cores."""
    threads = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _encoders(settings: CacheSettings, device: torch.device) -> FrozenEncoders:
    precision = settings.precision
    if precision == "auto":
        precision = "float32" if device.type == "cpu" else "float16"
    dtype = getattr(torch, precision)
    return FrozenEncoders(
        load_encoders(settings.base, dtype, settings.vae),
        ImageEncoder.from_name(settings.image_encoder, dtype),
        settings.kinds[0],
        device,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    settings = parse(arguments)
    try:
        state = begin(PATIENCE)
    except TrainingError as error:
        sys.exit(f"cache.py: {error}")
    main_process = state.is_main_process
    level = logging.INFO if main_process else logging.WARNING
    logging.basicConfig(format="%(message)s", level=level)
    try:
        dataset = make(settings)
    except TrainingError as error:
        sys.exit(f"cache.py: {error}")
    if main_process:
        _report(settings, dataset)
    state.destroy_process_group()


def _report(settings: CacheSettings, dataset: CachedDataset) -> None:
    size = sum(path.stat().st_size for path in Path(settings.out).glob("*.safetensors"))
    logger.info("%d rows, %.1f MiB, in '%s'", len(dataset), size / 2**20, settings.out)
    if dataset.broken:
        logger.warning(
            "%d pictures could not be read and are left out: %s%s",
            len(dataset.broken),
            "; ".join(dataset.broken[:5]),
            "; …" if len(dataset.broken) > 5 else "",
        )


if __name__ == "__main__":
    main()
