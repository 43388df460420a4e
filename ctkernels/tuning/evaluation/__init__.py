"""Scores of adapters on test items, lm-eval, and sweeps over tasks, methods and seeds."""
