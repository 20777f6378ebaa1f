"""Draw the pictures beside the example workflows: what goes in, through what, and what comes out.

    python -m tools.workflows.pictures                            # with the miniature
    python -m tools.workflows.pictures --server 127.0.0.1:8188    # with a server's own models

Every workflow runs. The miniature's images are small and say what drew them; a server's models
run as the workflow says, on the server's own input images. There is no miniature of faces: those
workflows run no further than *Encode Face*, with a detector that finds drawn faces by their
colours, and the picture has what that node shows, in place of a result. There is none of Flux: its
pictures have an empty frame. The template browser shows a square of about 250 pixels and covers the
upper left corner.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageOps

from miniature import assemble
from miniature.workflows import on_miniature
from tests.support import standins
from tools import reference_images
from tools.comfyui import install
from tools.comfyui.server import Client, Server
from tools.workflows.api import (
    FOLDER,
    NAMES,
    PUBLIC,
    Api,
    fed_by,
    is_link,
    missing,
    needed,
    of_class,
    read,
)

SIDE = 512
LIMIT = 60 * 1024
"""Bytes of a picture: the browser of templates loads all of them at once."""
TOP, BOTTOM, GAP = 56, 420, 12
GROUND, INK, FAINT, BOX = "#1e2127", "#f2f2f2", "#9aa4b2", "#2f6f73"
TILES, BOXES, RESULTS = (12, 142), (162, 284), (304, 500)
"""Left and right edges of the three columns."""
REMARK = "drawn by the miniature models of the repository"
FACE = "IPA_EncodeFace"
UNTRAINED = "not drawn: no model of the repository is of its kind"
FACE_REMARK = "drawn faces; no model of the repository draws a result"
TEXT = "a star"
BEFORE = {"load_prompt": ("save_prompt",)}
"""Workflows that another's run must come before."""

Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class Stage:
    """A labelled box, and the files of the images that lead into it."""

    label: str
    files: tuple[str, ...]


def images_of(api: Api) -> dict[str, str]:
    """Return the image files that the workflow loads, by the node that loads them."""
    return {
        id_: node["inputs"]["image"]
        for id_, node in api.items()
        if node["class_type"] in ("LoadImage", "LoadImageMask")
    }


def stages_of(api: Api) -> list[Stage]:
    """Return what each image passes through on its way to the sampler, in the graph's order."""
    saved = [id_ for id_, node in api.items() if node["class_type"] == "IPA_LoadPrompt"]
    files: dict[str, list[str]] = {}
    for id_, file in (images_of(api) | dict.fromkeys(saved)).items():
        for label in _first_labels(api, id_):
            files.setdefault(label, []).extend([file] if file else [])
    return [
        Stage(label.partition("#")[0], tuple(dict.fromkeys(own))) for label, own in files.items()
    ]


def _first_labels(api: Api, id_: str) -> Iterator[str]:
    """Yield labels of the first stages downstream; `#` and an id tells equal ones apart."""
    for next_ in fed_by(api, id_):
        label = _label(api, next_)
        if label is None:
            yield from _first_labels(api, next_)
        elif label:
            yield label


def _label(api: Api, id_: str) -> str | None:
    """Return a stage's label, None for a node to look past, "" for one where nothing begins."""
    inputs = api[id_]["inputs"]
    match api[id_]["class_type"]:
        case "IPA_Apply" | "IPA_ApplyConditioning":
            weight = inputs["weight"]
            shown = "weights" if is_link(weight) else f"weight {weight:g}"
            before = set(_upstream(api, inputs))
            more = f"\n{inputs['combine']}" if "BatchImagesNode" in before else ""
            more += "\nfrom a file" if "IPA_LoadPrompt" in before else ""
            return f"{_kind(before)}\n{shown}{more}#{id_}"
        case "IPA_ApplyRegions":
            return f"{_kind(_upstream(api, inputs))}\nregions#{id_}"
        case "ControlNetApplyAdvanced":
            return f"ControlNet\nedges#{id_}"
        case "VAEEncode" | "SetLatentNoiseMask":
            (sampler,) = of_class(api, "KSampler")
            kind = "Inpaint" if any(of_class(api, "SetLatentNoiseMask")) else "Start"
            return f"{kind}\ndenoise {sampler['denoise']:g}"
        case "ImageCompositeMasked":
            return ""
    return None


