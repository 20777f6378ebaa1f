"""A set of drawings: what seven designers made of the same subjects, with captions and references.

    python -m training.recipes.emoji.drawings --out FOLDER [--size 64] [--packages FOLDER]

Needs npm, which brings the packages (24 MB), and `pip install resvg-py`, which draws them. Writes
`pictures/HAND/SUBJECT.png` (transparent), and lists of rows that training/train.py and
training/cache.py read: `plain.jsonl`, where a drawing is its own reference; `style.jsonl`, where
the reference is another subject of the same hand; `content.jsonl`, the same subject of another
hand. Held out, in `held_out.jsonl` alone, are a tenth of the subjects, one hand, and a tenth of
the drawings of the others, whose subject is known by other hands only.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import logging
import re
import shutil
import subprocess
import tarfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps

from ip_adapter_core.files.atomic import atomic
from training.data.image import open_image

logger = logging.getLogger("training")


class Hand(NamedTuple):
    """A designer's set: its npm package, its name in texts, and whose it is."""

    package: str
    version: str
    name: str
    author: str
    licence: str
    source: str


FLUENT = "microsoft/fluentui-emoji"
HANDS = (
    Hand("noto", "1.2.9", "Noto", "Google", "Apache-2.0", "googlefonts/noto-emoji"),
    Hand("twemoji", "1.2.5", "Twemoji", "Twitter", "CC-BY-4.0", "jdecked/twemoji"),
    Hand("openmoji", "1.2.29", "OpenMoji", "OpenMoji", "CC-BY-SA-4.0", "hfg-gmuend/openmoji"),
    Hand("fluent-emoji", "1.2.7", "Fluent", "Microsoft", "MIT", FLUENT),
    Hand("fluent-emoji-flat", "1.2.6", "flat Fluent", "Microsoft", "MIT", FLUENT),
    Hand("emojione", "1.2.3", "EmojiOne", "EmojiOne", "CC-BY-4.0", "EmojiTwo/emojitwo"),
    Hand("fxemoji", "1.2.2", "FxEmoji", "Mozilla", "Apache-2.0", "mozilla/fxemoji"),
)
HELD_OUT_HAND = "fxemoji"
HELD_OUT = 10  # one subject in so many, and one drawing of the others
LEAST_HANDS = 4  # of those that train, for a subject to count
ALIKE = 6.0  # 8-bit levels: subjects whose drawings differ by less in the mean of all hands are one
_SKIN = re.compile(r"-(light|medium-light|medium|medium-dark|dark)(-skin-tone)?$|-low$")
Pictures = dict[str, dict[str, str]]
"""SVG by subject, then by hand."""


def fetch(folder: Path) -> dict[str, Path]:
    """Have npm bring the packages that are not there, and return their archives by hand."""
    folder.mkdir(parents=True, exist_ok=True)
    found = {}
    for hand in HANDS:
        path = folder / f"iconify-json-{hand.package}-{hand.version}.tgz"
        if not path.exists():
            asked = f"@iconify-json/{hand.package}@{hand.version}"
            npm = shutil.which("npm") or "npm"  # npm.cmd on Windows
            command = [npm, "pack", asked, "--pack-destination", str(folder)]
            try:
                subprocess.run(command, check=True, capture_output=True, text=True)
            except (OSError, subprocess.CalledProcessError) as error:
                told = getattr(error, "stderr", "") or str(error)
                raise SystemExit(
                    f"npm did not bring {asked}: {told.strip()[-300:]}. Install Node.js with npm, "
                    f"or put {path.name} into {folder} yourself."
                ) from error
        found[hand.package] = path
    return found


