r"""Measure adapters as the paper's Table 1 does (every option: `evaluate.py --help`).

    accelerate launch training/evaluate.py \
        --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 \
        --image_encoder_path open_clip:ViT-H-14/laion2b_s32b_b79k --eval_data_dir coco \
        --ip_adapter_path run/ip-adapter.safetensors ip-adapter_sd15.bin --output_dir scores

The same command goes on where the last one stopped, with more images, scales or adapters too; what
is measured is not sampled again. Every process of the launch takes its part; on several machines
`--output_dir` must be one folder that all see. A quick look at 50 images, without text:
`--max_samples 50 --scale`.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

if __name__ == "__main__":  # as a script: what is imported lies beside this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from accelerate import PartialState
from tqdm import tqdm

from training import fingerprints
from training.checkpoints import make_writable
from training.config import ModelConfig, check_at_least, check_encoder, parse
from training.data.buckets import check_multiple
from training.data.image import BrokenImageError, open_image
from training.distributed import begin, script
from training.errors import TrainingError
from training.evaluation import adapters, coco, report, scores
from training.evaluation.clip_score import Clip, clip_i, clip_t, load_clip
from training.evaluation.scores import IMAGE_ONLY, WITH_TEXT, Condition, Key, Score
from training.models.base import Base, load_base
from training.models.image_encoder import ImageEncoder
from training.sampling import Prompts, Sampler, SamplingOptions, encode_images, encode_text
from training.unet import attach

WAIT = 2.0  # seconds between looks at what the other processes have done
logger = logging.getLogger("training")


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig(ModelConfig):
    """Measure IP-Adapters (arXiv 2308.06721, section 4.2). Defaults are the paper's."""

    ip_adapter_path: Sequence[str]
    """Adapter files, published or one's own; all for this model and encoder."""
    eval_data_dir: str
    """Folder with val2017/ and annotations/captions_val2017.json, or with captions of its own."""
    output_dir: str = "output/evaluation"
    """Folder for scores and tables. If it holds scores with the same options, that goes on."""
    clip_model: str = "openai/clip-vit-large-patch14"
    """CLIP model that scores: the paper's ViT-L/14. `open_clip:MODEL/WEIGHTS` too."""
    scale: Sequence[float] = (0.25, 0.5, 0.75, 1.0)
    """λ beside the caption, for the curves; none measures the image alone."""
    num_images_per_prompt: int = 4
    """Images sampled of each reference, λ and prompt: the paper's."""
    max_samples: int | None = None
    """Only the first so many references, for a quick look; default: all."""
    num_inference_steps: int = 50
    """DDIM steps: the paper's."""
    guidance_scale: float = 7.5
    """The paper's."""
    negative_prompt: str = ""
    """Text that guidance moves away from; none in the paper's protocol."""
    resolution: int | None = None
    """Pixels of both sides; default: what the model was trained at."""
    batch_size: int = 8
    """Images sampled at once; more is faster on a large GPU."""
    seed: int = 0
    """Of the starting noise, the same for every adapter and λ."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float16"
    """Of model and image encoder; scores are computed in float32. A CPU wants float32."""

    def __post_init__(self) -> None:
        counts = ("num_images_per_prompt", "num_inference_steps", "batch_size", "max_samples")
        check_at_least(self, **dict.fromkeys(counts, 1))
        check_encoder(self, False, "evaluate.py")
        if not self.ip_adapter_path:
            raise TrainingError("No adapter is given: name at least one with --ip_adapter_path.")
        if self.resolution is not None:
            check_multiple("resolution", self.resolution)

    @property
    def sampling(self) -> SamplingOptions:
        """How images are sampled."""
        size = None if self.resolution is None else (self.resolution, self.resolution)
        return SamplingOptions(
            *(self.num_inference_steps, self.guidance_scale, size),
            *(self.negative_prompt, self.batch_size),
        )


class Evaluation:
    """Everything loaded and seen to fit; then `run`.

    Raises TrainingError before anything is drawn if something is missing or does not fit.
    """

    def __init__(self, config: EvaluationConfig, state: PartialState) -> None:
        self.config, self.state = config, state
        self.folder = Path(config.output_dir)
        # From what fails at once to what takes minutes.
        self.rows = coco.read(config.eval_data_dir)
        self.numbers = range(len(self.rows))[: config.max_samples]
        coco.check_present(self.rows, self.numbers)
        make_writable(self.folder)
        self.adapters = adapters.load(config.ip_adapter_path)
        self.clip: Clip = load_clip(config.clip_model, state.device)
        dtype = getattr(torch, config.dtype)
        self.encoder = ImageEncoder.from_name(str(config.image_encoder_path), dtype)
        self.base: Base = load_base(
            config.pretrained_model_name_or_path, dtype, config.pretrained_vae_model_name_or_path
        )
        for subject, adapter in self.adapters:
            adapters.check_fits(adapter, subject.name, self.base.unet, self.encoder)
        attach(self.base.unet)
        unet: Any = self.base.unet
        frozen = (self.encoder, unet, self.base.vae, *(text.encoder for text in self.base.text))
        for part in (*frozen, *(adapter for _, adapter in self.adapters)):
            part.to(state.device)
        self.sampler = Sampler(self.base, config.sampling)
        chosen = (
            *("num_images_per_prompt", "num_inference_steps", "guidance_scale"),
            *("negative_prompt", "seed", "dtype"),
        )
        weights = fingerprints.of_weights(unet), dict(self.base.weights)
        self.protocol = {  # what all scores of one table must have in common
            **{name: getattr(config, name) for name in (*scores.NAMES, *chosen)},
            "size": list(self.sampler.size),
            "data": coco.fingerprint(self.rows),
            "base_weights": fingerprints.of_settings(*weights),
            "image_encoder_weights": self.encoder.weights,
            "clip_weights": self.clip.fingerprint(),
        }
        scores.claim(self.folder, self.protocol)
        self.samples = range(config.num_images_per_prompt)
        subjects = (subject for subject, _ in self.adapters)
        self.conditions = [x for s in subjects for x in report.conditions(s.digest, config.scale)]

    def blocks(self, found: scores.Found) -> list[range]:
        """Rows that are drawn together, those that are not done.

        They are the same whatever the number of processes and whatever was done before, and are
        drawn whole: arithmetic on a batch depends in its last bits on what else is in it.
        """
        size = max(1, self.config.batch_size // len(self.samples))
        blocks = [self.numbers[start : start + size] for start in self.numbers[::size]]
        return [block for block in blocks if any(self._lacking(block, found))]

    def _lacking(self, block: range, found: scores.Found) -> Iterator[Condition]:
        """Conditions that the block is not measured under."""
        for condition in self.conditions:
            keys = (Key(condition, row, sample) for row in block for sample in self.samples)
            if any(key not in found.scores for key in keys if key.row not in found.broken):
                yield condition

    def run(self) -> dict[str, Any] | None:
        """Draw and score what is lacking; the main process writes and returns the results."""
        state = self.state
        found = scores.read(self.folder)
        state.wait_for_everyone()  # all have read, so all divide the same work
        # From here on nobody waits in a group; one that lives until its process ends can abort it.
        state.destroy_process_group()
        blocks = self.blocks(found)[state.process_index :: state.num_processes]
        writer = scores.Writer(self.folder, state.process_index)
        for block in tqdm(blocks, "blocks", disable=not state.is_main_process):
            self._measure(block, [*self._lacking(block, found)], writer)
        if not state.is_main_process:
            return None
        # Others may be slower by hours, which no process group's timeout allows for. If one ends
        # with an error, the launcher ends this one too.
        while self.blocks(found := scores.read(self.folder)):
            time.sleep(WAIT)
        names = {row: self.rows[row].name for row in self.numbers}
        subjects = [subject for subject, _ in self.adapters]
        scale = self.config.scale
        out = report.results(self.protocol, subjects, scale, self.numbers, names, found)
        report.write(out, self.folder)
        return out

    def _measure(
        self, block: range, conditions: Sequence[Condition], writer: scores.Writer
    ) -> None:
        """All samples of a block under some conditions."""
        rows, images = [], []
        for row in block:
            try:
                images.append(open_image(self.rows[row].image))
                rows.append(row)
            except BrokenImageError as error:
                logger.warning("'%s' is left out: %s", self.rows[row].name, error)
                writer.broken(row, str(error))
        if not rows:
            return
        texts = [self.rows[row].text for row in rows]
        references, told = self.clip.images(images), self.clip.texts(texts)
        keep = [(place, sample) for place in range(len(rows)) for sample in self.samples]
        places = [place for place, _ in keep]
        seeds = [self.config.seed + rows[p] * len(self.samples) + s for p, s in keep]
        by_digest = {subject.digest: adapter for subject, adapter in self.adapters}
        kinds = {adapter.spec.features for adapter in by_digest.values()}
        features = {kind: encode_images(self.encoder, images, kind) for kind in kinds}
        written = {IMAGE_ONLY: [""] * len(rows), WITH_TEXT: texts}
        states = {prompt: encode_text(self.base, text) for prompt, text in written.items()}
        for condition in conditions:
            adapter = by_digest[condition.adapter]
            positive, zero = features[adapter.spec.features]
            asked = Prompts(
                text=states[condition.prompt][places],
                features=positive[places],
                zero=zero,
                weights=[condition.weight] * len(keep),
                seeds=seeds,
            )
            drawn = self.clip.images(self.sampler.draw(adapter, asked))
            like, true = clip_i(drawn, references[places]), clip_t(drawn, told[places])
            writer.scores(
                (Key(condition, rows[place], sample), Score(*pair))
                for (place, sample), *pair in zip(keep, like.tolist(), true.tolist(), strict=True)
            )


def evaluate(config: EvaluationConfig) -> dict[str, Any] | None:
    """Measure and write; return the results on the main process, None on the others.

    Of several processes it ends the group, so that a launch of several measures once. Raises
    TrainingError for what a user can mend, NotFinite among it.
    """
    return Evaluation(config, begin()).run()


def main() -> None:
    """Run the command line."""
    with script("evaluate.py"):
        config = parse(EvaluationConfig, "evaluate.py")
        results = evaluate(config)
    if results is not None:
        logger.info("\n%s\nWritten to '%s'.", report.table(results), config.output_dir)


if __name__ == "__main__":
    main()
