"""The miniature: images made by rule, and models trained on them, beside their weights.

`python -m miniature` builds everything that lies in this folder anew.
"""
