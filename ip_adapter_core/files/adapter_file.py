"""Checkpoint files of IP-Adapters: reading, recognising by shape, and writing."""

from __future__ import annotations

import functools
import json
import os
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as serialise
from torch import Tensor, nn

from ..adapter import PROJECTIONS, AdapterSpec, IPAdapter
from ..resampler import DIM_HEAD
from ..variants import Variant
from .header import MAX_HEADER, Shape, Shaped
from .unsupported import unsupported_kind

# The tensor whose presence decides for a projection.
SIGNATURES: dict[Variant, str] = {
    "base": "proj.weight",
    "plus": "latents",
    "full": "proj.3.weight",
}
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
EXTENSIONS = (".safetensors", ".sft", ".bin", ".pt", ".pth", ".ckpt")

OLD_FORMAT = (  # its tensors lie between the pickles
    "it is of torch's format before 1.6, which cannot be recognised without reading all of it: "
    "choose it in a loader of its own, or save it as .safetensors"
)

_LAYER = re.compile(r"ip_adapter\.(\d{1,4})\.to_([kv])_ip\.weight")


class CheckpointError(ValueError):
    """A file that is no usable IP-Adapter. The message names file, finding and remedy."""


def load(path: str | os.PathLike[str], *, operations: Any = nn) -> IPAdapter:
    """Read a base, fine-grained or full IP-Adapter for SD1.5 or SDXL.

    `.safetensors`, or `.bin`/`.pt` as torch writes them (tensors only: code in a pickle is
    never run). Tensors keep the file's dtype. Raises CheckpointError for everything that is not
    a complete and finite adapter of a supported kind.
    """
    weights = read(path)
    name = os.path.basename(path)
    spec = recognise(weights, name)
    _check_finite(weights, name)
    adapter = IPAdapter(spec, operations=operations, device="meta")
    adapter.load_state_dict(weights, assign=True)
    return adapter


def trained_with(metadata: Mapping[str, str]) -> str | None:
    """The image encoder's name that this repository's training notes in a file's metadata."""
    try:
        return str(json.loads(metadata["ip_adapter"])["image_encoder"])
    except (ValueError, KeyError, TypeError):
        return None


def recognise(weights: Mapping[str, Shaped], name: str) -> AdapterSpec:
    """The adapter that tensors of these names, shapes and precisions make, all of them together.
    Raises CheckpointError if that is none, or one of an unsupported kind."""
    kind = unsupported_kind(weights)
    if kind is not None:
        raise CheckpointError(
            f"'{name}' is {kind}, which this pack does not support. Supported are the base, "
            "fine-grained (plus) and full IP-Adapters for SD1.5 and SDXL."
        )
    spec = infer_spec(weights, name)
    _check(weights, _layout(spec), name)
    return spec


@functools.lru_cache(maxsize=32)  # a folder holds many files of few kinds
def _layout(spec: AdapterSpec) -> dict[str, Shape]:
    """What `IPAdapter(spec)` holds. Its many layers are not built, which would take the search
    of a folder twice the time."""
    projection = PROJECTIONS[spec.variant](**spec.sizes, device="meta").state_dict()
    layout = {f"image_proj.{key}": Shape(tuple(x.shape), x.dtype) for key, x in projection.items()}
    for i, width in enumerate(spec.layer_dims):
        for kind in "kv":
            shape = Shape((width, spec.cross_attention_dim), torch.float32)
            layout[f"ip_adapter.{2 * i + 1}.to_{kind}_ip.weight"] = shape
    return layout


def save(adapter: IPAdapter, path: str | os.PathLike[str], metadata: dict[str, str]) -> None:
    """Write the official layout as fp16 safetensors; atomic: `path` is never half-written."""
    save_weights(adapter.state_dict(), path, metadata)


