"""The trained model organism: a tiny language model of an invented world, with planted neurons."""

from pathlib import Path

__all__ = ["CHECKPOINT"]

CHECKPOINT: Path = Path(__file__).resolve().parent / "checkpoint"
"""The finished model folder: Hugging Face layout, `facts.csv`, `relations.csv` and its card."""
