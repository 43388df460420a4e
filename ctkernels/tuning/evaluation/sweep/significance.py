"""Whether two methods differ: a paired sign-flip permutation test, and Holm's correction for many comparisons; and how
far a mean over tasks and seeds can be relied on: a hierarchical bootstrap.

If two methods are equal, each paired difference is positive or negative with equal probability. The p value is the
share of all sign patterns whose mean is at least as far from 0 as the observed mean (Fisher, The Design of Experiments,
1935, section 21).

The bootstrap draws tasks with replacement, and for each drawn task its seeds with replacement (Davison and Hinkley,
Bootstrap Methods and their Application, 1997, section 3.8). So it holds for other tasks and seeds of the same kinds.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

MOST_ENUMERATED = 16  # with at most so many differences n, all 2^n sign patterns are counted
RESAMPLES = 10_000  # of the bootstrap
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


@dataclass(frozen=True)
class Interval:
    """A mean, and the bounds that hold it with 95% confidence."""

    mean: float
    low: float
    high: float


def hierarchical_bootstrap(values: Mapping[str, Sequence[float]], resamples: int = RESAMPLES) -> Interval:
    """The mean over tasks of the means over seeds, with its percentile interval over `resamples` draws of a fixed seed.

    values: task -> a number per seed, for instance a score, or the difference of two methods' scores. Tasks may have
    different numbers of seeds.

    Raises:
        ValueError: no tasks, or one without numbers.
    """
    if not values or not all(len(of_task) for of_task in values.values()):
        raise ValueError(f"values must hold at least one number of each task, got {dict(values)}")
    counts = torch.tensor([len(of_task) for of_task in values.values()])
    tasks, seeds = len(counts), int(counts.max())
    table = torch.zeros(tasks, seeds, dtype=torch.float64)
    for row, of_task in zip(table, values.values(), strict=True):
        row[: len(of_task)] = torch.tensor(list(of_task), dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(tasks, (resamples, tasks), generator=generator)
    uniform = torch.rand(resamples, tasks, seeds, generator=generator, dtype=torch.float64)
    picked = table[drawn].gather(2, (uniform * counts[drawn][..., None]).long())  # [resamples, tasks, seeds]
    taken = torch.arange(seeds) < counts[drawn][..., None]  # as many as the task has
    means = ((picked * taken).sum(dim=2) / counts[drawn]).mean(dim=1)
    bounds = torch.tensor([0.025, 0.975], dtype=torch.float64)
    low, high = means.quantile(bounds).tolist()
    return Interval(statistics.fmean(statistics.fmean(of_task) for of_task in values.values()), low, high)


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
