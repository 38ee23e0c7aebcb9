"""Evaluation: what a child has kept of its parent, and whether stock libraries can use it."""
