"""The blueprints' files are what their descriptions give."""

from __future__ import annotations

from tools.build_subgraphs import FOLDER, build


def test_files_are_what_the_descriptions_give(object_info):
    made = build(object_info)
    assert sorted(made) == sorted(path.name for path in FOLDER.iterdir())
    for name, text in made.items():
        assert (FOLDER / name).read_text("utf-8") == text, (
            f"subgraphs/{name} is out of step: run `python -m tools.build_subgraphs`"
        )
