"""Rehearsals: what a run costs on this machine, timed stage by stage on random weights."""
