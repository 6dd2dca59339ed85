"""A run of the experiment, from its configuration to its scores.

In: a configuration. Out: a run folder of tables and scores, resumed where it stopped.
May import `decoding`, `models`, `method` and `errors`.
"""
