"""The style of all figures, and the units of numbers in text."""
