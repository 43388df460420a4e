"""Triton kernels of the op, for every GPU that Triton reaches.

Reading order: backend.py (what a call does) -> tables.py (who attends to what, on the device) -> mask.py, tile.py (the
mask rule and tile helpers) -> rounding.py, forward.py, backward.py, backward_prefix.py -> config.py (tile sizes) ->
plan.py (which kernels a call launches) -> launch.py. Nothing is imported here, so that Triton loads when it is used.
"""
