"""Figures of a run (Method 10), drawn from what it stored."""