def save_weights(
    weights: Mapping[str, Tensor], path: str | os.PathLike[str], metadata: dict[str, str]
) -> None:
    """`save` of an adapter's `state_dict`, however it was come by."""
    half = {k: v.detach().to("cpu", torch.float16).contiguous() for k, v in weights.items()}
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        # Not save_file: that writes files which only their owner may read.
        temporary.write_bytes(serialise(half, metadata))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """All tensors of a file under dotted keys. Raises CheckpointError if that cannot be had."""
    name = os.path.basename(path)
    if file_format(path) == "safetensors":
        return _read_safetensors(path, name)
    return read_pickle(path)


def file_format(path: str | os.PathLike[str]) -> Literal["safetensors", "zip", "pickle"]:
    """What a file's first bytes tell: `zip` is torch's format, `pickle` the one before torch 1.6.
    Raises CheckpointError for a file that is none of these, and says what it is."""
    name = os.path.basename(path)
    try:
        with open(path, "rb", buffering=0) as file:
            head = file.read(64)
    except OSError as error:
        raise CheckpointError(f"'{path}' cannot be read: {error.strerror}.") from error
    if not head:
        raise CheckpointError(f"'{name}' is empty (0 bytes). Download it again.")
    if head.startswith(b"version https://git-lfs"):
        raise CheckpointError(
            f"'{name}' is a git-lfs pointer, not the weights. Fetch the file itself "
            "('git lfs pull', or the download button of the model's page)."
        )
    # Before anything that looks at the first byte: there stands a length, any byte can.
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= MAX_HEADER:
        return "safetensors"
    if head.lstrip()[:1] == b"<":
        raise CheckpointError(
            f"'{name}' is a web page, not weights: the download saved an error or login page. "
            "Download it again."
        )
    if not head.startswith((b"PK", b"\x80")):
        raise CheckpointError(
            f"'{name}' is neither a safetensors file nor one that torch wrote; it begins with "
            f"{head[:24]!r}. Download it again."
        )
    return "zip" if head.startswith(b"PK") else "pickle"


def _read_safetensors(path: str | os.PathLike[str], name: str) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, ValueError, OSError) as error:
        raise CheckpointError(
            f"'{name}' is a damaged safetensors file, probably cut short while downloading "
            f"({error}). Download it again."
        ) from error


def read_pickle(path: str | os.PathLike[str], **how: Any) -> dict[str, Tensor]:
    """`read` of a file that torch wrote; `how` goes to `torch.load`."""
    name = os.path.basename(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, **how)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        if named is None:
            raise CheckpointError(
                f"'{name}' is no list of tensors that torch can read: it is damaged, or holds "
                "other objects. Download it again, or use a .safetensors version."
            ) from None
        raise CheckpointError(
            f"'{name}' was refused: expected a file of tensors only, but it asks for {named[1]}, "
            "which could run code on this machine. Use a .safetensors version, or one from a "
            "source that stores plain tensors."
        ) from None  # torch's text explains how to load it all the same
    except MemoryError:
        raise
    except Exception as error:  # torch raises a dozen kinds for damaged archives
        found = next(iter(str(error).splitlines()), "")
        raise CheckpointError(
            f"'{name}' cannot be read as a torch file; it is damaged, cut short, or something "
            f"else ({type(error).__name__}: {found}). Download it again."
        ) from error
    return dict(_flatten(content, name))


def _flatten(content: Any, name: str, prefix: str = "", depth: int = 2) -> Any:
    if isinstance(content, Tensor):
        if not _is_plain(content):
            raise CheckpointError(
                f"'{name}' holds a sparse, nested, expanded or dataless tensor at '{prefix}', "
                "where a plain one was expected. It was saved by something else."
            )
        yield prefix, content
    elif isinstance(content, Mapping) and depth:
        for key, value in content.items():
            yield from _flatten(value, name, f"{prefix}.{key}" if prefix else str(key), depth - 1)
    else:
        raise CheckpointError(
            f"'{name}' holds {type(content).__name__} at '{prefix or 'top level'}', where a "
            "tensor was expected. It is no IP-Adapter, or was saved by something else."
        )


