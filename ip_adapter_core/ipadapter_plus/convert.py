"""Rewrite workflows of ComfyUI_IPAdapter_plus with this pack's own nodes.

Both of ComfyUI's formats go: what the editor saves, and what *Export (API)* gives. A node is
rewritten where native nodes compute the same to the bit; all others stay as they are, since their
ids are served, and are listed with the reason. Two things the file does not tell: a preset that
several files fit (the old names go first there, what is in the files here), and a batch of masks or
of negative pictures, of which the report speaks.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from .presets import COMMUNITY, UNIFIED
from .weight_types import ONCE_CALLED, WEIGHT_TYPES

Json = dict[str, Any]


class Link(NamedTuple):
    """An output of another node."""

    node: Any
    slot: int


class Kind(NamedTuple):
    """A node's sockets by type, its widgets in the editor's order, and its outputs by type."""

    sockets: Mapping[str, str]
    widgets: tuple[str, ...]
    outputs: Mapping[str, str]


_WINDOW = ("start_at", "end_at")
_OLD = {
    "IPAdapter": ("image", ("weight", *_WINDOW, "weight_type")),
    "IPAdapterAdvanced": (
        "image",
        ("weight", "weight_type", "combine_embeds", *_WINDOW, "embeds_scaling"),
    ),
    "IPAdapterPreciseStyleTransfer": (
        "image",
        ("weight", "style_boost", "combine_embeds", *_WINDOW, "embeds_scaling"),
    ),
    "IPAdapterPreciseComposition": (
        "image",
        ("weight", "composition_boost", "combine_embeds", *_WINDOW, "embeds_scaling"),
    ),
    "IPAdapterStyleComposition": (
        "image_style",
        (
            *("weight_style", "weight_composition", "expand_style", "combine_embeds"),
            *(*_WINDOW, "embeds_scaling"),
        ),
    ),
    "IPAdapterModelLoader": ("", ("ipadapter_file",)),
    "IPAdapterUnifiedLoader": ("", ("preset",)),
    "IPAdapterUnifiedLoaderCommunity": ("", ("preset",)),
}
_DEFAULTS: dict[str, Any] = {
    "weight": 1.0,
    "weight_style": 1.0,
    "weight_composition": 1.0,
    "expand_style": False,
    "style_boost": 1.0,
    "composition_boost": 0.0,
    "start_at": 0.0,
    "end_at": 1.0,
    "combine_embeds": "concat",
    "embeds_scaling": "V only",
    "weight_type": "linear",
}
_LOADERS = {"IPAdapterModelLoader", "IPAdapterUnifiedLoader", "IPAdapterUnifiedLoaderCommunity"}
NATIVE = {
    "IPA_LoadAdapter": Kind({}, ("adapter_name",), {"adapter": "IP_ADAPTER"}),
    "IPA_AutoLoad": Kind(
        {"model": "MODEL"},
        ("preset",),
        {"adapter": "IP_ADAPTER", "clip_vision": "CLIP_VISION", "chosen": "STRING"},
    ),
    "IPA_EncodeImage": Kind(
        {"clip_vision": "CLIP_VISION", "image": "IMAGE", "negative_image": "IMAGE"},
        ("crop",),
        {"image_prompt": "IMAGE_PROMPT"},
    ),
    "IPA_LayerWeights": Kind(
        {"model": "MODEL"},
        ("preset", "changes", "scaling"),
        {"layer_weights": "LAYER_WEIGHTS", "profile": "IMAGE", "layers": "STRING"},
    ),
    "IPA_Apply": Kind(
        {
            "model": "MODEL",
            "adapter": "IP_ADAPTER",
            "image_prompt": "IMAGE_PROMPT",
            "mask": "MASK",
            "layer_weights": "LAYER_WEIGHTS",
            "weight_curve": "CURVE",
            "latent_weights": "LATENT_WEIGHTS",
        },
        ("weight", "start_at", "end_at", "combine", "lora_weight"),
        {"model": "MODEL"},
    ),
}
_PRESETS = {
    "linear": "uniform",
    "style transfer": "style",
    "composition": "composition",
    "strong style transfer": "strong style",
    "weak input": "weak input",
    "weak middle": "weak middle",
    "weak output": "weak output",
    "strong middle": "strong middle",
    "style transfer precise": "precise style",
    "composition precise": "precise composition",
}
_OF_PRESET = {preset.name: preset.native for preset in (*UNIFIED, *COMMUNITY) if preset.native}
_LIGHT = "light"  # v1.1 of the file goes before v1.0 there, which Auto does not look for
_NO_COUNTERPART = {
    "IPAdapterTiled": "tiles with a mask each",
    "IPAdapterMS": "blocks are numbered otherwise in the model's own family; see Layer Weights",
    "IPAdapterClipVisionEnhancer": "features of pieces of a picture",
    "IPAdapterEmbeds": "bare features",
    "IPAdapterEncoder": "bare features",
    "IPAdapterCombineEmbeds": "bare features",
    "IPAdapterNoise": "another noise; see Negative Image Noise",
    "PrepImageForClipVision": "another resampling; see Prepare Image for Prompt",
    "IPAdapterWeights": "lists of weights; see Weights per Latent",
    "InsightFaceLoader": "what reads it is served; see Load Face Encoder",
    "IPAdapterInsightFaceLoader": "what reads it is served; see Load Face Encoder",
    "PrepImageForInsightFace": "another resampling; Encode Face cuts the face out itself",
    "IPAdapterFromParams": "lists of regions; see Apply IP-Adapter (Regions)",
}


@dataclass
class _Node:
    """A node of either format: what comes in by name, links and values alike."""

    id: Any
    type: str
    inputs: Json
    source: Json = field(default_factory=dict)


class _Kept(Exception):
    """Why a node stays as it is."""


class Converted(NamedTuple):
    """The workflow, and what was done with each node of the old pack, a line each."""

    workflow: Json
    report: list[str]


def convert(workflow: Json) -> Converted:
    """Return a workflow of native nodes where they compute the same, and what was done.

    Raises ValueError for what is no workflow.
    """
    made = copy.deepcopy(workflow)
    if not isinstance(made, dict):
        raise ValueError(f"Found a {type(made).__name__}; expected a workflow of ComfyUI.")
    if isinstance(made.get("nodes"), list):
        report = _convert(_Editor(made))
        for graph in (made.get("definitions") or {}).get("subgraphs") or []:
            report += _convert(_Editor(graph))
        return Converted(made, report)
    nodes = made.get("prompt", made)
    if not all(isinstance(node, dict) and "class_type" in node for node in nodes.values()):
        raise ValueError(
            "The file holds neither 'nodes', as the editor saves them, nor nodes with a "
            "'class_type', as Export (API) gives them. Choose a workflow of ComfyUI."
        )
    return Converted(made, _convert(_Api(nodes)))


class _Graph:
    """What both formats can do."""

    def nodes(self) -> dict[Any, _Node]:
        raise NotImplementedError

    def add(self, type_: str, inputs: Json, beside: _Node, number: int) -> Any:
        """Add a native node beside another one, and return its id."""
        raise NotImplementedError

    def remove(self, node: _Node, instead: Mapping[int, Link]) -> None:
        """Take a node out; what its outputs fed gets the links `instead`."""
        raise NotImplementedError

    def gives_out(self, node: _Node, slot: int) -> bool:
        """Return whether the graph itself, a subgraph, gives out a node's output."""
        return False


