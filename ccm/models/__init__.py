"""The models that are run, and where their weights come from.

In: a name, a folder, or a model in memory. Out: a loaded model, checked against what transformers
computes.
May import `method` and `errors`.
"""
