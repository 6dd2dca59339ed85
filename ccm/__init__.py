"""Entropy neurons and context copying: a small, exact core for a regression and benchmark suite.

"Method 8" in a docstring of this package means section 8 of `docs/method.md`.
"""

__version__ = "0.1.0"
