"""A workflow at a glance: its pictures, what they pass through, and what comes out.

The template browser shows a square of about 250 pixels and covers the upper left corner.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from tools.workflows.public import PUBLIC

SIDE = 512
TOP, BOTTOM, GAP = 56, 420, 12
GROUND, INK, FAINT, BOX = "#1e2127", "#f2f2f2", "#9aa4b2", "#2f6f73"
TILES, BOXES, RESULTS = (12, 142), (162, 284), (304, 500)
"""Left and right edges of the three columns."""

Api = Mapping[str, Any]
Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class Stage:
    """A labelled box, and the files of the pictures that lead into it."""

    label: str
    files: tuple[str, ...]


def pictures_of(api: Api) -> dict[str, str]:
    """The picture files that the workflow loads, by the node that loads them."""
    return {
        id_: node["inputs"]["image"]
        for id_, node in api.items()
        if node["class_type"] in ("LoadImage", "LoadImageMask")
    }


def stages_of(api: Api) -> list[Stage]:
    """What each picture passes through on its way to the sampler, in the graph's order."""
    files: dict[str, list[str]] = {}
    for id_, file in (pictures_of(api) | dict.fromkeys(_saved_prompts(api))).items():
        for label in _first_labels(api, id_):
            files.setdefault(label, []).extend([file] if file else [])
    return [
        Stage(label.partition("#")[0], tuple(dict.fromkeys(own))) for label, own in files.items()
    ]


def _saved_prompts(api: Api) -> Iterator[str]:
    """The nodes that load a prompt, without pictures."""
    return (id_ for id_, node in api.items() if node["class_type"] == "IPA_LoadPrompt")


def _first_labels(api: Api, id_: str) -> Iterator[str]:
    """Labels of the first stages downstream of a node; `#` and an id tells equal ones apart."""
    for next_, node in api.items():
        if any(isinstance(value, list) and value[0] == id_ for value in node["inputs"].values()):
            label = _label(api, next_, node)
            if label is None:
                yield from _first_labels(api, next_)
            elif label:
                yield label


def _label(api: Api, id_: str, node: Mapping[str, Any]) -> str | None:
    """A stage's label, None for a node to look past, "" for one where nothing begins."""
    inputs = node["inputs"]
    match node["class_type"]:
        case "IPA_Apply" | "IPA_ApplyConditioning":
            weight = inputs["weight"]
            shown = "weights" if isinstance(weight, list) else f"weight {weight:g}"
            before = {node["class_type"] for node in _upstream(api, inputs)}
            more = f"\n{inputs['combine']}" if "BatchImagesNode" in before else ""
            more += "\nfrom a file" if "IPA_LoadPrompt" in before else ""
            return f"IP-Adapter\n{shown}{more}#{id_}"
        case "IPA_ApplyRegions":
            return f"IP-Adapter\nregions#{id_}"
        case "ControlNetApplyAdvanced":
            return f"ControlNet\nedges#{id_}"
        case "VAEEncode" | "SetLatentNoiseMask":
            kinds = {other["class_type"] for other in api.values()}
            (denoise,) = (
                other["inputs"]["denoise"]
                for other in api.values()
                if other["class_type"] == "KSampler"
            )
            kind = "Inpaint" if "SetLatentNoiseMask" in kinds else "Start"
            return f"{kind}\ndenoise {denoise:g}"
        case "ImageCompositeMasked":
            return ""
    return None


