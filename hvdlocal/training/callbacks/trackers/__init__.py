"""Callbacks that write the numbers of a run to the local files of a tracker. They work on nodes without a network."""
