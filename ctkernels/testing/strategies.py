"""Hypothesis strategies for calls of the op: `generate.py` with hypothesis' own source of random numbers."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from ctkernels.testing.calls import Call
from ctkernels.testing.generate import random_call, random_mask, random_seed

SOURCES = st.randoms(use_true_random=False)
SEEDS = SOURCES.map(random_seed)


def calls(types: str, varlen: bool | None = None) -> st.SearchStrategy[Call]:
    """As `random_call`."""
    return SOURCES.map(lambda chance: random_call(chance, types, varlen))


def masks(generator: torch.Generator, B: int, P: int, keys: int) -> st.SearchStrategy[dict]:
    """As `random_mask`."""
    return SOURCES.map(lambda chance: random_mask(chance, generator, B, P, keys))
