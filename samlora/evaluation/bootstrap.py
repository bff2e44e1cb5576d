"""How sure a mean over cases is: percentile bootstrap intervals, many columns at once, always the same numbers."""

from collections.abc import Iterator

import numpy as np

RESAMPLES = 10_000
LEVEL = 0.95
_SEED = 0
_BLOCK = 1 << 22  # drawn numbers held at once


def mean_intervals(values: np.ndarray) -> np.ndarray:
    """The 95 % bootstrap interval of the mean of every column: (2, columns), low and high.

    values: (cases, columns). NaN is left out before cases are drawn. Columns with fewer than two values get NaN.
    The cases are drawn with replacement 10 000 times from a fixed seed; low and high are the 2.5th and the 97.5th
    percentile of the means. Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13
    (the percentile interval), https://doi.org/10.1201/9780429246593.
    """
    intervals = np.full((2, values.shape[1]), np.nan)
    defined = ~np.isnan(values)
    counts = defined.sum(axis=0)
    for count in np.unique(counts[counts > 1]):
        columns = np.flatnonzero(counts == count)  # drawn alike, so one matrix product serves them all
        kept = values[:, columns].T[defined[:, columns].T].reshape(len(columns), count)
        means = np.concatenate([shares @ kept.T for shares in _draws(count)])
        # Rounding must not put the mean of equal values outside the values.
        intervals[:, columns] = np.clip(_ends(means), kept.min(axis=1), kept.max(axis=1))
    return intervals


def overall_interval(values: np.ndarray) -> np.ndarray:
    """The same for the mean over classes of the class means, (low, high); the cases are drawn, with all classes.

    values: (cases, classes). A class that none of the drawn cases has is left out of that mean. NaN for fewer than
    two cases with a value.
    """
    values = values[~np.isnan(values).all(axis=1)]
    if len(values) < 2:
        return np.full(2, np.nan)
    defined = ~np.isnan(values)
    filled = np.where(defined, values, 0.0)
    means = []
    for shares in _draws(len(values)):
        weights = shares @ defined
        there = weights > 0
        classes = np.divide(shares @ filled, weights, out=np.zeros_like(weights), where=there)
        means.append(classes.sum(axis=1) / there.sum(axis=1))
    return _ends(np.concatenate(means))


def _ends(means: np.ndarray) -> np.ndarray:
    return np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)


def _draws(count: int) -> Iterator[np.ndarray]:
    """Blocks of rows, `RESAMPLES` in all: the share of each of `count` cases in one sample with replacement."""
    rng = np.random.default_rng(_SEED)
    rows = max(1, _BLOCK // count)
    for start in range(0, RESAMPLES, rows):
        size = min(rows, RESAMPLES - start)
        drawn = rng.integers(count, size=(size, count)) + count * np.arange(size)[:, None]
        yield np.bincount(drawn.ravel(), minlength=size * count).reshape(size, count) / count
