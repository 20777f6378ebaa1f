"""A file is written whole or not at all."""

from __future__ import annotations

import os
import stat
import subprocess
import sys

import pytest
from comfyui_ip_adapter.ip_adapter_core.files.atomic import atomic


def test_old_file_stands_until_the_new_one_is_whole(tmp_path):
    target = tmp_path / "file.txt"
    target.write_text("old")
    with atomic(target, durable=True) as temporary:
        temporary.write_text("new")
        assert target.read_text() == "old"
    assert target.read_text() == "new"
    assert os.listdir(tmp_path) == ["file.txt"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, OSError])
def test_failure_leaves_the_old_file_and_nothing_else(tmp_path, error):
    target = tmp_path / "file.txt"
    target.write_text("old")
    with pytest.raises(error), atomic(target) as temporary:
        temporary.write_text("half")
        raise error
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["file.txt"]


def test_permissions_are_those_of_open_however_the_block_writes(tmp_path):
    plain = tmp_path / "plain"
    plain.touch()
    with atomic(tmp_path / "file") as temporary:
        temporary.unlink()
        os.close(os.open(temporary, os.O_CREAT | os.O_WRONLY, 0o600))
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


def test_two_writers_do_not_meet(tmp_path):
    with atomic(tmp_path / "file") as first, atomic(tmp_path / "file") as second:
        assert first != second
        first.write_text("1")
        second.write_text("2")
    assert (tmp_path / "file").read_text() == "1"  # closed last


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_kill_leaves_no_part_under_the_name(tmp_path):
    target = tmp_path / "file"
    code = (
        "import importlib.util, os, signal, sys\n"
        "spec = importlib.util.spec_from_file_location('atomic', sys.argv[1])\n"
        "module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module)\n"
        "with module.atomic(sys.argv[2]) as temporary:\n"
        "    temporary.write_text('half'); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    source = sys.modules[atomic.__module__].__file__
    done = subprocess.run([sys.executable, "-c", code, str(source), str(target)], check=False)
    assert done.returncode == -9
    assert not target.exists()
