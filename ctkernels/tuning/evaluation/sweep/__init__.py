"""Tasks x methods x seeds: run, resumed, shared among processes, and reported.

spec.py -> cells.py -> run.py (workers.py) -> report.py (significance.py) -> figures.py;  command.py, view.py: the CLI
"""