def svgs(archive: Path) -> dict[str, str]:
    """Return the drawings of a package of Iconify, by their names; aliases too."""
    with tarfile.open(archive) as tar:
        member = tar.extractfile("package/icons.json")
        assert member is not None
        data = json.load(member)
    size = {key: data.get(key, 16) for key in ("width", "height")}
    icons: Mapping[str, Any] = data["icons"]
    found = {name: _svg({**size, **icon}) for name, icon in icons.items()}
    for name, alias in data.get("aliases", {}).items():
        if alias["parent"] in found and len(alias) == 1:  # not those that are turned
            found.setdefault(name, found[alias["parent"]])
    return found


def _svg(icon: Mapping[str, Any]) -> str:
    box = f"{icon.get('left', 0)} {icon.get('top', 0)} {icon['width']} {icon['height']}"
    links = 'xmlns:xlink="http://www.w3.org/1999/xlink"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {links} viewBox="{box}">'
    return f"{head}{icon['body']}</svg>"


def by_subject(archives: Mapping[str, Path]) -> Pictures:
    """Return what every hand made of each subject that enough of them drew, in one skin.

    A hand that writes its names as one word is told by the letters alone.
    """
    drawn = {hand: svgs(path) for hand, path in archives.items()}
    training = [hand for hand in drawn if hand != HELD_OUT_HAND]
    count: dict[str, int] = defaultdict(int)
    for hand in training:
        for name in drawn[hand]:
            count[name] += not _SKIN.search(name)
    subjects = sorted(name for name, hands in count.items() if hands >= LEAST_HANDS)
    letters = {
        hand: {re.sub(r"\W|_", "", name): svg for name, svg in own.items()}
        for hand, own in drawn.items()
    }
    return {
        name: {
            hand: svg
            for hand in drawn
            if (svg := drawn[hand].get(name) or letters[hand].get(name.replace("-", "")))
        }
        for name in subjects
    }


def draw(pictures: Pictures, folder: Path, size: int) -> Iterator[tuple[str, str, Path]]:
    """Write every drawing as a transparent PNG; yield subject, hand and path."""
    try:
        import resvg_py
    except ImportError as error:
        raise SystemExit("resvg-py draws the pictures: pip install resvg-py") from error
    for subject, hands in pictures.items():
        for hand, svg in hands.items():
            path = folder / hand / f"{subject}.png"
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                try:
                    made = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=4 * size))
                except (ValueError, RuntimeError) as error:
                    logger.warning("%s of %s cannot be drawn: %s", subject, hand, error)
                    continue
                with atomic(path) as temporary:
                    _square(made, size).save(temporary, "PNG")
            yield subject, hand, path


