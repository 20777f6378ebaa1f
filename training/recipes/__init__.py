"""Whole trainings that anyone can repeat, from pictures to figures."""
