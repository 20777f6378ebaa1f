"""Commands that README.md, training/README.md and the scripts' docstrings show."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from training import cache, config, evaluate, train

ROOT = Path(__file__).resolve().parents[2]
MODELS = ("--pretrained_model_name_or_path=a", "--image_encoder_path=b", "--output_dir=c")
REQUIRED = {
    "train.py": (*MODELS, "--train_data_dir=d"),
    "cache.py": (*MODELS, "--train_data_dir=d"),
    "evaluate.py": (*MODELS, "--eval_data_dir=d", "--ip_adapter_path=e"),
}
CONFIGS = {
    "train.py": config.TrainConfig,
    "cache.py": cache.CacheConfig,
    "evaluate.py": evaluate.EvaluationConfig,
}
PAGES = {name: (ROOT / name).read_text("utf-8") for name in ("README.md", "training/README.md")}
PAGES |= {module.__name__: module.__doc__ for module in (train, cache, evaluate)}


def commands(page: str) -> list[str]:
    """Return the code blocks' commands, one a line; in a docstring, all that is indented."""
    blocks = re.findall(r"```bash\n(.*?)```", page, re.DOTALL) or re.findall(
        r"^    .*(?:\n    .*)*", page, re.MULTILINE
    )
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.strip() for line in lines if line.strip()]


def test_every_option_exists(capsys):
    checked = []
    for name, page in PAGES.items():
        for line in commands(page):
            if script := re.search(r"training/(\w+\.py) (.*)", line):
                file, options = script[1], shlex.split(script[2])
                if "…" in options or "my.yaml" in options:
                    before = ["", *options]  # "…" stands for a value, or for further options
                    given = [
                        "x" if option == "…" else option
                        for last, option in zip(before, options, strict=False)
                        if option not in ("--config", "my.yaml")
                        and (option != "…" or last.startswith("--"))
                    ]
                    options = [*REQUIRED[file], *given]
                config.parse(CONFIGS[file], file, options)
                checked.append((name, file))
    assert {file for _, file in checked} == {*CONFIGS}
    assert {name for name, _ in checked} == {*PAGES}


@pytest.mark.nightly
def test_the_small_set_as_it_stands(tmp_path, arrow):
    from miniature import assemble

    page = PAGES["training/README.md"]
    text = page[page.index("### First on a small set") :]
    lines = commands(text[: text.index("\n## ")])
    assert [*map(lambda line: line.split()[0], lines)] == ["python", *["accelerate"] * 2, "cp"]
    base = assemble.ensure()
    for line in lines:
        line = line.replace(".cache/miniature", str(base)).replace("output/small", str(tmp_path))
        program, *arguments = shlex.split(line)
        start = {
            "python": [sys.executable],
            "accelerate": [sys.executable, "-m", "accelerate.commands.accelerate_cli"],
        }.get(program, [program])
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run([*start, *arguments], cwd=ROOT, env=environment, check=True)
    assert (tmp_path / "run" / "validation" / "step-000100.png").is_file()
    assert (base / "models" / "ipadapter" / "my-adapter.safetensors").is_file()
