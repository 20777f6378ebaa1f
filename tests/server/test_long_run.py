"""One server, many prompts: no growing memory."""

from __future__ import annotations

import contextlib

import numpy as np
import psutil
import pytest

LARGE = "ip-adapter-full-face_sd15.safetensors"  # 257 tokens: K' and V' of a prompt take 5 MB
GROWTH = 48 * 2**20  # bytes over the second half; were each prompt's K' and V' kept, 75 or 250


def resident(process: psutil.Process) -> int:
    """Bytes of the process and of those that it started."""
    total = 0
    for each in (process, *process.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            total += each.memory_info().rss
    return total


@pytest.mark.parametrize("prompts", [30, pytest.param(100, marks=pytest.mark.nightly)])
def test_many_prompts_leave_no_growing_memory(server, server_id, graph, prompts):
    process, sizes = psutil.Process(server_id), []
    for number in range(prompts):
        made = graph().set("IPA_LoadAdapter", adapter_name=LARGE)
        made.set("IPA_Apply", weight=0.05 + number / prompts, end_at=0.999)
        result = server.run(made)
        assert made.of("IPA_Apply") in result.executed
        if number:
            assert made.of("IPA_EncodeImage") in result.cached
            assert made.of("IPA_LoadAdapter") in result.cached
        sizes.append(resident(process))
    half = prompts // 2
    assert np.mean(sizes[-10:]) - np.mean(sizes[half - 10 : half]) < GROWTH, sizes
