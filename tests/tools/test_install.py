"""ComfyUI is found where it is, in the promised order, and absence is explained."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tools.comfyui import install as host

AROUND = host._around


def comfyui(folder: Path) -> Path:
    """Make an empty tree that looks like ComfyUI's source."""
    (folder / "comfy").mkdir(parents=True)
    for name in ("main.py", "nodes.py", "folder_paths.py"):
        (folder / name).touch()
    return folder


@pytest.fixture
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a home without ComfyUI, for a pack that lies in none."""
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setattr(Path, "home", lambda: home)
    monkeypatch.setattr(host, "_around", lambda: None)
    monkeypatch.delenv(host.PATH_VARIABLE, raising=False)
    return home


def test_the_variable_comes_first_and_the_install_around_the_pack_second(
    nowhere, tmp_path, monkeypatch
):
    comfyui(host.default_workspace())
    around, named = comfyui(tmp_path / "ComfyUI"), comfyui(tmp_path / "named")
    monkeypatch.setattr(host, "_around", AROUND)
    monkeypatch.setattr(host, "ROOT", around / "custom_nodes" / "a-pack")
    assert host.locate() == around
    monkeypatch.setenv(host.PATH_VARIABLE, str(named))
    assert host.locate() == named


def test_a_wrong_variable_is_an_error_that_says_what_to_do(nowhere, tmp_path, monkeypatch):
    comfyui(host.default_workspace())
    monkeypatch.setenv(host.PATH_VARIABLE, str(tmp_path / "nothing"))
    with pytest.raises(host.HostMissing) as raised:
        host.locate()
    for part in ("nothing", host.PATH_VARIABLE, "expected", "main.py", "unset"):
        assert part in str(raised.value)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="paths as on Linux")
def test_comfy_clis_workspaces_are_found_configured_before_recent_before_default(nowhere, tmp_path):
    assert host.locate() is None
    default = comfyui(nowhere / "comfy" / "ComfyUI")
    assert host.locate() == default
    folder = nowhere / ".config" / "comfy-cli"
    folder.mkdir(parents=True)
    (folder / "config.ini").write_text("no section\n")
    assert host.locate() == default, "a broken configuration is passed over"
    configured, recent = tmp_path / "configured", tmp_path / "recent"
    (folder / "config.ini").write_text(
        f"[DEFAULT]\ndefault_workspace = {configured}\nrecent_workspace = {recent}"
    )
    assert host.locate() == default
    for place in (recent, configured):
        comfyui(place)
        assert host.locate() == place


def test_require_installs_where_there_is_none(nowhere, tmp_path, monkeypatch):
    monkeypatch.setattr(host, "install", lambda: comfyui(tmp_path / "installed"))
    assert host.require() == tmp_path / "installed"


def test_where_none_can_be_installed_the_remedy_is_said(nowhere, monkeypatch):
    monkeypatch.setattr(host.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(host.HostMissing, match=r"nor comfy-cli.*COMFYUI_PATH"):
        host.require()
    monkeypatch.setattr(host.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(host, "_shown", lambda command: 1)
    with pytest.raises(host.HostMissing, match=r"comfy-cli could not install.*COMFYUI_PATH"):
        host.require()


def test_the_packs_modules_have_one_identity_and_shadow_nothing(host, pack):
    """``host``: the fixture; afterwards ``nodes`` is ComfyUI's, and ours is below the pack."""
    import comfyui_ip_adapter.ip_adapter_core.resampler as resampler

    import nodes

    assert Path(nodes.__file__) == host / "nodes.py"
    assert sys.modules["comfyui_ip_adapter"] is pack
    assert resampler is sys.modules["comfyui_ip_adapter.ip_adapter_core.resampler"]


def test_booting_refuses_a_shadowed_name(tmp_path, monkeypatch):
    stranger = type(sys)("comfy")
    stranger.__file__ = str(tmp_path / "comfy.py")
    monkeypatch.setitem(sys.modules, "comfy", stranger)
    with pytest.raises(RuntimeError, match="'comfy' is already loaded from"):
        host.boot(comfyui(tmp_path / "ComfyUI"))


def test_what_an_installer_says_is_passed_on_without_framed_tracebacks(capfd):
    says = "print('Cloning'); print('╭──╮'); print('│ x │'); print('fatal: no host'); exit(3)"
    assert host._shown([sys.executable, "-X", "utf8", "-c", says]) == 3
    assert capfd.readouterr().err.split("\n") == ["Cloning", "fatal: no host", ""]
