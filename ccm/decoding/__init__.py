"""Decoding of prompts under all neuron sets at once.

In: a model, prompts as tokens, ablations. Out: answers and first-token readings of every set.
May import `models`, `method` and `errors`.
"""
