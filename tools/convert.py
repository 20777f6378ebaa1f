"""Rewrite a workflow of ComfyUI_IPAdapter_plus with this pack's own nodes.

    python -m tools.convert OLD.json NEW.json

Takes what the editor saves and what Export (API) gives. Says of every node of the old pack what
became of it; those without a counterpart that computes the same stay as they are, and run.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ip_adapter_core.files.atomic import atomic
from ip_adapter_core.ipadapter_plus.convert import convert


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    options = parser.parse_args()
    try:
        made = convert(json.loads(options.old.read_text("utf-8")))
    except (OSError, ValueError) as error:
        parser.error(f"'{options.old}': {error}")
    with atomic(options.new) as temporary:
        temporary.write_text(json.dumps(made.workflow, indent=2, ensure_ascii=False), "utf-8")
    print("\n".join(made.report) or "There is no node of ComfyUI_IPAdapter_plus.")


if __name__ == "__main__":
    main()
