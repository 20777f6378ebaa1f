"""The nodes, an image encoder and a folder of adapters for the nodes."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch

from tests.support import sparse_files as sparse
from tests.support.checkpoint_layouts import SD2, SD15, SDXL


@pytest.fixture(scope="session")
def nodes(pack) -> dict[str, type]:
    """The pack's nodes by their ids, as the host gets them."""

    async def listed():
        extension = await pack.comfy_entrypoint()
        await extension.on_load()
        return await extension.get_node_list()

    return {node.GET_SCHEMA().node_id: node for node in asyncio.run(listed())}


@pytest.fixture(scope="session")
def clip_vision(small):
    """A random image encoder of the widths that the adapters of `small` read."""
    return small.clip_vision()


@pytest.fixture
def folder(host, tmp_path, monkeypatch) -> Path:
    """The only models folder that the host knows; `ipadapter` is not registered yet."""
    import folder_paths

    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path))
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", {})
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    (tmp_path / "ipadapter").mkdir()
    return tmp_path / "ipadapter"


@pytest.fixture
def prompts_folder(folder, tmp_path, monkeypatch) -> Path:
    """`image_prompts` in the output folder, which like the input folder is the test's own."""
    import folder_paths

    for name in ("output", "input", "temp"):
        (tmp_path / name).mkdir()
        monkeypatch.setattr(folder_paths, f"{name}_directory", str(tmp_path / name))
    (tmp_path / "output" / "image_prompts").mkdir()
    return tmp_path / "output" / "image_prompts"


@pytest.fixture
def save(nodes, prompts_folder) -> type:
    """IPA_SavePrompt."""
    return nodes["IPA_SavePrompt"]


@pytest.fixture
def load(nodes, prompts_folder) -> type:
    """IPA_LoadPrompt."""
    return nodes["IPA_LoadPrompt"]


@pytest.fixture
def file(small, prompts_folder):
    """Writes a random prompt at a path below the test's folder."""
    from comfyui_ip_adapter.ip_adapter_core import prompt_file

    def file(relative: str, seed: int = 20) -> Path:
        path = prompts_folder.parents[1] / relative
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        prompt_file.save(small.images(2, seed=seed), path)
        return path

    return file


@pytest.fixture
def saved(small):
    """Save a random adapter at a path, and return its module."""
    from comfyui_ip_adapter.ip_adapter_core.files import adapter_file as checkpoint

    def saved(path: Path, **made):
        module = small.adapter(**made).module
        checkpoint.save(module, path, {})
        return module

    return saved


@pytest.fixture
def encoders(folder, monkeypatch):
    """The host's folder of image encoders, empty."""
    import folder_paths

    made = folder.parent / "clip_vision"
    made.mkdir()
    known = folder_paths.folder_names_and_paths
    monkeypatch.setitem(known, "clip_vision", ([str(made)], folder_paths.supported_pt_extensions))
    return made


@pytest.fixture
def find(real, folder, encoders):
    """What the node would load: names of adapter and encoder."""
    from comfyui_ip_adapter.ip_adapter_core.comfyui import loaders
    from comfyui_ip_adapter.nodes import paths

    def find(family, preset):
        choice = loaders.find_files(real[family], preset, paths.adapters(), paths.encoders())
        find.said = loaders.describe_choice(choice)
        return choice.adapter.name, choice.encoder.name

    return find


@pytest.fixture
def put(folder, encoders):
    """Files of real sizes, from names that say nothing or the wrong thing, to what they are."""

    def put(adapters=(), image_encoders=()):
        for name, kind in dict(adapters).items():
            sparse.write(folder / name, sparse.ADAPTERS[kind])
        for name, layout in dict(image_encoders).items():
            sparse.write(encoders / name, layout)

    return put


@pytest.fixture(scope="session")
def real(host):
    """ModelPatchers of the families, in the host's real layouts and sizes, without weights."""
    import comfy.supported_models as known
    from comfy.model_patcher import ModelPatcher

    kinds = {"SD1.5": (known.SD15, SD15), "SD2": (known.SD20, SD2), "SDXL": (known.SDXL, SDXL)}
    kinds["Kolors"] = kinds["SDXL"]
    found, cpu = {}, torch.device("cpu")
    for name, (kind, size) in kinds.items():
        config = kind({})
        config.unet_config = {**size.comfy_config(), "dtype": torch.float16}
        model = config.get_model({}, device="meta")
        if name == "Kolors":  # as packs for it build it
            model.diffusion_model.encoder_hid_proj = torch.nn.Linear(4096, 2048, device="meta")
        found[name] = ModelPatcher(model, load_device=cpu, offload_device=cpu)
    return found


@pytest.fixture(autouse=True)
def _as_in_the_host():
    torch.manual_seed(0)
    with torch.inference_mode():
        yield