def _is_plain(tensor: Tensor) -> bool:
    if tensor.is_meta or tensor.is_nested or tensor.layout != torch.strided:
        return False
    return tensor.nbytes <= tensor.untyped_storage().nbytes()  # no billion views of one number


def infer_spec(weights: Mapping[str, Shaped], name: str) -> AdapterSpec:
    """Recognise the adapter from names and shapes of its tensors, never from the file's name."""
    projection_weights = {
        key.removeprefix("image_proj."): value
        for key, value in weights.items()
        if key.startswith("image_proj.")
    }
    layers = sorted({int(m[1]) for m in map(_LAYER.fullmatch, weights) if m})
    if not projection_weights or not layers:
        lacking = "'image_proj.…'" if not projection_weights else "'ip_adapter.N.to_k_ip.weight'"
        raise CheckpointError(
            f"'{name}' is no IP-Adapter: it has no {lacking} tensors. Found {len(weights)} "
            f"tensors: {_few(weights)}."
        )
    kind = next((k for k, key in SIGNATURES.items() if key in projection_weights), None)
    if kind is None:
        raise CheckpointError(
            f"'{name}' has a projection of an unknown kind: expected one of "
            f"{', '.join('image_proj.' + key for key in SIGNATURES.values())}; found "
            f"{_few('image_proj.' + key for key in projection_weights)}."
        )
    expected = [2 * i + 1 for i in range(len(layers))]
    if layers != expected:
        missing = sorted(set(range(1, layers[-1] + 1, 2)) - set(layers))
        raise CheckpointError(
            f"'{name}' numbers its cross-attention layers {_few(layers)}; expected 1, 3, 5 … "
            + (f"without gaps, but {_few(missing)} is missing." if missing else "(odd).")
        )
    try:
        sizes = PROJECTIONS[kind].sizes(projection_weights)
        widths = tuple(weights[f"ip_adapter.{n}.to_k_ip.weight"].shape[0] for n in layers)
    except (KeyError, ValueError, IndexError, ZeroDivisionError) as error:
        raise CheckpointError(
            f"'{name}' is an incomplete {kind} adapter: a tensor that tells its sizes is missing "
            f"or has a wrong shape ({error}). Download it again."
        ) from error
    if 0 in sizes.values():
        raise CheckpointError(
            f"'{name}' has a {kind} projection of impossible shapes: {sizes}"
            + (f" (attention heads are {DIM_HEAD} wide)." if kind == "plus" else ".")
        )
    return AdapterSpec(kind, tuple(sizes.items()), widths)


def _check(found: Mapping[str, Shaped], expected: Mapping[str, Shaped], name: str) -> None:
    missing = [key for key in expected if key not in found]
    if missing:
        raise CheckpointError(
            f"'{name}' is incomplete: {len(missing)} of {len(expected)} tensors are missing: "
            f"{_few(missing)}. Download it again."
        )
    surplus = [key for key in found if key not in expected]
    if surplus:
        raise CheckpointError(
            f"'{name}' holds {len(surplus)} tensors that no supported IP-Adapter has: "
            f"{_few(surplus)}. It is another kind of model."
        )
    for key, reference in expected.items():
        tensor = found[key]
        if tensor.shape != reference.shape:
            raise CheckpointError(
                f"'{name}': '{key}' has shape {list(tensor.shape)}, expected "
                f"{list(reference.shape)} from the shapes of the other tensors."
            )
        if tensor.dtype not in DTYPES:
            raise CheckpointError(
                f"'{name}': '{key}' is stored as {tensor.dtype}, expected float32, float16 or "
                "bfloat16. Use an unquantised file."
            )


def _check_finite(weights: Mapping[str, Tensor], name: str) -> None:
    for key, tensor in weights.items():
        if not tensor.isfinite().all():
            raise CheckpointError(
                f"'{name}': '{key}' contains NaN or infinite values. The file is damaged, or "
                "its training diverged."
            )


def _few(names: Any, limit: int = 4) -> str:
    names = [str(name) for name in names]
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" … and {rest} more" if rest > 0 else "")
