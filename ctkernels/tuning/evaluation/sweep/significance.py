"""Whether two methods differ: a paired sign-flip permutation test, and Holm's correction for many comparisons.

If two methods are equal, each paired difference is positive or negative with equal probability. The p value is the
share of all sign patterns whose mean is at least as far from 0 as the observed mean (Fisher, The Design of Experiments,
1935, section 21).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

MOST_ENUMERATED = 16  # with at most so many differences n, all 2^n sign patterns are counted
DRAWS = 100_000  # random patterns for more differences; the standard error of p = 0.05 is then 0.0007


def sign_flip_test(differences: Sequence[float]) -> float:
    """Two-sided p value of paired `differences` (method a minus method b on the same task and seed).

    It is exact for up to 16 differences other than 0; for more it is (hits + 1) / (draws + 1) over 100,000 random
    patterns of a fixed seed.

    Raises:
        ValueError: no differences, or one that is not finite.
    """
    values = torch.tensor(list(differences), dtype=torch.float64)
    if not len(values):
        raise ValueError("differences must hold at least one number")
    if not values.isfinite().all():
        raise ValueError(f"differences must be finite, got {list(differences)}")
    values = values[values != 0]  # the sign of a zero does not matter
    count = len(values)
    if count <= MOST_ENUMERATED:
        patterns = torch.arange(2**count)[:, None] >> torch.arange(count) & 1
        return _as_far(patterns, values).double().mean().item()
    generator = torch.Generator().manual_seed(0)
    hits = 0
    for start in range(0, DRAWS, 10_000):
        patterns = torch.randint(2, (min(10_000, DRAWS - start), count), generator=generator)
        hits += int(_as_far(patterns, values).sum())
    return (hits + 1) / (DRAWS + 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """p values adjusted for their number (Holm, 1979); valid for dependent tests, too."""
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def _as_far(patterns: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Which sign patterns [N, n] of 0 and 1 give a sum at least as far from 0 as that of `values` [n]; bool [N]."""
    sums = (2 * patterns - 1).double() @ values
    slack = 1e-12 * values.abs().sum()  # equal sums may differ in their last bit
    return sums.abs() >= values.sum().abs() - slack
