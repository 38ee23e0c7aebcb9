"""From a budget to an architecture: legal shapes are enumerated and ranked by what their cuts cost, and the
best is printed as a plan before any weight is touched. Pure: no weights, no files, no randomness.
"""