def _kind(before: Iterable[str]) -> str:
    return "FaceID" if FACE in before else "IP-Adapter"


def _upstream(api: Api, inputs: Mapping[str, Any]) -> Iterator[str]:
    """Yield the classes of the nodes that an image prompt comes from."""
    names = ("image_prompt", "image_prompts.image_prompt0", "image")
    source = next(filter(None, map(inputs.get, names)), None)
    if is_link(source):
        yield api[source[0]]["class_type"]
        yield from _upstream(api, api[source[0]]["inputs"])


def _text_of(api: Api) -> str:
    """Return what the workflow's positive texts say."""
    words = [
        node["inputs"]["text"]
        for node in api.values()
        if node["class_type"] == "CLIPTextEncode" and "Positive" in node["_meta"]["title"]
    ]
    text = " / ".join(dict.fromkeys(filter(None, words)))
    return f"“{text}”" if text else "no text"


def _checkpoint_of(api: Api) -> str:
    """Return what people call the checkpoint; of one that is not published, its name."""
    (loader,) = of_class(api, "CheckpointLoaderSimple", "UNETLoader")
    name = loader.get("ckpt_name") or loader["unet_name"]
    return PUBLIC[name].label if name in PUBLIC else str(name).partition(".")[0]


def draw(
    api: Api,
    images: Mapping[str, Image.Image],
    results: Sequence[Image.Image],
    remark: str = "",
    shows: str = "",
) -> Image.Image:
    """Draw a square of `SIDE` pixels. `images` holds the loaded ones by file name.

    `shows`: what the `results` are, where they are no results.
    """
    sheet = Image.new("RGB", (SIDE, SIDE), GROUND)
    pen = ImageDraw.Draw(sheet)
    files = list(dict.fromkeys(images_of(api).values()))
    tiles = dict(zip(files, _squares(TILES, len(files), align=1.0), strict=True))
    places = _squares(RESULTS, len(results), align=0.0)
    stages = stages_of(api)
    left, right = BOXES
    tops = _tops(len(stages), 84, 3 * GAP)
    boxes = [(left, top, right, top + 84) for top in tops]
    labelled = list(zip(stages, boxes, strict=True))
    lines = [(tiles[file], box) for stage, box in labelled for file in stage.files]
    lines += [] if shows else itertools.product(boxes, places)
    for start, end in lines:
        middles = (start[1] + start[3]) // 2, (end[1] + end[3]) // 2
        pen.line([(start[2], middles[0]), (end[0], middles[1])], FAINT, 3)
    pasted = [(images[file], tile) for file, tile in tiles.items()]
    for image, box in (*pasted, *zip(results, places, strict=True)):
        room = box[2] - box[0], box[3] - box[1]
        fitted = ImageOps.pad(image.convert("RGB"), room, Image.Resampling.LANCZOS, GROUND)
        sheet.paste(fitted, box)
    for stage, box in labelled:
        pen.rounded_rectangle(box, 10, BOX)
        middle = ((box[0] + box[2]) // 2, (box[1] + box[3]) // 2)
        pen.text(middle, stage.label, INK, anchor="mm", spacing=3, align="center", font_size=21)
    pen.text((SIDE - 12, 30), shows or _checkpoint_of(api), FAINT, anchor="rm", font_size=24)
    text = _wrapped(pen, _text_of(api), 22, SIDE - 24)
    pen.text((SIDE // 2, 454), text, INK, anchor="mm", align="center", font_size=22)
    pen.text((SIDE // 2, 496), remark, FAINT, anchor="mm", font_size=18)
    return sheet


def _squares(column: tuple[int, int], count: int, align: float) -> list[Box]:
    """Stack squares, at the column's left (`align` 0) or right (1) edge."""
    if not count:
        return []
    side = min(column[1] - column[0], (BOTTOM - TOP - GAP * (count - 1)) // count)
    left = column[0] + round(align * (column[1] - column[0] - side))
    return [(left, top, left + side, top + side) for top in _tops(count, side)]


def _tops(count: int, height: int, gap: int = GAP) -> list[int]:
    """Return the upper edges of a stack in the middle between `TOP` and `BOTTOM`."""
    top = (TOP + BOTTOM - count * height - gap * (count - 1)) // 2
    return [top + index * (height + gap) for index in range(count)]


def _wrapped(pen: ImageDraw.ImageDraw, text: str, size: int, width: int) -> str:
    """Break the text into lines no wider than `width`."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and pen.textlength(longer, font_size=size) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return "\n".join(lines)


def run_and_draw(client: Client, api: Api, remark: str, faces: bool = False) -> Image.Image:
    """Run a workflow and draw it, or with `faces` what *Encode Face* shows in it.

    Raises PromptError if it fails.
    """
    loaded = {
        file: _open(client.view({"filename": file, "type": "input"}))
        for file in images_of(api).values()
    }
    images = client.run(needed(api, FACE) if faces else api).images
    wanted = FACE if faces else "SaveImage"  # other previews are no results
    shown = (id_ for id_, node in api.items() if node["class_type"] == wanted)
    results = [_open(image) for id_ in shown for image in images[id_]]
    return draw(api, loaded, results, remark, "Encode Face shows:" if faces else "")


def _open(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")


def jpeg(image: Image.Image) -> bytes:
    """Return the image as a JPEG in the best quality that keeps within `LIMIT`."""
    for quality in range(92, 20, -4):
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=quality, optimize=True)
        if buffer.tell() <= LIMIT:
            return buffer.getvalue()
    raise ValueError(f"no JPEG of {image.width} x {image.height} fits into {LIMIT} bytes")


def in_order(names: Iterable[str]) -> list[str]:
    """Return the workflows, each once, with those that must run before one of them."""
    return list(dict.fromkeys(one for name in names for one in (*BEFORE.get(name, ()), name)))


def _empty() -> Image.Image:
    """Draw the frame of a picture that is not there."""
    side = RESULTS[1] - RESULTS[0]
    tile = Image.new("RGB", (side, side), GROUND)
    pen = ImageDraw.Draw(tile)
    pen.rounded_rectangle((1, 1, side - 2, side - 2), 10, outline=FAINT, width=3)
    pen.text((side // 2, side // 2), "result", FAINT, anchor="mm", font_size=24)
    return tile


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", help=f"workflows to draw; all by default: {NAMES}")
    parser.add_argument("--server", help="a running ComfyUI with the weights, 127.0.0.1:8188")
    arguments = parser.parse_args()
    with contextlib.ExitStack() as stack:

        @functools.cache
        def started(base: Path) -> Client:
            return stack.enter_context(Server(base, install.require()))

        for name in in_order(arguments.names or NAMES):
            api = read(name)
            if arguments.server:
                sheet = run_and_draw(Client(arguments.server), api, "")
            elif any(of_class(api, FACE)):
                sheet = run_and_draw(started(standins.ensure("faces")), api, FACE_REMARK, True)
            elif any(of_class(api, "UNETLoader")):
                loaded = {file: reference_images.draw(file) for file in images_of(api).values()}
                sheet = draw(api, loaded, [_empty()], UNTRAINED)
            else:
                api = on_miniature(api, TEXT)
                if lacking := missing(api, assemble.ensure() / "models"):
                    print(f"{name}: left as it is, the miniature has no {', '.join(lacking)}")
                    continue
                sheet = run_and_draw(started(assemble.ensure()), api, REMARK)
            data = jpeg(sheet)
            (FOLDER / f"{name}.jpg").write_bytes(data)
            print(f"workflows/{name}.jpg: {len(data) / 1024:.0f} KB", flush=True)


if __name__ == "__main__":
    main()
