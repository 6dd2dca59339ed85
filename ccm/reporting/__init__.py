"""Figures, tables and reports of finished runs.

In: finished run folders. Out: figures, tables, an HTML report.
May import everything but `cli` and `organism`.
"""
