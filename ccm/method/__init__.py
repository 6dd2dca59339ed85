"""What the paper computes, as pure functions.

In: plain numbers and texts. Out: prompts, neuron measures, replacement values, sources, scores.
Runs no model; may import `errors` only.
"""
