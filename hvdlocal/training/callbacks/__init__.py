"""Callbacks: code of the user, and trackers, that a run calls at its events. docs/callbacks.md explains them."""
