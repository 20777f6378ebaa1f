"""Several servers share a task's images; each comes out where its reference is."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest
from PIL import Image

from miniature.drawing import Drawer, Task
from tests.support import image_folders
from tools.workflows.api import of_class


class Server:
    """Draws one grey for each noise, and waits with its first until another server draws too."""

    def __init__(self, meeting):
        self.meeting, self.busy, self.drawn = meeting, threading.Lock(), 0

    def run(self, prompt):
        assert self.busy.acquire(blocking=False), "a server was given two prompts at once"
        if not self.drawn:
            self.meeting.wait(timeout=20)
        self.drawn += 1
        (sampler,) = of_class(prompt, "KSampler")
        (saver,) = (name for name, node in prompt.items() if node["class_type"] == "SaveImage")
        grey = Image.new("RGB", (8, 8), (sampler["seed"] % 256,) * 3)
        self.busy.release()
        return SimpleNamespace(images={saver: [image_folders.encoded(grey)]})


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
    failing = SimpleNamespace(run=lambda prompt: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        Drawer([failing], Task.of(8, seed=0), tmp_path)("text_and_image")
