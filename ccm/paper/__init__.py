"""Agreement of runs with what the paper printed.

In: finished runs, and the printed numbers. Out: every printed quantity with its margin and verdict, the
paper's claims, and the tolerance report. May import `experiment` and what that may.
"""
