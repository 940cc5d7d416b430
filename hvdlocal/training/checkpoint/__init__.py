"""Checkpoints: what every rank needs to go on as if nothing had happened, also from the middle of a round.

`files` knows what a checkpoint is on disk; `writer` writes one beside the training; `resume` finds the newest good one and
hands every rank its part; `interval` says how often.
"""
