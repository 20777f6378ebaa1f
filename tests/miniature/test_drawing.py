"""Several servers share a task's images; each comes out where its reference is."""

from __future__ import annotations

import io
import threading
from types import SimpleNamespace

import pytest
from PIL import Image

from miniature.drawing import Drawer, Task


class Server:
    """Draws one grey for each noise, and waits with its first until another server draws too."""

    def __init__(self, meeting):
        self.meeting, self.busy, self.drawn = meeting, threading.Lock(), 0

    def run(self, prompt):
        assert self.busy.acquire(blocking=False), "a server was given two prompts at once"
        try:
            if not self.drawn:
                self.meeting.wait(timeout=20)
            self.drawn += 1
            nodes = {node["class_type"]: (name, node) for name, node in prompt.items()}
            _, sampler = nodes["KSampler"]
            file = io.BytesIO()
            Image.new("RGB", (8, 8), (sampler["inputs"]["seed"] % 256,) * 3).save(file, "PNG")
            return SimpleNamespace(images={nodes["SaveImage"][0]: [file.getvalue()]})
        finally:
            self.busy.release()


@pytest.mark.parametrize("count", [1, 2, 3])
def test_servers_share_the_work_and_the_order_stays(tmp_path, count):
    meeting = threading.Barrier(count)
    servers = [Server(meeting) for _ in range(count)]
    task = Task.of(12, seed=0)
    drawn = Drawer(servers, task, tmp_path)("text_and_image")
    assert drawn.shape == (12, 1, 3, 8, 8)
    shown = (drawn[:, 0, 0, 0, 0] * 255).round().int().tolist()
    assert shown == [seed % 256 for seed in task.seeds]
    assert sum(server.drawn for server in servers) == 12
    assert all(server.drawn for server in servers)


def test_what_a_server_raises_is_raised(tmp_path):
    class Failing:
        def run(self, prompt):
            raise RuntimeError("out of images")

    with pytest.raises(RuntimeError, match="out of images"):
        Drawer([Failing()], Task.of(8, seed=0), tmp_path)("text_and_image")
