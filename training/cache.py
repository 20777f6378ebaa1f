r"""Cache what the frozen encoders give, so that training is about twice as fast.

    accelerate launch training/cache.py \
        --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 \
        --image_encoder_path open_clip:ViT-H-14/laion2b_s32b_b79k \
        --train_data_dir images --output_dir cache

Every process of the launch writes shards of its own; the same command again goes on where a killed
one stopped. A sample of SD1.5 takes 182 KiB with image_embeds (64 latents, 116 text, 2 image), 643
more with penultimate_hidden_states. Every option: `cache.py --help`.
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
from tqdm import tqdm

from ip_adapter_core.variants import FACE, FEATURE_KINDS, FeatureKind
from training.caching import writer as cache_writing
from training.caching.dataset import CachedDataset
from training.caching.format import ONE_CAPTION, SEVERAL_CAPTIONS, Manifest, write_columns
from training.config import FaceConfig, ModelConfig, check_at_least, check_encoder, parse
from training.data.columns import held_out_rows, read_column
from training.data.dataset import EveryCaption
from training.data.randomness import NoiseSettings
from training.data.webdataset import is_stream
from training.dataloader import open_rows
from training.distributed import begin, script
from training.errors import TrainingError
from training.models.base import load_encoders
from training.models.frozen import FrozenEncoders, reference_encoder

logger = logging.getLogger("training")

PATIENCE = timedelta(days=7)  # processes share the shards by number, not by how fast they are
NO_DRAWS = NoiseSettings(0, 0.0, 0.0, 0.0, 1, 0.0)  # what training draws, it draws anew


@dataclass(frozen=True, kw_only=True)
class CacheConfig(FaceConfig, ModelConfig):
    """Cache what VAE, text encoders and image encoder give."""

    output_dir: str
    """Folder for the cache."""
    features: Literal[FeatureKind, "both"] = "image_embeds"
    """image_embeds for the base variant, penultimate_hidden_states for plus and full, face_embeds
    for faceid."""
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    """Of the encoders. auto: float16 on a GPU, as finely as it is stored, float32 on a CPU."""
    cache_dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    """Of the files. bfloat16 is coarser, but nothing exceeds it."""
    rows_per_shard: int = 256
    """Rows a file: 48 to 216 MB of SD1.5. It is what a kill can cost each process."""
    batch_size: int = 16
    """Images encoded at once. The last bit of the results may depend on it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.train_data_dir:
            raise TrainingError("No data is given: name its folder with --train_data_dir.")
        check_encoder(self, self.features == FACE, f"features {self.features}")
        check_at_least(self, rows_per_shard=1, batch_size=1)

    @property
    def kinds(self) -> tuple[FeatureKind, ...]:
        """The kinds of features to cache."""
        return FEATURE_KINDS if self.features == "both" else (self.features,)


def make(config: CacheConfig) -> CachedDataset:
    """Write what is missing of the cache; every process of a launch calls this. Returns it whole.

    Raises TrainingError for what a user can mend.
    """
    assert config.train_data_dir is not None  # as the config sees to
    if is_stream(config.train_data_dir):
        raise TrainingError(
            f"'{config.train_data_dir}' are WebDataset shards, whose samples have no numbers to go "
            "on at. Train from them without a cache, or unpack them into a folder of images."
        )
    state, out = begin(PATIENCE), Path(config.output_dir)
    claimed = cache_writing.claimed(out) if state.is_main_process else nullcontext()
    with claimed, _one_thread(state.device):
        with state.main_process_first():
            source, buckets = open_rows(config, out)
        columns = [read_column(config.train_data_dir, name) for name in config.columns]
        for column in columns:
            if column.name == config.validation_split_column:
                held_out_rows(column)  # tells now what training would tell
        encoders = _encoders(config, state.device)
        manifest = Manifest(
            rows=len(source),
            shard_rows=config.rows_per_shard,
            features=config.kinds,
            dtype=config.cache_dtype,
            sizes=buckets.sizes,
            parts={**encoders.fingerprints, "data": source.fingerprint},
            names={**encoders.names, "data": config.train_data_dir},
            format=SEVERAL_CAPTIONS if source.several_captions else ONE_CAPTION,
        )
        with state.main_process_first():
            if state.is_main_process:
                cache_writing.begin(out, manifest, encoders)
                if columns:
                    write_columns(out, columns)
        missing = cache_writing.missing_shards(out, manifest)
        state.wait_for_everyone()  # all have looked before anybody writes
        mine = missing[state.process_index :: state.num_processes]
        preprocess = encoders.image_encoder.preprocess
        dataset = EveryCaption(source, encoders.tokenise, preprocess, buckets, NO_DRAWS)
        several = f" (the first of {state.num_processes} processes)"
        bar = tqdm(
            total=sum(len(manifest.rows_of(shard)) for shard in mine),
            desc="caching" + (several if state.num_processes > 1 else ""),
            disable=not state.is_local_main_process,
            unit="row",
        )
        with bar:
            size, workers = config.batch_size, config.dataloader_num_workers
            cache_writing.write_shards(dataset, encoders, out, manifest, mine, size, workers, bar)
        state.wait_for_everyone()
    return CachedDataset(out, config.kinds[0], NO_DRAWS)


@contextmanager
def _one_thread(device: torch.device) -> Iterator[None]:
    """Use one thread on a CPU: sums depend on their number, and so would the bytes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if device.type == "cpu" else threads)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _encoders(config: CacheConfig, device: torch.device) -> FrozenEncoders:
    auto = "float32" if device.type == "cpu" else "float16"
    dtype = getattr(torch, auto if config.dtype == "auto" else config.dtype)
    return FrozenEncoders(
        load_encoders(
            config.pretrained_model_name_or_path, dtype, config.pretrained_vae_model_name_or_path
        ),
        reference_encoder(config, dtype),
        config.kinds[0],
        device,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    config = parse(CacheConfig, "cache.py", arguments)
    with script("cache.py", PATIENCE) as state:
        dataset = make(config)
        size = sum(path.stat().st_size for path in Path(config.output_dir).glob("*.safetensors"))
        logger.info("%d rows, %.1f MiB, in '%s'", len(dataset), size / 2**20, config.output_dir)
        if dataset.broken and state.is_main_process:
            logger.warning(
                "%d images could not be read, or show no face, and are left out: %s%s",
                len(dataset.broken),
                "; ".join(dataset.broken[:5]),
                "; …" if len(dataset.broken) > 5 else "",
            )
        state.destroy_process_group()


if __name__ == "__main__":
    main()
