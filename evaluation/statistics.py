"""This file computes the statistics of an evaluation: accuracy, pass@k, 95% intervals over problems, paired
differences, and a summary by level.

Accuracy is the mean reward. A response is right if its reward is 1, and pass@k counts right responses. A 95% interval
says how much the accuracy would vary with other problems of the same kind. The ends of an interval are computed as
follows:

    upper limit: mean + 1.96 standard errors, of the scores and one added problem that is solved
    lower limit: mean - 1.96 standard errors, of the scores and one added problem that is failed

So an interval always contains the accuracy, and 0 right of 30 problems gives [0, 9.5%] rather than [0, 0]. For each
end of the interval of an average over nine benchmarks, one problem is added to one benchmark only: the benchmark
where the problem moves this end most. One added problem in each benchmark would bias the interval. Agresti and Coull
(1998) add both solved and failed problems, and for both ends. The Agresti-Coull interval is pulled towards 50%, and
contains the true accuracy less often where scores lie close together (in 92% of simulated evaluations on 1000
problems that are about equally hard).

How often the 95% interval of this file contains the true accuracy (its coverage) was simulated with true accuracies
from 1 to 99%, 1, 4 or 32 samples per problem, and with or without partial rewards. Three kinds of problem sets were
simulated: all problems are about equally hard; each problem is solved almost always or almost never; and a mixture
between these two. The table has the lowest coverage over all simulations of accuracies, samples and difficulties,
each with 2000 to 4000 simulated evaluations (± 0.5 points). For one benchmark with one sample per problem the
coverage of the interval was also computed exactly, without simulation: it is at least 94.4%.

    one benchmark of 30, 100, 300, 500 problems         94.4%, 94.6%, 94.8%, 94.9%
    nine benchmarks of 30, 100, 300, of 30 to 1172      95.1%, 94.9%, 94.3%, 95.7%
    paired differences over 30, 100, 300 problems       93.6%, 93.8%, 95.3%

At an accuracy of 50% the interval is wider than that of a plain bootstrap: by 5 to 13% for 100 problems, and by 3 to
10% for 300. If the scores or differences of 100 problems all lie close together, the interval is wider than the
bootstrap's by up to 19%, because the score of a further problem may be far from these scores.

The intervals do not account for clusters of related problems, multiple comparisons, or the spread over training
seeds.
"""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass
class Answers:
    """Counts over the graded samples of one problem."""

    id: str
    level: str = ""
    samples: int = 0
    right: int = 0  # number of samples whose reward is 1
    rewards: float = 0.0  # sum of the rewards of all samples, each in [0, 1]
    tokens: int = 0
    truncated: int = 0  # number of samples cut off by the limit of tokens, which get reward 0
    unread: int = 0  # number of samples that were not cut off but have no readable boxed answer

    def add(self, row: dict[str, Any]) -> None:
        """Counts one graded response; `row` is a line of generations.jsonl."""
        self.samples += 1
        self.right += row["reward"] == 1
        self.rewards += row["reward"]
        self.tokens += row["tokens"]
        self.truncated += int(row["truncated"])
        self.unread += int(not row["truncated"] and not row["read"])

    @property
    def accuracy(self) -> float:
        """Returns the mean reward of the samples."""
        return self.rewards / self.samples


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def pass_at_k(n: int, c: int, k: int) -> float:
    """Returns the probability that k of n samples, drawn without replacement, contain at least one of the c right
    ones.

    The probability 1 - C(n-c, k) / C(n, k) is the unbiased estimator of pass@k (Chen et al. 2021, arXiv 2107.03374,
    Eq. 1). The binomial coefficients are exact integers; only their quotient is rounded. Raises ValueError for k > n
    or c > n.
    """
    if not 0 <= c <= n or not 1 <= k <= n:
        raise ValueError(f"pass_at_k needs 0 <= c <= n and 1 <= k <= n, found n = {n}, c = {c}, k = {k}")
    ways = math.comb(n, k)
    return (ways - math.comb(n - c, k)) / ways


def powers_of_two(samples: int) -> list[int]:
    """Returns the powers of two 1, 2, 4, … that are at most `samples`."""
    return [2**i for i in range(samples.bit_length())]


