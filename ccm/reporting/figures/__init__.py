"""Figures of finished runs: one module per kind of figure, and the gallery of all (Method 10)."""
