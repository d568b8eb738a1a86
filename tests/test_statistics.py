"""statistics.py: every statistic against a hand count, brute force or a simulation."""

import itertools
from fractions import Fraction

import numpy as np
import pytest

from eval import pass_at_k
from evaluation import statistics
from evaluation.statistics import average_interval, interval, paired_difference


def test_pass_at_k_is_the_share_of_draws_with_a_right_one():
    for n in range(1, 8):
        for c, k in itertools.product(range(n + 1), range(1, n + 1)):
            draws = list(itertools.combinations([1] * c + [0] * (n - c), k))
            assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, draws)) / len(draws), abs=1e-15)


def test_pass_at_k_is_exact_for_the_papers_2048_samples():
    for c, k in ((1, 1024), (3, 1024), (1, 2048), (2047, 1), (5, 1), (0, 2048)):
        fail = Fraction(1)
        for i in range(k):  # the chance that k draws one after the other are all wrong
            fail *= Fraction(max(0, 2048 - c - i), 2048 - i)
        assert pass_at_k(2048, c, k) == float(1 - fail)


@pytest.mark.parametrize("n, c, k", [(4, 2, 5), (4, 5, 1), (4, 2, 0), (4, -1, 2)])
def test_pass_at_k_refuses_more_draws_than_samples(n, c, k):
    with pytest.raises(ValueError, match=f"n = {n}, c = {c}, k = {k}"):
        pass_at_k(n, c, k)


def coverage(method, a: float, b: float, problems: int, samples: int, trials: int = 250) -> float:
    """How often the interval holds the true mean of benchmarks whose problems are solved with Beta(a, b) chances."""
    generator = np.random.default_rng(1)
    hits = 0
    for _ in range(trials):
        low, high = method(generator.binomial(samples, generator.beta(a, b, problems)) / samples)
        hits += low <= a / (a + b) <= high
    return hits / trials


@pytest.mark.parametrize(
    "a, b, problems, samples",
    [(0.1, 2, 30, 32), (0.05, 5, 30, 32), (2, 2, 30, 32), (1, 3, 83, 32), (0.3, 0.3, 200, 1), (1, 3, 10, 8)],
)
def test_the_interval_holds_the_truth_in_95_percent_of_simulated_benchmarks(a, b, problems, samples, monkeypatch):
    monkeypatch.setattr(statistics, "RESAMPLES", 500)
    assert coverage(interval, a, b, problems, samples) >= 0.93

    def plain(values):
        return statistics.middle_95(statistics.resampled_means(values))

    if (a, problems) == (0.05, 30):  # what the made-up problems are for
        assert coverage(plain, a, b, problems, samples) < 0.85


def test_an_interval_is_never_of_width_zero():
    for problems in (1, 10, 200):
        low, high = interval([0.0] * problems)
        assert low == 0 and high > 0.25 / problems
        low, high = interval([1.0] * problems)
        assert high == 1 and low < 1 - 0.25 / problems


def test_resampled_means_spread_like_the_standard_error():
    values = np.random.default_rng(0).random(5_000)  # more than one block of resamples
    means = statistics.resampled_means(values)
    assert len(means) == statistics.RESAMPLES
    assert means.mean() == pytest.approx(values.mean(), abs=1e-3)
    assert means.std() == pytest.approx(values.std() / 5_000**0.5, rel=0.06)
    assert (means == statistics.resampled_means(values)).all()  # seeded
    reach = 1.96 * means.std() / 2**0.5
    expected = values.mean() - reach, values.mean() + reach
    assert average_interval([values, values]) == pytest.approx(expected, abs=1e-3)


def test_paired_difference_uses_the_pairing():
    generator = np.random.default_rng(0)
    first = generator.random(300)
    second = first + 0.1 + 0.02 * generator.standard_normal(300)
    middle, low, high = paired_difference(first, second)
    error = (second - first).std() / 300**0.5
    assert middle == pytest.approx((second - first).mean())
    assert (low, high) == pytest.approx((middle - 1.96 * error, middle + 1.96 * error), abs=0.3 * error)
    assert paired_difference(second, first)[0] == pytest.approx(-middle)
    alike = paired_difference([0.0] * 30, [0.0] * 30)
    assert alike[0] == 0 and alike[1] == -alike[2] and 0.05 < alike[2] < 0.2