class _Api(_Graph):
    def __init__(self, nodes: Json) -> None:
        self.content = nodes

    def nodes(self) -> dict[Any, _Node]:
        return {
            id_: _Node(
                id_,
                node["class_type"],
                {
                    name: Link(str(value[0]), value[1]) if _is_link(value) else value
                    for name, value in node.get("inputs", {}).items()
                },
                node,
            )
            for id_, node in self.content.items()
        }

    def add(self, type_: str, inputs: Json, beside: _Node, number: int) -> Any:
        taken = [int(id_) for id_ in self.content if str(id_).isdigit()]
        id_ = str(max(taken, default=0) + 1)
        given = {n: [*v] if isinstance(v, Link) else v for n, v in inputs.items()}
        self.content[id_] = {"class_type": type_, "inputs": given}
        return id_

    def remove(self, node: _Node, instead: Mapping[int, Link]) -> None:
        del self.content[node.id]
        for other in self.content.values():
            for name, value in [*other.get("inputs", {}).items()]:
                if _is_link(value) and str(value[0]) == str(node.id) and value[1] in instead:
                    other["inputs"][name] = [*instead[value[1]]]


def _is_link(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and isinstance(value[1], int)


class _Editor(_Graph):
    """`content`: a graph or a subgraph; the latter's links are mappings in place of lists."""

    FIELDS = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")
    INPUTS, OUTPUTS = -10, -20
    """What stands for a subgraph's own inputs and outputs at the ends of links."""

    def __init__(self, content: Json) -> None:
        self.content = content
        self.content.setdefault("links", [])

    def links(self) -> Iterator[Json]:
        for link in self.content["links"]:
            yield link if isinstance(link, dict) else dict(zip(self.FIELDS, link, strict=False))

    def nodes(self) -> dict[Any, _Node]:
        links = {link["id"]: link for link in self.links()}
        found = {}
        for node in self.content["nodes"]:
            inputs: Json = {}
            if node["type"] in _OLD:
                widgets, values = _OLD[node["type"]][1], node.get("widgets_values") or []
                inputs = dict(zip(widgets, values, strict=False))
            for slot in node.get("inputs") or []:
                link = links.get(slot.get("link"))
                if link is not None:
                    inputs[slot["name"]] = Link(link["origin_id"], link["origin_slot"])
            found[node["id"]] = _Node(node["id"], node["type"], inputs, node)
        return found

    def _new_id(self, kind: str) -> int:
        state = self.content.get("state")
        entries = self.content["nodes"] if kind == "node" else [*self.links()]
        last = max((x["id"] for x in entries if isinstance(x["id"], int)), default=0)
        if isinstance(state, dict):
            key = "lastNodeId" if kind == "node" else "lastLinkId"
            state[key] = max(last, state.get(key) or 0) + 1
            return int(state[key])
        key = f"last_{kind}_id"
        self.content[key] = max(last, self.content.get(key) or 0) + 1
        return int(self.content[key])

    def add(self, type_: str, inputs: Json, beside: _Node, number: int) -> Any:
        id_, kind = self._new_id("node"), NATIVE[type_]
        x, y = _place(beside.source.get("pos"))
        slots = [{"name": name, "type": of, "link": None} for name, of in kind.sockets.items()]
        node: Json = {
            "id": id_,
            "type": type_,
            "pos": [x + 30 * number, y - 190 * number],
            "size": [300, 22 * max(len(slots), len(kind.outputs)) + 26 * len(kind.widgets) + 24],
            "flags": {},
            "order": beside.source.get("order", 0),
            "mode": beside.source.get("mode", 0),
            "inputs": slots,
            "outputs": [{"name": n, "type": of, "links": None} for n, of in kind.outputs.items()],
            "properties": {"cnr_id": "comfyui-ip-adapter", "Node name for S&R": type_},
            "widgets_values": [inputs[name] for name in kind.widgets],
        }
        self.content["nodes"].append(node)
        for number_, name in enumerate(kind.sockets):
            if isinstance(inputs.get(name), Link):
                self._connect(inputs[name], node, number_, kind.sockets[name])
        return id_

    def _connect(self, link: Link, target: Json, slot: int, type_: str) -> None:
        values = self._new_id("link"), *link, target["id"], slot, type_
        as_mapping = any(isinstance(x, dict) for x in self.content["links"])
        entry = dict(zip(self.FIELDS, values, strict=True)) if as_mapping else [*values]
        self.content["links"].append(entry)
        target["inputs"][slot]["link"] = values[0]
        self._note(link, values[0])

    def gives_out(self, node: _Node, slot: int) -> bool:
        ends = ((x["origin_id"], x["origin_slot"], x["target_id"]) for x in self.links())
        return (node.id, slot, self.OUTPUTS) in ends

    def _note(self, origin: Link, link: Any, *, gone: bool = False) -> None:
        """Add a link to those of its origin, or take it out."""
        if origin.node == self.INPUTS:
            ends, key = self.content.get("inputs") or [], "linkIds"
        else:
            known: dict[Any, Json] = {n["id"]: n for n in self.content["nodes"]}
            node = known.get(origin.node, {})
            ends, key = node.get("outputs") or [], "links"
        if origin.slot < len(ends):
            others = [x for x in ends[origin.slot].get(key) or [] if x != link]
            ends[origin.slot][key] = others if gone else [*others, link]

    def remove(self, node: _Node, instead: Mapping[int, Link]) -> None:
        of_ids = {n["id"]: n for n in self.content["nodes"]}
        kept: list[Any] = []
        for entry in self.content["links"]:
            link = entry if isinstance(entry, dict) else dict(zip(self.FIELDS, entry, strict=False))
            if link["target_id"] == node.id:
                self._note(Link(link["origin_id"], link["origin_slot"]), link["id"], gone=True)
                continue
            if link["origin_id"] == node.id:
                new = instead.get(link["origin_slot"])
                if new is None:
                    target = of_ids.get(link["target_id"])
                    if target is not None:
                        target["inputs"][link["target_slot"]]["link"] = None
                    elif link["target_id"] == self.OUTPUTS and self.content.get("outputs"):
                        output = self.content["outputs"][link["target_slot"]]
                        output["linkIds"] = [
                            x for x in output.get("linkIds") or [] if x != link["id"]
                        ]
                    continue
                if isinstance(entry, dict):
                    entry["origin_id"], entry["origin_slot"] = new
                else:
                    entry[1:3] = new
                self._note(new, link["id"])
            kept.append(entry)
        self.content["links"][:] = kept
        self.content["nodes"][:] = [n for n in self.content["nodes"] if n["id"] != node.id]


def _place(position: Any) -> tuple[float, float]:
    """Return x and y, which older editors saved as a mapping."""
    if isinstance(position, Mapping):
        return float(position.get("0", 0)), float(position.get("1", 0))
    x, y = (*(position or ()), 0, 0)[:2]
    return float(x), float(y)


@dataclass
class _Application:
    """One IPA_Apply: a preset of layer weights and a weight, for one picture."""

    image: Any
    preset: str
    weight: float


def _convert(graph: _Graph) -> list[str]:
    report: list[str] = []
    shared: dict[Any, Any] = {}
    for node in [*graph.nodes().values()]:
        if node.type in _LOADERS:
            continue
        if node.type not in _OLD:
            if _is_old(node.type):
                reason = _NO_COUNTERPART.get(node.type.removesuffix("Batch"), "no counterpart")
                report.append(f"{node.type} ({node.id}): kept ({reason}).")
            continue
        current = graph.nodes()[node.id]  # what it stands behind may have been rewritten
        try:
            applied = _applications(current)
            last = _rewrite(graph, current, applied, shared)
        except _Kept as reason:
            report.append(f"{node.type} ({node.id}): kept ({reason}).")
            continue
        graph.remove(current, {0: last})
        made = " and ".join(
            f"'{a.preset}' at {a.weight:g}" if a.preset != "uniform" else f"at {a.weight:g}"
            for a in applied
        )
        batches = [
            what
            for name, what in (("attn_mask", "masks"), ("image_negative", "negative pictures"))
            if isinstance(current.inputs.get(name), Link)
        ]
        hint = f" A batch of {' or '.join(batches)} is dealt otherwise here." if batches else ""
        report.append(f"{node.type} ({node.id}): Apply IP-Adapter, {made}.{hint}")
    return [*report, *_loaders(graph)]


def _is_old(type_: str) -> bool:
    return type_.startswith(("IPAdapter", "IPAAdapter")) or type_ in _NO_COUNTERPART


def _loaders(graph: _Graph) -> Iterator[str]:
    """Take out the loaders that nothing needs any more."""
    for node in [n for n in graph.nodes().values() if n.type in _LOADERS]:
        output = 0 if node.type == "IPAdapterModelLoader" else 1
        users = [
            other.type
            for other in graph.nodes().values()
            for value in other.inputs.values()
            if isinstance(value, Link) and str(value.node) == str(node.id) and value.slot == output
        ]
        if graph.gives_out(node, output):
            users.append("an output of the subgraph")
        if users:
            yield f"{node.type} ({node.id}): kept, for {', '.join(sorted(set(users)))}."
            continue
        model = node.inputs.get("model")
        graph.remove(node, {0: model} if isinstance(model, Link) else {})
        yield f"{node.type} ({node.id}): taken out."


def _applications(node: _Node) -> list[_Application]:
    """Return what has to be applied. Raises _Kept where native nodes differ."""
    given = {**_DEFAULTS, **node.inputs}
    if node.type == "IPAdapterStyleComposition" and "combine_embeds" not in node.inputs:
        given["combine_embeds"] = "average"
    for name in _OLD[node.type][1]:
        if isinstance(given[name], Link):
            raise _Kept(f"'{name}' comes over a link")
        if type(given[name]) not in (type(_DEFAULTS[name]), int):
            raise _Kept(f"'{name}' is {given[name]!r}")
    for name in ("model", _OLD[node.type][0]):
        if not isinstance(given.get(name), Link):
            raise _Kept(f"nothing is connected to '{name}'")
    if given["start_at"] > given["end_at"]:
        raise _Kept("start_at lies after end_at, so that it never acts")
    if given["combine_embeds"] not in ("concat", "average"):
        raise _Kept(f"'{given['combine_embeds']}' over the pictures of a batch")
    if given["combine_embeds"] == "average" and isinstance(given.get("image_negative"), Link):
        raise _Kept("the average beside a negative picture takes its first row alone")
    image, weight = given.get(_OLD[node.type][0]), given["weight"]
    if node.type == "IPAdapterStyleComposition":
        composition = given.get("image_composition")
        composition = composition if isinstance(composition, Link) else image
        style = "strong style" if given["expand_style"] else "style"
        return [
            _Application(image, style, given["weight_style"]),
            _Application(composition, "composition", given["weight_composition"]),
        ]
    if node.type.startswith("IPAdapterPrecise"):
        of_style = node.type == "IPAdapterPreciseStyleTransfer"
        boost = given["style_boost" if of_style else "composition_boost"]
        shown, away = ("style", "composition") if of_style else ("composition", "style")
        if boost == weight:
            return [_Application(image, f"precise {shown}", weight)]
        made = [_Application(image, shown, weight)]
        return [*made, _Application(image, f"away from {away}", boost)] if boost else made
    type_ = ONCE_CALLED.get(given["weight_type"], given["weight_type"])
    if node.type == "IPAdapter":
        type_ = "style transfer" if type_.startswith("style") else type_
        type_ = {"standard": "linear", "prompt is more important": "ease out"}.get(type_, type_)
    if type_ == "style and composition":  # the composition's weight was always 1
        return [_Application(image, "style", weight), _Application(image, "composition", 1.0)]
    type_ = type_ if type_ in WEIGHT_TYPES else "linear"
    if type_ not in _PRESETS:
        raise _Kept(f"the ramps of '{type_}' are others here")
    return [_Application(image, _PRESETS[type_], weight)]


def _rewrite(
    graph: _Graph, node: _Node, applied: Sequence[_Application], shared: dict[Any, Any]
) -> Link:
    """Add the native nodes, and return the model that they give."""
    given = {**_DEFAULTS, **node.inputs}
    if node.type == "IPAdapterStyleComposition" and "combine_embeds" not in node.inputs:
        given["combine_embeds"] = "average"
    model = given.get("model")
    adapter, clip_vision = _loaded(graph, given, node, shared)
    combine, scaling = given["combine_embeds"], given["embeds_scaling"]
    window = {"start_at": given["start_at"], "end_at": given["end_at"]}
    negative = given.get("image_negative")
    helpers = 1

    def once(type_: str, inputs: Json) -> Link:
        nonlocal helpers
        mode = node.source.get("mode", 0)  # what is muted with a node serves no other one
        key = type_, mode, tuple(sorted(inputs.items(), key=lambda item: item[0]))
        if key not in shared:
            shared[key] = Link(graph.add(type_, inputs, node, helpers), 0)
            helpers += 1
        made: Link = shared[key]
        return made

    plain = _plain_model(graph, model)
    for number, one in enumerate(applied):
        encoded: Json = {"clip_vision": clip_vision, "image": one.image, "crop": "center"}
        if isinstance(negative, Link):
            encoded["negative_image"] = negative
        inputs: Json = {"model": model, "adapter": adapter, "weight": one.weight, **window}
        inputs |= {"image_prompt": once("IPA_EncodeImage", encoded), "combine": combine}
        inputs["lora_weight"] = 1.0
        if isinstance(given.get("attn_mask"), Link):
            inputs["mask"] = given["attn_mask"]
        if one.preset != "uniform" or scaling != "V only":
            weights = {"model": plain, "preset": one.preset, "changes": "", "scaling": scaling}
            inputs["layer_weights"] = once("IPA_LayerWeights", weights)
        model = Link(graph.add("IPA_Apply", inputs, node, -number), 0)
    return model  # type: ignore[return-value]


def _plain_model(graph: _Graph, model: Any) -> Any:
    """Return the model before any image was applied: only its layers are looked at."""
    nodes = {str(id_): node for id_, node in graph.nodes().items()}
    while isinstance(model, Link):
        node = nodes.get(str(model.node))
        passes = node is not None and (node.type == "IPA_Apply" or node.type in _LOADERS)
        if node is None or not passes or not isinstance(node.inputs.get("model"), Link):
            break
        model = node.inputs["model"]
    return model


def _loaded(graph: _Graph, given: Json, node: _Node, shared: dict[Any, Any]) -> tuple[Link, Link]:
    """Return the adapter and the image encoder, by native loaders."""
    source = given.get("ipadapter")
    nodes = {str(id_): other for id_, other in graph.nodes().items()}
    loader = nodes.get(str(source.node)) if isinstance(source, Link) else None
    while loader is not None and loader.type == "Reroute":
        source = next((x for x in loader.inputs.values() if isinstance(x, Link)), None)
        loader = nodes.get(str(source.node)) if source is not None else None
    if loader is None or loader.type not in _LOADERS:
        raise _Kept("its adapter comes from another pack's node")
    clip_vision = given.get("clip_vision")
    if loader.type == "IPAdapterModelLoader":
        name = loader.inputs.get("ipadapter_file")
        if isinstance(name, Link) or not isinstance(clip_vision, Link):
            raise _Kept("its loader's file comes over a link, or it has no image encoder")
        key, inputs = "IPA_LoadAdapter", {"adapter_name": name}
    else:
        preset = _OF_PRESET.get(str(loader.inputs.get("preset")))
        if preset is None:
            raise _Kept(f"there is no preset {loader.inputs.get('preset')!r} here")
        if preset == _LIGHT:
            raise _Kept("its loader takes v1.1 of light before v1.0, which no preset does here")
        key = "IPA_AutoLoad"
        inputs = {"model": _plain_model(graph, loader.inputs.get("model")), "preset": preset}
    known = key, str(loader.id)
    if known not in shared:
        shared[known] = graph.add(key, inputs, loader, 0)
    adapter = Link(shared[known], 0)
    if not isinstance(clip_vision, Link):
        clip_vision = Link(shared[known], 1)
    return adapter, clip_vision
