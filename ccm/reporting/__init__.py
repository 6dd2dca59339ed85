"""What do people see of a run?

In: finished run folders. Out: figures, tables, an HTML report.
May import everything but `cli` and `organism`.
"""
