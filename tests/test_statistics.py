"""These tests compare every statistic of evaluation/statistics.py with a hand count, brute force, exact probabilities
or a simulation."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest

from eval import pass_at_k
from evaluation.statistics import Answers, average_interval, interval, natural_order, paired_difference, summarize


def test_pass_at_k_is_the_share_of_draws_with_a_right_one():
    for n in range(1, 8):
        for c, k in itertools.product(range(n + 1), range(1, n + 1)):
            draws = list(itertools.combinations([1] * c + [0] * (n - c), k))
            assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, draws)) / len(draws), abs=1e-15)


def test_pass_at_k_is_exact_for_the_papers_2048_samples():
    for c, k in ((1, 1024), (3, 1024), (1, 2048), (2047, 1), (5, 1), (0, 2048)):
        fail = Fraction(1)
        for i in range(k):  # `fail` becomes the probability that k draws are all wrong
            fail *= Fraction(max(0, 2048 - c - i), 2048 - i)
        assert pass_at_k(2048, c, k) == float(1 - fail)


@pytest.mark.parametrize("n, c, k", [(4, 2, 5), (4, 5, 1), (4, 2, 0), (4, -1, 2)])
def test_pass_at_k_refuses_more_draws_than_samples(n, c, k):
    with pytest.raises(ValueError, match=f"n = {n}, c = {c}, k = {k}"):
        pass_at_k(n, c, k)


def holds(result: tuple[float, float], truth: float) -> bool:
    return result[0] - 1e-9 <= truth <= result[1] + 1e-9


def test_the_ends_of_an_interval_by_hand():
    # The interval's upper end adds a solved problem to the scores 0, 0, 0: the mean is then 1/4, with the variance
    # (3/16 · 4/3) / 4 = 1/16.
    assert interval([0.0] * 3) == pytest.approx((0, 0.25 + 1.96 * 0.25))
    assert interval([0.0] * 30) == pytest.approx((0, 0.0955), abs=1e-4)
    # Each end of the interval adds one problem, which moves the average most: a failed problem to the benchmark with
    # the scores 1, or a solved problem to the benchmark with the scores 0.
    assert average_interval([[0.0] * 3, [1.0] * 3]) == pytest.approx((0.375 - 0.98 * 0.25, 0.625 + 0.98 * 0.25))
    # For the interval's lower end one problem with the difference -1 joins the differences 0, 0, 1. The mean of the
    # four differences is 0, and the variance of this mean is (2/3) / 4.
    middle, low, high = paired_difference([0, 0, 0], [0, 0, 1])
    assert (middle, low, high) == pytest.approx((1 / 3, -1.96 / 6**0.5, 1))
    # The differences 0.1 and -0.3 have the typical size (0.1² + 0.3²) / (0.1 + 0.3) = 0.25. Divided by the scores'
    # range of 0.4, this typical size gives 0.625, the difference of the problem that the interval adds.
    middle, low, high = paired_difference([0.2, 0.6], [0.3, 0.3])
    ends = [(np.mean(d), (np.var(d, ddof=1) / 3) ** 0.5) for d in ([0.1, -0.3, -0.625], [0.1, -0.3, 0.625])]
    assert (low, high) == pytest.approx((ends[0][0] - 1.96 * ends[0][1], ends[1][0] + 1.96 * ends[1][1]))


@pytest.mark.parametrize("n", [30, 83, 300])
def test_the_interval_of_one_sample_a_problem_holds_the_truth_in_94_percent(n):
    """The probability that the interval holds the true accuracy is computed exactly, as a sum over all counts of
    right answers with their binomial probabilities."""
    result = [interval([1.0] * right + [0.0] * (n - right)) for right in range(n + 1)]
    for p in np.arange(0.01, 0.995, 0.005):
        chances = [math.comb(n, c) * p**c * (1 - p) ** (n - c) for c in range(n + 1)]
        assert sum(chance for chance, ends in zip(chances, result) if holds(ends, p)) >= 0.94, p


@pytest.mark.parametrize("better", [0.5, 0.8, 1.0])
def test_the_interval_of_a_difference_holds_the_truth_in_94_percent(better):
    """The probability that the interval holds the true difference is computed exactly. Two models have one sample of
    each of 30 problems. Each problem has the probability `share` that just one model is right, and `better` is the
    probability that this is the second model."""
    n, result = 30, {}
    for up, down in itertools.product(range(n + 1), repeat=2):
        if up + down <= n:
            second = [1.0] * up + [0.0] * (n - up)
            result[up, down] = paired_difference([0.0] * (n - down) + [1.0] * down, second)
    for share in (0.005, 0.01, 0.02, 0.04, 0.08, 0.12, 0.16, 0.25, 0.4, 0.6, 0.8, 0.99):
        p, q, covered = share * better, share * (1 - better), 0.0
        for (up, down), (_, *ends) in result.items():
            ways = math.comb(n, up) * math.comb(n - up, down)
            covered += ways * p**up * q**down * (1 - share) ** (n - up - down) * holds(ends, p - q)
        assert covered >= 0.94, share


# Each problem's probability of being solved is drawn from Beta(accuracy · likeness, (1 - accuracy) · likeness). The
# larger `likeness` is, the more alike are the problems.
@pytest.mark.parametrize(
    "sizes, samples, likeness",
    [([30], 8, 0.3), ([100], 32, 2), ([100], 4, 10), ([30] * 9, 1, 1), ([30, 30, 83, 500], 1, 1)],
)
def test_intervals_hold_the_truth_in_simulated_benchmarks(sizes, samples, likeness):
    """A longer simulation (evaluation/statistics.py) finds that intervals hold the true accuracy in at least 94.3% of
    the draws. The bound 0.92 in this test leaves room for the chance error of 300 draws."""
    generator = np.random.default_rng(0)
    for accuracy in (0.01, 0.1, 0.5, 0.98):
        hits = 0
        for _ in range(300):
            chances = [generator.beta(accuracy * likeness, (1 - accuracy) * likeness, n) for n in sizes]
            scores = [generator.binomial(samples, p) / samples for p in chances]
            ends = average_interval(scores)
            assert holds(ends, np.mean([s.mean() for s in scores]))
            hits += holds(ends, accuracy)
        assert hits / 300 >= 0.92, accuracy


@pytest.mark.parametrize("shift, noise, samples", [(0.3, 0.3, 8), (0.5, 2, 32), (2, 0.5, 4)])
def test_intervals_of_differences_hold_the_truth_in_simulated_benchmarks(shift, noise, samples):
    """The 50 problems differ widely in difficulty, and the second model is better by about `shift` in log-odds."""
    generator = np.random.default_rng(0)

    def chances(*shape):
        first = generator.normal(hardness, 2, shape)
        second = first + shift + generator.normal(0, noise, shape)
        return [1 / (1 + np.exp(-logit)) for logit in (first, second)]

    for hardness in (-6, -3, 0, 4):
        first, second = chances(1_000_000)
        truth, hits = (second - first).mean(), 0
        for _ in range(300):
            scores = [generator.binomial(samples, p) / samples for p in chances(50)]
            middle, *ends = paired_difference(*scores)
            assert middle == pytest.approx((scores[1] - scores[0]).mean()) and holds(ends, middle)
            hits += holds(ends, truth)
        assert hits / 300 >= 0.92, hardness


def plain_bootstrap(values: np.ndarray) -> float:
    """Returns the width of the 95% bootstrap interval of the mean."""
    draws = np.random.default_rng(0).integers(len(values), size=(4000, len(values)))
    return float(np.ptp(np.quantile(values[draws].mean(1), [0.025, 0.975])))


@pytest.mark.parametrize("problems, samples", [(100, 1), (100, 8), (400, 1), (400, 32)])
def test_in_the_middle_intervals_are_about_as_wide_as_a_plain_bootstrap(problems, samples):
    generator = np.random.default_rng(1)
    chances = generator.beta(1, 1, problems)
    scores = np.array([generator.binomial(samples, chances) / samples for _ in range(2)])
    low, high = interval(scores[0])
    assert high - low == pytest.approx(plain_bootstrap(scores[0]), rel=0.15)
    _, low, high = paired_difference(*scores)
    assert high - low == pytest.approx(plain_bootstrap(scores[1] - scores[0]), rel=0.15)


def test_every_interval_contains_its_estimate_and_has_a_width():
    for n, score in itertools.product((1, 2, 30), (0.0, 0.3, 1.0)):
        low, high = interval([score] * n)
        assert 0 <= low <= score <= high <= 1 and high - low > 0.25 / n
        low, high = average_interval([[score] * n, [0.5], [1.0] * 30])
        assert low <= (score + 1.5) / 3 <= high and high - low > 0.25 / n / 3
        for other in (0.0, 0.3, 1.0):
            middle, low, high = paired_difference([score] * n, [other] * n)
            assert middle == pytest.approx(other - score) and low <= middle <= high and high - low > 0.25 / n


def test_paired_difference_uses_the_pairing():
    generator = np.random.default_rng(0)
    first = 0.9 * generator.random(300)
    second = first + 0.05 + 0.02 * generator.standard_normal(300)
    middle, low, high = paired_difference(first, second)
    error = (second - first).std() / 300**0.5
    assert middle == pytest.approx((second - first).mean())
    assert (low, high) == pytest.approx((middle - 1.96 * error, middle + 1.96 * error), abs=0.5 * error)
    assert paired_difference(second, first) == pytest.approx((-middle, -high, -low))


def test_lengths_and_lost_responses_are_means_over_problems_of_shares_of_samples():
    easy = Answers("a", "easy", samples=4, right=1, rewards=1, tokens=10, truncated=1, unread=2)
    hard = Answers("b", "hard", samples=4, right=0, rewards=0, tokens=30, truncated=4, unread=0)
    other = Answers("c", "hard", samples=4, right=0, rewards=0, tokens=2, truncated=0, unread=3)
    table = summarize([easy, hard, other])
    names = ("response_tokens", "truncated", "unread")
    assert [table["easy"][name] for name in names] == [10 / 4, 1 / 4, 2 / 4]
    assert [table["hard"][name] for name in names] == [32 / 8, 4 / 8, 3 / 8]
    assert [table["all"][name] for name in names] == pytest.approx([42 / 12, 5 / 12, 5 / 12])


def test_partial_credit_counts_in_the_accuracy_only():
    """A response is right if its reward is 1, but accuracy and its interval are those of the mean reward."""
    answers = [Answers("a", "easy"), Answers("b", "hard")]
    for answer, rewards in zip(answers, ([0.5, 1.0, 0.25, 0.75], [0.0, 0.999, 0.0, 0.001])):
        for reward in rewards:
            answer.add({"reward": reward, "tokens": 7, "truncated": False, "read": True})
    assert [(a.right, a.rewards) for a in answers] == [(1, 2.5), (0, 1.0)]
    everything = summarize(answers)["all"]
    assert everything["accuracy"] == (2.5 + 1) / 8
    assert (everything["low"], everything["high"]) == interval([2.5 / 4, 1 / 4])
    assert (everything["pass@1"], everything["pass@4"]) == (1 / 8, 1 / 2)


def test_a_difference_that_is_only_rounding_has_the_interval_of_none():
    equal = [0.1, 0.1, 0.7]
    assert paired_difference(equal, [score + 1e-12 for score in equal]) == pytest.approx(
        paired_difference(equal, equal), abs=1e-11
    )


def test_levels_stand_as_a_reader_counts_them():
    assert natural_order(["other", "hard", "Easy", "medium", "hard"]) == ["Easy", "medium", "hard", "other"]
    assert natural_order(["10 terms", "2 terms", "3 terms"]) == ["2 terms", "3 terms", "10 terms"]
    assert natural_order(["10²", "2²"]) == ["2²", "10²"]
    assert natural_order(["b", "a"]) == ["b", "a"]
