"""Sweeps over tasks x methods x seeds: run, resumed, shared by processes, and reported.

spec.py -> cells.py -> run.py (workers.py) -> report.py (significance.py) -> figures.py
"""
