"""Entropy neurons and context copying: a small, exact core for a regression and benchmark suite."""

__version__ = "0.1.0"
