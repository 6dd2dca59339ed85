"""The trained model organism: a tiny language model of an invented world, with planted neurons.

In: a seed. Out: the checkpoint that `ccm.models.specs.CHECKPOINT` names, and its model card.
May import everything but `cli`.
"""
