"""Paired tests between systems that were measured on the same patients, and Holm's correction for many of them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

ALPHA = 0.05


@dataclass(frozen=True)
class Paired:
    """A two-sided Wilcoxon signed-rank test. count: pairs whose values differ, which are all that the test sees.

    difference: mean of first minus second over all pairs. p: NaN where there are no pairs.
    """

    count: int
    difference: float
    p: float


def paired(first: Mapping[str, float], second: Mapping[str, float]) -> Paired:
    """Compares two systems over what both were measured on (name -> value; NaN is left out).

    Source: Wilcoxon, Biometrics Bulletin 1 (1945), as scipy.stats.wilcoxon computes it; equal pairs are dropped.
    """
    names = [name for name in first if name in second]
    differences = np.array([first[name] - second[name] for name in names], float)
    differences = differences[~np.isnan(differences)]
    if not differences.size:
        return Paired(0, math.nan, math.nan)
    moved = differences[differences != 0]
    if not moved.size:
        return Paired(0, 0.0, 1.0)
    from scipy.stats import wilcoxon

    return Paired(int(moved.size), float(differences.mean()), float(wilcoxon(moved).pvalue))


def holm(values: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p-values, in the order given; NaN stays NaN and counts for nothing.

    Below a level they reject as Holm's procedure does, which keeps the chance of any false rejection below that level.
    Source: Holm, Scandinavian Journal of Statistics 6 (1979).
    """
    adjusted, largest = [math.nan] * len(values), 0.0
    order = sorted((n for n, p in enumerate(values) if not math.isnan(p)), key=lambda n: values[n])
    for rank, n in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * values[n]))
        adjusted[n] = largest
    return adjusted


def smallest_p(count: int) -> float:
    """The smallest p that a two-sided signed-rank test of `count` pairs can give: all differences of one sign."""
    return min(1.0, 2.0 ** (1 - count))


def too_few(count: int, tests: int) -> bool:
    """Whether nothing that `count` pairs can give is told from chance, as one of `tests` with Holm's correction."""
    return smallest_p(count) * tests >= ALPHA