def mean_and_variance(scores: Sequence[float]) -> tuple[float, float]:
    """Returns the mean of `scores` and the squared standard error of the mean, s²/n (0 for a single score)."""
    values = np.asarray(scores, dtype=float)
    return float(values.mean()), float(values.var()) / max(1, len(values) - 1)


def limits(benchmarks: Sequence[Sequence[float]], extra: float, side: int) -> list[float]:
    """Returns, for each benchmark, the average over all benchmarks + side · 1.96 standard errors if a problem with
    score `extra` is added to this benchmark. `side` is 1 or -1."""
    parts, ends = [mean_and_variance(scores) for scores in benchmarks], []
    for i, scores in enumerate(benchmarks):
        means, variances = zip(*parts[:i], mean_and_variance(np.append(scores, extra)), *parts[i + 1 :])
        ends.append(mean(means) + side * 1.96 * math.sqrt(sum(variances)) / len(parts))
    return ends


def average_interval(benchmarks: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Returns the 95% interval of the unweighted average of the mean scores of several benchmarks."""
    return max(0.0, min(limits(benchmarks, 0.0, -1))), min(1.0, max(limits(benchmarks, 1.0, 1)))


def interval(scores: Sequence[float]) -> tuple[float, float]:
    """Returns the 95% interval of the mean of `scores`. A score is the mean reward (or pass@k) of one problem, in [0,
    1]."""
    return average_interval([scores])


def paired_difference(first: Sequence[float], second: Sequence[float]) -> tuple[float, float, float]:
    """Returns the mean of second - first over the same problems, and its 95% interval.

    As in every interval of this file, one problem is added for each end. The two models' scores on the added problem
    differ by Σd²/Σ|d|, the typical size of a difference d, divided by the range of the scores. The added difference
    is 1 if all scores are 0 or 1, or if no scores differ. The added difference is small if the two models score alike
    on each problem.
    """
    scores = np.array([first, second], dtype=float)
    values = scores[1] - scores[0]
    sizes, step = np.abs(values), 1.0
    if sizes.max() > 1e-9:  # on some problem the scores differ by more than rounding errors
        step = float(sizes @ sizes / sizes.sum() / np.ptp(scores))
    low, high = limits([values], -step, -1)[0], limits([values], step, 1)[0]
    return float(values.mean()), max(-1.0, low), min(1.0, high)


def natural_order(levels: Iterable[str]) -> list[str]:
    """Returns the distinct levels in the order of a report.

    Levels with numbers are sorted by number (2 terms, 3 terms, 10 terms). Otherwise easy, medium and hard come first
    in this order, and other levels keep their order.
    """
    different = list(dict.fromkeys(levels))
    if all(re.search(r"\d", level) for level in different):
        return sorted(
            different,
            key=lambda level: [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", level)],
        )
    known = ("easy", "medium", "hard")
    return sorted(different, key=lambda level: known.index(level.lower()) if level.lower() in known else len(known))


def summarize(answers: Sequence[Answers]) -> dict[str, dict[str, float]]:
    """Returns {level: row of statistics}, with the level "all" for all problems.

    A row has accuracy (avg@k: mean reward) with its 95% interval, mean response length, the shares of cut-off and
    unread responses, and pass@1, 2, 4, … up to the number of samples.
    """
    levels = natural_order(a.level for a in answers if a.level)
    table = {}
    for level in [*levels, "all"]:
        members = [a for a in answers if level in (a.level, "all")]
        samples = members[0].samples
        scores = [a.accuracy for a in members]
        low, high = interval(scores)
        table[level] = {
            "problems": len(members),
            "samples": samples,
            "accuracy": mean(scores),
            "low": low,
            "high": high,
            "response_tokens": mean([a.tokens / a.samples for a in members]),
            "truncated": mean([a.truncated / a.samples for a in members]),
            "unread": mean([a.unread / a.samples for a in members]),
        }
        for k in powers_of_two(samples):
            table[level][f"pass@{k}"] = mean([pass_at_k(samples, a.right, k) for a in members])
    return table
