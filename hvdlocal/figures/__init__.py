"""The common style of all figures, and the formatting of times and bytes."""