def _square(png: bytes, size: int) -> Image.Image:
    """Return a drawing in the middle of a transparent square."""
    with Image.open(io.BytesIO(png)) as image:
        drawn = ImageOps.contain(image.convert("RGBA"), (size, size), Image.Resampling.BOX)
    square = Image.new("RGBA", (size, size))
    square.paste(drawn, ((size - drawn.width) // 2, (size - drawn.height) // 2))
    return square


def distinct(drawn: Mapping[str, Mapping[str, Path]]) -> list[str]:
    """Return the subjects without those that look like one before them (clock faces, flags, …)."""
    kept: list[str] = []
    small: dict[str, dict[str, np.ndarray[Any, Any]]] = {}
    for subject, hands in drawn.items():
        mine = {hand: _small(path) for hand, path in hands.items() if hand != HELD_OUT_HAND}
        others = (
            np.mean([np.abs(mine[h] - small[other][h]).mean() for h in mine.keys() & small[other]])
            for other in kept
            if len(mine.keys() & small[other]) >= LEAST_HANDS
        )
        if min(others, default=ALIKE) >= ALIKE:
            kept.append(subject)
            small[subject] = mine
    return kept


def _small(path: Path) -> Any:
    image = open_image(path).resize((16, 16), Image.Resampling.BOX)
    return np.asarray(image, np.float32)


def number(*words: object) -> int:
    """Return a number that follows from words alone, the same everywhere."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, words)).encode()).digest()[:8], "big")


def caption(subject: str) -> str:
    return subject.replace("-", " ")


def rows(
    drawn: Mapping[str, Mapping[str, Path]], root: Path, seed: int, references: int = 1
) -> dict[str, list[Any]]:
    """Return the rows of every list; `number` chooses what is held out, and a row says why.

    `references`: as many rows of "style" has every drawing, each with another reference.
    """
    found: dict[str, list[Any]] = {name: [] for name in ("plain", "style", "content", "held_out")}
    trained: dict[str, dict[str, Path]] = {
        subject: {
            hand: path
            for hand, path in hands.items()
            if hand != HELD_OUT_HAND and number(seed, "drawing", subject, hand) % HELD_OUT
        }
        for subject, hands in drawn.items()
        if number(seed, subject) % HELD_OUT
    }
    of_hand = defaultdict(list)
    for subject, known in trained.items():
        for hand in known:
            of_hand[hand].append(subject)
    for subject, hands in drawn.items():
        known = trained.get(subject, {})
        for hand, path in hands.items():
            row = {
                "file_name": path.relative_to(root).as_posix(),
                "text": caption(subject),
                "subject": subject,
                "hand": hand,
            }
            if hand not in known:
                of = "drawing" if subject in trained else "subject"
                why = "hand" if hand == HELD_OUT_HAND else of
                found["held_out"].append({**row, "held_out": why})
                continue
            own, others = of_hand[hand], [other for other in known if other != hand]
            found["plain"].append(row)
            same = sorted(own, key=lambda x: number(seed, "style", subject, hand, x))
            for other in [x for x in same if x != subject][:references]:
                style = trained[other][hand].relative_to(root).as_posix()
                found["style"].append({**row, "reference_file_name": style})
            if others:
                other = others[number(seed, "content", subject, hand) % len(others)]
                content = known[other].relative_to(root).as_posix()
                found["content"].append({**row, "reference_file_name": content})
    return found


def write(
    out: Path,
    packages: Path,
    size: int = 64,
    seed: int = 0,
    most: int | None = None,
    references: int = 1,
) -> dict[str, int]:
    """Make the set in `out`; returns how many rows each list has. `most`: subjects."""
    pictures = out / "pictures"
    drawn: dict[str, dict[str, Path]] = defaultdict(dict)
    found = by_subject(fetch(packages))
    chosen = sorted(found, key=lambda subject: number(seed, "chosen", subject))[:most]
    for subject, hand, path in draw({s: found[s] for s in sorted(chosen)}, pictures, size):
        drawn[subject][hand] = path
    lists = rows(
        {subject: drawn[subject] for subject in distinct(drawn)}, pictures, seed, references
    )
    for name, listed in lists.items():
        lines = "".join(json.dumps(row) + "\n" for row in listed)
        (out / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    (out / "ATTRIBUTION.md").write_text(attribution(HANDS), encoding="utf-8")
    return {name: len(listed) for name, listed in lists.items()}


def attribution(hands: Iterable[Hand]) -> str:
    """Say whose drawings these are, and under which licences."""
    table = "".join(
        f"| {h.name} | {h.author} | [{h.source}](https://github.com/{h.source}) | {h.licence} "
        f"| `@iconify-json/{h.package}` {h.version} |\n"
        for h in hands
    )
    return f"| hand | by | from | licence | package |\n|---|---|---|---|---|\n{table}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the set")
    parser.add_argument("--packages", type=Path, help="of npm; default: OUT/packages")
    parser.add_argument("--size", type=int, default=64, help="pixels of a side")
    parser.add_argument("--most", type=int, help="so many subjects; default: all, about 1,500")
    parser.add_argument("--seed", type=int, default=0, help="of what is held out, and of pairs")
    parser.add_argument(
        "--references", type=int, default=1, help="rows of a drawing in style.jsonl"
    )
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    packages = given.packages or given.out / "packages"
    made = write(given.out, packages, given.size, given.seed, given.most, given.references)
    print(", ".join(f"{name}: {count}" for name, count in made.items()))


if __name__ == "__main__":
    main()
