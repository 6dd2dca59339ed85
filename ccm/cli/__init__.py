"""The command line: thin, each command a few calls into the rest.

In: arguments. Out: what a person reads, and an exit code. May import everything.
"""
