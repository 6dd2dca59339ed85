"""Does a run agree with what the paper printed?

In: scores of a run. Out: every printed quantity with its margin and verdict.
May import `experiment` and what that may.
"""