def _upstream(api: Api, inputs: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The nodes that an image prompt comes from."""
    source = inputs.get("image_prompt") or inputs.get("image")
    if isinstance(source, list):
        node = api[source[0]]
        yield node
        yield from _upstream(api, node["inputs"])


def text_of(api: Api) -> str:
    """What the workflow's positive texts say."""
    words = [
        node["inputs"]["text"]
        for node in api.values()
        if node["class_type"] == "CLIPTextEncode" and "Positive" in node["_meta"]["title"]
    ]
    text = " / ".join(dict.fromkeys(word for word in words if word))
    return f"“{text}”" if text else "no text"


def checkpoint_of(api: Api) -> str:
    """What people call the checkpoint; of one that is not published, its name."""
    (name,) = (
        node["inputs"]["ckpt_name"]
        for node in api.values()
        if node["class_type"] == "CheckpointLoaderSimple"
    )
    return PUBLIC[name].label if name in PUBLIC else str(name).partition(".")[0]


def draw(
    api: Api,
    pictures: Mapping[str, Image.Image],
    results: Sequence[Image.Image],
    remark: str = "",
) -> Image.Image:
    """A square of `SIDE` pixels. `pictures` holds the loaded ones by file name."""
    sheet = Image.new("RGB", (SIDE, SIDE), GROUND)
    pen = ImageDraw.Draw(sheet)
    files = list(dict.fromkeys(pictures_of(api).values()))
    tiles = dict(zip(files, _squares(TILES, len(files), 1.0), strict=True))
    places = _squares(RESULTS, len(results), 0.0)
    stages = stages_of(api)
    boxes = _boxes(len(stages))
    for stage, box in zip(stages, boxes, strict=True):
        for file in stage.files:
            pen.line([_right(tiles[file]), _left(box)], FAINT, 3)
        for place in places:
            pen.line([_right(box), _left(place)], FAINT, 3)
    for file, tile in tiles.items():
        _paste(sheet, pictures[file], tile)
    for stage, box in zip(stages, boxes, strict=True):
        pen.rounded_rectangle(box, 10, BOX)
        middle = ((box[0] + box[2]) // 2, (box[1] + box[3]) // 2)
        pen.multiline_text(middle, stage.label, INK, _font(21), "mm", 3, "center")
    for result, place in zip(results, places, strict=True):
        _paste(sheet, result, place)
    pen.text((SIDE - 12, 30), checkpoint_of(api), FAINT, _font(24), "rm")
    text = _wrapped(text_of(api), _font(22), SIDE - 24)
    pen.multiline_text((SIDE // 2, 454), text, INK, _font(22), "mm", 4, "center")
    pen.text((SIDE // 2, 496), remark, FAINT, _font(18), "mm")
    return sheet


def _squares(column: tuple[int, int], count: int, align: float) -> list[Box]:
    """Squares one below the other, at the column's left (`align` 0) or right (1) edge."""
    if not count:
        return []
    side = min(column[1] - column[0], (BOTTOM - TOP - GAP * (count - 1)) // count)
    left = column[0] + round(align * (column[1] - column[0] - side))
    return [(left, top, left + side, top + side) for top in _tops(count, side)]


def _boxes(count: int) -> list[Box]:
    left, right = BOXES
    return [(left, top, right, top + 84) for top in _tops(count, 84, 3 * GAP)]


def _tops(count: int, height: int, gap: int = GAP) -> list[int]:
    """Upper edges of a stack in the middle between `TOP` and `BOTTOM`."""
    top = (TOP + BOTTOM - count * height - gap * (count - 1)) // 2
    return [top + index * (height + gap) for index in range(count)]


def _left(box: Box) -> tuple[int, int]:
    return box[0], (box[1] + box[3]) // 2


def _right(box: Box) -> tuple[int, int]:
    return box[2], (box[1] + box[3]) // 2


def _paste(sheet: Image.Image, picture: Image.Image, box: Box) -> None:
    """The whole picture, as large as fits, in the middle of the box."""
    width, height = box[2] - box[0], box[3] - box[1]
    scale = min(width / picture.width, height / picture.height)
    size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
    small = picture.convert("RGB").resize(size, Image.Resampling.LANCZOS)
    sheet.paste(small, (box[0] + (width - size[0]) // 2, box[1] + (height - size[1]) // 2))


def _wrapped(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """The text in lines no wider than `width`."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return "\n".join(lines)


def _font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont), "Pillow was built without FreeType"
    return font
