"""Every setting of an evaluation, its default and the reason for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from jsonargparse import ArgumentParser, set_parsing_settings

from ..sampling import SamplingSettings

set_parsing_settings(docstring_parse_attribute_docstrings=True)


@dataclass(frozen=True)
class EvaluationSettings:
    """Measure IP-Adapters (arXiv 2308.06721, section 4.2). Defaults are the paper's."""

    base: str
    """Diffusion model: a diffusers folder, a hub id, or a checkpoint file."""
    image_encoder: str
    """The one that the adapters were trained with, named as for train.py."""
    adapter: Sequence[str]
    """Adapter files, published or one's own; all for this base and encoder."""
    coco: str
    """Folder with val2017/ and annotations/captions_val2017.json, or with captions of its own."""
    out: str = "output/evaluation"
    """Folder for scores and tables. If it holds scores of the same settings, that goes on."""
    clip: str = "openai/clip-vit-large-patch14"
    """CLIP model that scores: the paper's ViT-L/14. `open_clip:MODEL/WEIGHTS` too."""
    weights: Sequence[float] = (0.25, 0.5, 0.75, 1.0)
    """λ beside the caption, for the curves; `[]` measures the image alone."""
    samples: int = 4
    """Pictures drawn of each reference, λ and prompt: the paper's."""
    limit: int | None = None
    """Only the first so many pictures, for a quick look; default: all."""
    steps: int = 50
    """DDIM steps: the paper's."""
    guidance: float = 7.5
    """The paper's."""
    negative: str = ""
    """Text that guidance moves away from; none in the paper's protocol."""
    size: int | None = None
    """Pixels of both sides; default: what the base was trained at."""
    batch: int = 8
    """Pictures drawn at once; more is faster on a large GPU."""
    seed: int = 0
    """Of the starting noise, the same for every adapter and λ."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float16"
    """Of base and image encoder; scores are computed in float32. A CPU wants float32."""

    def __post_init__(self) -> None:
        for name in ("samples", "steps", "batch", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; expected at least 1.")
        if not self.adapter:
            raise ValueError("No adapter is given: name at least one file with --adapter.")
        if self.size is not None and (self.size < 8 or self.size % 8):
            raise ValueError(f"size is {self.size}; expected a multiple of 8.")

    @property
    def sampling(self) -> SamplingSettings:
        size = None if self.size is None else (self.size, self.size)
        return SamplingSettings(self.steps, self.guidance, size, self.negative, self.batch)


def parse(arguments: Sequence[str] | None = None) -> EvaluationSettings:
    """Settings from `--config FILE.yaml` and the command line, which wins.

    Ends the program with a message that names the setting if a value cannot be.
    """
    parser = ArgumentParser(prog="evaluate.py", description=EvaluationSettings.__doc__)
    parser.add_argument("--config", action="config", help="YAML file of any of these settings.")
    parser.add_class_arguments(EvaluationSettings, skip={"adapter"})
    parser.add_argument("--adapter", type=str, nargs="+", required=True, help="Adapter files.")
    found = parser.parse_args(arguments).as_dict()
    found.pop("config", None)
    try:
        return EvaluationSettings(**found)
    except ValueError as error:
        parser.error(str(error))
        raise  # never reached: error() ends the program
