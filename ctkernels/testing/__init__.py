"""Helpers to check a backend or a model class: the oracle, random calls of the op, tiny models, the authors' loop.

Our own tests use them; they also serve whoever writes a backend (docs/guides/extend.md). They need pytest and
hypothesis only where the module says so.
"""
