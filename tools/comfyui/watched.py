"""Run a script that ends when its parent does: ``python watched.py main.py [argument …]``.

The parent keeps this process's standard input open. When the parent goes away, however it
does, the pipe closes and the script ends too, so no server is left behind.
"""

from __future__ import annotations

import os
import runpy
import sys
import threading


def _end_with_parent() -> None:
    while os.read(0, 4096):  # not sys.stdin: its lock would stand in the way of a normal end
        pass
    os._exit(1)


if __name__ == "__main__":
    script = os.path.abspath(sys.argv[1])
    sys.argv = sys.argv[1:]
    sys.path[0] = os.path.dirname(script)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    runpy.run_path(script, run_name="__main__")
