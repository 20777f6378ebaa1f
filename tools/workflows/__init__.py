"""The example workflows: what they are made from, and what draws their images."""
