"""Which methods differ: paired t-tests, with Holm's correction for many comparisons.

Jobs of one seed share their initial weights and the order of their data, so methods are compared
seed by seed. With three to ten seeds the test is Student's t on the differences, which assumes that
they are normally distributed. Tests by rank or sign assume less, but need more seeds: three seeds
have 2³ signs, so their p-value is never below 0.25, and with five seeds never below 0.06.
"""

import dataclasses
import functools
import itertools
from collections.abc import Sequence

import numpy as np
import scipy.optimize
import scipy.stats

from experiments.report.records import Group, Panel

LEVEL = 0.05
"""The accepted chance of any false difference at one sparsity of one panel."""

POWER = 0.8
"""The chance with which a test finds a difference of the size that it is said to find."""

# Accuracies are quotients of small integers, so equal ones may differ in their last bits.
_NO_SPREAD = 1e-9


@dataclasses.dataclass(frozen=True)
class Difference:
    """The difference in test accuracy of two methods, over the seeds that both have.

    Attributes:
        sparsity: The sparsity of both.
        better: The method with the higher mean over these seeds.
        other: The method that it is compared with.
        seeds: The seeds for which both have an accuracy.
        mean: The mean of the differences.
        low: The lower end of the 95 % confidence interval of the mean, for this difference alone;
            None without a test.
        high: The upper end.
        p: The p-value of the two-sided paired t-test; None without a test, that is with one seed,
            or the same difference at every seed.
        p_holm: The same after Holm's correction over all pairs at this sparsity of the panel.
        found: The true difference that the test, before the correction, finds four times in five,
            if differences spread as these do; None without a test.
    """

    sparsity: float
    better: str
    other: str
    seeds: tuple[int, ...]
    mean: float
    low: float | None = None
    high: float | None = None
    p: float | None = None
    p_holm: float | None = None
    found: float | None = None

    @property
    def apart(self) -> bool:
        """Whether the two methods can be told apart."""
        return self.p_holm is not None and self.p_holm < LEVEL

    def lead(self, method: str) -> tuple[float, str]:
        """Returns by how much one of the two is ahead, in the mean, and the name of the other."""
        if self.better == method:
            return self.mean, self.other
        return -self.mean, self.better


def differences(panel: Panel, sparsity: float, method: str | None = None) -> list[Difference]:
    """Compares pairs of methods at one sparsity, the largest difference first.

    Args:
        panel: The jobs.
        sparsity: One of the panel's.
        method: Compare this one with each other one; by default all pairs.
    """
    pairs = (
        pair
        for pair in itertools.combinations(panel.at(sparsity), 2)
        if method is None or method in (pair[0].method, pair[1].method)
    )
    found = [pair for a, b in pairs if (pair := _difference(a, b)) is not None]
    tested = [pair.p for pair in found if pair.p is not None]
    corrected = iter(holm(tested))
    found = [
        pair if pair.p is None else dataclasses.replace(pair, p_holm=next(corrected))
        for pair in found
    ]
    return sorted(found, key=lambda pair: -pair.mean)


def _difference(a: Group, b: Group) -> Difference | None:
    """Compares two groups; returns None if they share no seed."""
    of_a, of_b = a.accuracies, b.accuracies
    seeds = tuple(sorted(of_a.keys() & of_b.keys()))
    if not seeds:
        return None
    values = np.array([of_a[seed] - of_b[seed] for seed in seeds])
    better, other = a, b
    if values.mean() < 0:
        better, other, values = b, a, -values
    pair = Difference(a.sparsity, better.method, other.method, seeds, float(values.mean()))
    if len(values) < 2 or values.std() < _NO_SPREAD:
        return pair
    test = scipy.stats.ttest_1samp(values, 0.0)
    low, high = test.confidence_interval(1.0 - LEVEL)
    found = detectable(len(values)) * float(values.std(ddof=1))
    return dataclasses.replace(
        pair, low=float(low), high=float(high), p=float(test.pvalue), found=found
    )


@functools.cache
def detectable(n: int) -> float:
    """Returns the true mean that a t-test of n values finds with a chance of `POWER`.

    In units of the values' standard deviation, for a two-sided test at `LEVEL`.
    """
    bound, usual = scipy.stats.t.ppf([1.0 - LEVEL / 2, POWER], n - 1)

    def excess(shift: float) -> float:
        # That the test errs in the sign has no chance to speak of.
        return float(scipy.stats.nct.cdf(bound, n - 1, shift)) - (1.0 - POWER)

    return float(scipy.optimize.brentq(excess, 0.0, 2.0 * (bound + usual)) / np.sqrt(n))


def holm(p_values: Sequence[float]) -> list[float]:
    """Corrects p-values for their number, so that the chance of any false finding is bounded.

    Args:
        p_values: The p-values of one family of tests.

    Returns:
        The corrected p-values, in the same order (Holm 1979, "A simple sequentially rejective
        multiple test procedure").
    """
    p = np.asarray(p_values, float)
    order = np.argsort(p, kind="stable")
    steps = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    corrected = np.empty_like(p)
    corrected[order] = np.minimum(steps, 1.0)
    return corrected.tolist()
