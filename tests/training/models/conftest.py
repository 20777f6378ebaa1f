"""Small base models of each family, as diffusers folders and as single files."""

from __future__ import annotations

import shutil

import pytest
from safetensors.torch import save_file

from ip_adapter_core.variants import FAMILIES
from tests.support import small_models


@pytest.fixture(scope="session")
def folders(frozen):
    """A diffusers folder of each family."""
    return {family: frozen / family for family in FAMILIES}


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """A file of each family."""
    folder = tmp_path_factory.mktemp("files")
    found = {family: folder / f"{family}.safetensors" for family in FAMILIES}
    for family, path in found.items():
        save_file(small_models.single_file(family), path)
    return found


@pytest.fixture
def copied(tmp_path):
    """Copy a folder, so that a test can change it."""
    return lambda folder: shutil.copytree(folder, tmp_path / "copy")
