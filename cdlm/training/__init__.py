"""Training: plumbing between a system, its data and its optimiser; no formulas.

Import its modules one by one: `run` brings Lightning, the options do not.
"""
