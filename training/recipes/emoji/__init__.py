"""Adapters for the drawings of seven designers, from open packages of emoji."""
