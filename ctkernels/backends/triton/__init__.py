"""Triton kernels of the op, for every GPU that Triton reaches.

Reading order: backend.py (what a call does) -> tables.py (who attends to what, on the device) -> mask.py, tile.py (the
mask rule and tile helpers) -> rounding.py, forward.py, backward.py, backward_prefix.py -> config.py (tile sizes) ->
call.py (what calls of the same shapes have in common) -> passes.py (which kernels they launch) -> plan.py (the launches
of one call) -> launch.py. Nothing is imported here, so that Triton loads when it is used.
"""
