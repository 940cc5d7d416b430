"""Checkpoints: what every rank needs to continue bit for bit, even from the middle of a round.

`files` defines a checkpoint on disk; `writer` writes one in the background; `resume` finds the newest usable one and gives every
rank its part; `interval` chooses how often to write one; `coordinator` does all of it at the right steps of a run.
"""
