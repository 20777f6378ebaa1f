"""The miniature world: small pictures made by rule, and models trained on them.

``python -m miniature`` builds everything that lies in ``miniature/`` anew.
"""
