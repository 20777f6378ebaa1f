"""Cached features: their files, writing and reading them."""
