"""What is remembered of a file: all that is the file's, and nothing that passes."""

from __future__ import annotations

import pytest
from comfyui_ip_adapter.ip_adapter_core.files import catalogue
from comfyui_ip_adapter.ip_adapter_core.files.adapter_file import CheckpointError
from comfyui_ip_adapter.ip_adapter_core.files.tower_config import ImageEncoderError

from tests.support import sparse_files as sparse


def wrapped(kind):
    error = kind("'a' cannot be read")
    error.__cause__ = OSError(5, "Input/output error")
    return error


@pytest.fixture
def failing(tmp_path, monkeypatch):
    """An adapter and an encoder, the first look at which fails as told; what both looks find."""
    files = {
        "adapters": sparse.write(tmp_path / "a.safetensors", sparse.ADAPTERS["sd15"]),
        "encoders": sparse.write(tmp_path / "e.safetensors", sparse.vision()),
    }
    opening = {"adapters": "read_safetensors", "encoders": "encoder_sizes"}

    def look(kind, error):
        real, errors = getattr(catalogue, opening[kind]), [error]

        def first_fails(path):
            if errors:
                raise errors.pop()
            return real(path)

        monkeypatch.setattr(catalogue, opening[kind], first_fails)
        file = catalogue.File(files[kind].name, str(files[kind]))
        search = getattr(catalogue, kind)
        return lambda: search([file])[0]

    return look


@pytest.mark.parametrize("kind", ["adapters", "encoders"])
@pytest.mark.parametrize(
    "error",
    [
        OSError(116, "Stale file handle"),
        PermissionError(13, "Permission denied"),
        wrapped(CheckpointError),
        wrapped(ImageEncoderError),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_the_machine_could_not_do_is_tried_again(failing, kind, error):
    found = failing(kind, error)
    assert isinstance(found(), catalogue.Unusable)
    assert not isinstance(found(), catalogue.Unusable)


@pytest.mark.parametrize("kind", ["adapters", "encoders"])
@pytest.mark.parametrize("error", [RuntimeError("damaged"), CheckpointError("'a' is damaged")])
def test_what_the_file_is_to_blame_for_is_remembered(failing, kind, error):
    found = failing(kind, error)
    assert "damaged" in found().reason
    assert "damaged" in found().reason


@pytest.mark.parametrize("kind", ["adapters", "encoders"])
def test_a_full_memory_is_no_finding_about_a_file(failing, kind):
    found = failing(kind, MemoryError())
    with pytest.raises(MemoryError):
        found()
    assert not isinstance(found(), catalogue.Unusable)
