"""This file has the statistics of an evaluation: accuracy and pass@k, 95% intervals over problems, paired
differences, and rows by level.

Accuracy is the mean reward. A response is right if its reward is 1; pass@k counts right responses. An interval says
how far the accuracy would move with other problems of the same kind. Its ends are

    upper limit: mean + 1.96 standard errors, of the scores and one added problem that is solved
    lower limit: mean - 1.96 standard errors, of the scores and one added problem that is failed

So it always contains the accuracy, and 0 right of 30 gives [0, 9.5%] rather than [0, 0]. An average over nine
benchmarks gets only one added problem, in the benchmark where it moves the end most. One in each benchmark would add
up to a bias. Agresti and Coull (1998) add problems of both kinds at both ends. That pulls the interval towards 50%
and costs coverage where scores lie close together (92% for 1000 problems that are about equally hard).

The coverage of the 95% interval was simulated. The true accuracies were 1 to 99%, with 1, 4 or 32 samples a
problem, with partial rewards, and with problems from about equally hard to mostly always or never solved. These
are the lowest coverages of all, from 2000 to 4000 draws each (± 0.5; computed exactly for one benchmark and one
sample it is at least 94.4%):

    one benchmark of 30, 100, 300, 500 problems         94.4%, 94.6%, 94.8%, 94.9%
    nine benchmarks of 30, 100, 300, of 30 to 1172      95.1%, 94.9%, 94.3%, 95.7%
    paired differences over 30, 100, 300 problems       93.6%, 93.8%, 95.3%

At 50% the interval is wider than a plain bootstrap's: by 5 to 13% for 100 problems, and by 3 to 10% for 300. For 100
problems whose scores or differences all lie close together it is wider by up to 19%, because the next problem may lie
elsewhere.

Left out are the clustering of problems that belong together, corrections for many comparisons, and the spread over
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
    """Counts of one problem's graded samples."""

    id: str
    level: str = ""
    samples: int = 0
    right: int = 0  # samples whose reward is 1
    rewards: float = 0.0  # the sum of all rewards, each in [0, 1]
    tokens: int = 0
    truncated: int = 0  # samples that the budget cut off; they are graded wrong
    unread: int = 0  # samples without a boxed answer that can be read, among those that were not cut off

    def add(self, row: dict[str, Any]) -> None:
        """Count a graded response, which is a row of generations.jsonl."""
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
    """Returns the chance that k of n samples, drawn without replacement, contain one of the c right ones.

    This is 1 - C(n-c, k) / C(n, k), the unbiased estimator of pass@k (Chen et al. 2021, arXiv 2107.03374, Eq. 1). It
    is computed in whole numbers up to the last division. Raises ValueError for k > n or c > n.
    """
    if not 0 <= c <= n or not 1 <= k <= n:
        raise ValueError(f"pass_at_k needs 0 <= c <= n and 1 <= k <= n, found n = {n}, c = {c}, k = {k}")
    ways = math.comb(n, k)
    return (ways - math.comb(n - c, k)) / ways


def powers_of_two(samples: int) -> list[int]:
    """Returns 1, 2, 4, … up to `samples`."""
    return [2**i for i in range(samples.bit_length())]


def mean_and_variance(scores: Sequence[float]) -> tuple[float, float]:
    """Returns the mean of `scores` and the square of its standard error, s²/n (0 for a single score)."""
    values = np.asarray(scores, dtype=float)
    return float(values.mean()), float(values.var()) / max(1, len(values) - 1)


def limits(benchmarks: Sequence[Sequence[float]], extra: float, side: int) -> list[float]:
    """Returns average + side · 1.96 standard errors, once for each benchmark, with `extra` added to its scores."""
    parts, ends = [mean_and_variance(scores) for scores in benchmarks], []
    for i, scores in enumerate(benchmarks):
        means, variances = zip(*parts[:i], mean_and_variance(np.append(scores, extra)), *parts[i + 1 :])
        ends.append(mean(means) + side * 1.96 * math.sqrt(sum(variances)) / len(parts))
    return ends


def average_interval(benchmarks: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Returns the 95% interval of the plain average of several benchmarks' mean scores."""
    return max(0.0, min(limits(benchmarks, 0.0, -1))), min(1.0, max(limits(benchmarks, 1.0, 1)))


def interval(scores: Sequence[float]) -> tuple[float, float]:
    """Returns the 95% interval of the mean of `scores`: a mean reward (or pass@k) in [0, 1] for each problem."""
    return average_interval([scores])


def paired_difference(first: Sequence[float], second: Sequence[float]) -> tuple[float, float, float]:
    """Returns the mean of second - first over the same problems, and its 95% interval.

    The added problem differs by Σd²/Σ|d|, the typical size of a difference d, divided by the range of the scores.
    For scores of 0 and 1, and if no scores differ, this is 1. For two models that are alike on easy and hard problems
    it is small.
    """
    scores = np.array([first, second], dtype=float)
    values = scores[1] - scores[0]
    sizes, step = np.abs(values), 1.0
    if sizes.max() > 1e-9:  # if a difference is larger than rounding
        step = float(sizes @ sizes / sizes.sum() / np.ptp(scores))
    low, high = limits([values], -step, -1)[0], limits([values], step, 1)[0]
    return float(values.mean()), max(-1.0, low), min(1.0, high)


def natural_order(levels: Iterable[str]) -> list[str]:
    """Returns the different levels in a reader's order.

    Numbered levels follow their numbers (2 terms, 3 terms, 10 terms), easy is before medium before hard, and others
    stay in the order in which they come.
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
    """Returns a row for each level, and one for all problems as "all".

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
