"""Draw the pictures beside the example workflows: what goes in, through what, and what comes out.

    python -m tools.workflow_pictures                            # with the miniature
    python -m tools.workflow_pictures --server 127.0.0.1:8188    # with a server's own models

Every workflow runs. The miniature's pictures are small and say what drew them; a server's models
run as the workflow says, on the server's own input pictures.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from miniature import setup
from miniature.workflows import on_miniature
from tools.comfyui import install as host
from tools.comfyui.server import Client, Server
from tools.workflows.sketch import draw, pictures_of
from tools.workflows.tasks import TASKS

WORKFLOWS = Path(__file__).resolve().parent.parent / "workflows"
LIMIT = 60 * 1024
"""Bytes of a picture: the browser of templates loads all of them at once."""
REMARK = "drawn by the miniature models of the repository"
TEXT = "a star"
BEFORE = {"load_prompt": ("save_prompt",)}
"""Workflows that another's run must come before."""


@contextlib.contextmanager
def server(address: str | None) -> Iterator[Client]:
    """The server at that address, or one with the miniature."""
    if address:
        yield Client(address)
    else:
        with Server(setup.ensure(), host.require()) as client:
            yield client


LOADERS = {
    "CheckpointLoaderSimple": "ckpt_name",
    "ControlNetLoader": "control_net_name",
    "IPA_LoadAdapter": "adapter_name",
}


def models_of(api: dict[str, Any]) -> Iterator[str]:
    """The model files that the workflow names."""
    for node in api.values():
        if name := LOADERS.get(node["class_type"]):
            yield node["inputs"][name]


def offered(client: Client) -> Iterator[str]:
    """The model files that the server's loaders offer."""
    for node_class, name in LOADERS.items():
        choice = client.object_info(node_class)[node_class]["input"]["required"][name]
        yield from choice[0] if isinstance(choice[0], list) else choice[1]["options"]


def picture(client: Client, api: dict[str, Any], remark: str) -> Image.Image:
    """Run a workflow and draw it. Raises PromptError if it fails."""
    loaded = {
        file: _open(client.view({"filename": file, "type": "input"}))
        for file in pictures_of(api).values()
    }
    images = client.run(api).images
    saved = (id_ for id_, node in api.items() if node["class_type"] == "SaveImage")
    results = [_open(image) for id_ in saved for image in images[id_]]  # previews are no results
    return draw(api, loaded, results, remark)


def in_order(names: Iterable[str]) -> list[str]:
    """The workflows, each once, with those that must run before one of them."""
    return list(dict.fromkeys(one for name in names for one in (*BEFORE.get(name, ()), name)))


def jpeg(image: Image.Image) -> bytes:
    """The image in the best quality that keeps within `LIMIT`."""
    for quality in range(92, 20, -4):
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=quality, optimize=True)
        if buffer.tell() <= LIMIT:
            return buffer.getvalue()
    raise ValueError(f"no JPEG of {image.width} x {image.height} fits into {LIMIT} bytes")


def _open(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")


def main() -> None:
    names = [task.__name__ for task in TASKS]
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", help=f"workflows to draw; all by default: {names}")
    parser.add_argument("--server", help="a running ComfyUI with the weights, 127.0.0.1:8188")
    arguments = parser.parse_args()
    with server(arguments.server) as client:
        for name in in_order(arguments.names or names):
            api = json.loads((WORKFLOWS / "api" / f"{name}.json").read_text("utf-8"))
            if not arguments.server:
                api = on_miniature(api, TEXT)
                if lacking := sorted(set(models_of(api)) - set(offered(client))):
                    print(f"{name}: left as it is, the miniature has no {', '.join(lacking)}")
                    continue
            data = jpeg(picture(client, api, "" if arguments.server else REMARK))
            (WORKFLOWS / f"{name}.jpg").write_bytes(data)
            print(f"workflows/{name}.jpg: {len(data) / 1024:.0f} KB", flush=True)


if __name__ == "__main__":
    main()
