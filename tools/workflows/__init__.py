"""The example workflows, each described once; `tools/build_workflows.py` writes the files."""
