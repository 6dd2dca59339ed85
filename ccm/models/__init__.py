"""What is run, and where does it come from?

In: a name, a folder, or a model in memory. Out: a model that is loaded, checked and held to what
transformers computes.
May import `method` and `errors`.
"""
