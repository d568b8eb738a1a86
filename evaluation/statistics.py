"""The statistics of an evaluation: accuracy and pass@k, 95% intervals over problems, paired differences, by level.

Accuracy is the mean reward; a response is right if its reward is 1, and pass@k counts those. An interval says how far
the accuracy would move with other problems of the same kind. Its ends are

    upper limit: mean + 1.96 standard errors, of the scores and one more problem solved
    lower limit: mean - 1.96 standard errors, of the scores and one more problem failed

so it always contains the accuracy, and 0 right of 30 gives [0, 9.5%] rather than [0, 0]. An average over benchmarks
gets the made-up problem once, where it moves the end most: one in each of nine would add up to a bias. Agresti and
Coull (1998) put both kinds into both ends; that pull to 50% costs coverage where scores lie close together (92% for
1000 problems that are about equally hard).

Coverage of the 95%, simulated for true accuracies from 1 to 99%; 1, 4, 32 samples a problem and partial rewards; all
problems about equally hard to most of them always or never solved. The lowest of all these, from 2000 to 4000 draws
each (± 0.5; exactly, for one benchmark and one sample: at least 94.4%):
    one benchmark of 30, 100, 300, 500 problems         94.4%, 94.6%, 94.8%, 94.9%
    nine benchmarks of 30, 100, 300, of 30 to 1172      95.1%, 94.9%, 94.3%, 95.7%
    paired differences over 30, 100, 300 problems       93.6%, 93.8%, 95.3%
At 50% it is wider than a plain bootstrap's: by 5 to 13% for 100 problems, by 3 to 10% for 300; by up to 19% for 100
where all scores, or all differences, lie close together, as the next one may lie elsewhere.

Left out: clustering of problems that belong together, corrections for many comparisons, the spread over seeds.
"""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass
class Answers:
    """The graded samples of one problem, counted."""

    id: str
    level: str = ""
    samples: int = 0
    right: int = 0  # samples whose reward is 1
    rewards: float = 0.0  # the sum of all rewards, each in [0, 1]
    tokens: int = 0
    truncated: int = 0  # cut off by the budget: graded wrong
    unread: int = 0  # of the others: no boxed answer, or one that cannot be read

    def add(self, row: dict[str, Any]) -> None:
        """Count a graded response, a row of generations.jsonl."""
        self.samples += 1
        self.right += row["reward"] == 1
        self.rewards += row["reward"]
        self.tokens += row["tokens"]
        self.truncated += int(row["truncated"])
        self.unread += int(not row["truncated"] and not row["read"])

    @property
    def accuracy(self) -> float:
        """Mean reward of the samples."""
        return self.rewards / self.samples


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def pass_at_k(n: int, c: int, k: int) -> float:
    """Chance that k of n samples, drawn without replacement, hold one of the c right ones: 1 - C(n-c, k) / C(n, k).

    The unbiased estimator of pass@k (Chen et al. 2021, arXiv 2107.03374, Eq. 1), exact: in whole numbers up to the
    last division. Raises ValueError for k > n or c > n.
    """
    if not 0 <= c <= n or not 1 <= k <= n:
        raise ValueError(f"pass_at_k needs 0 <= c <= n and 1 <= k <= n, found n = {n}, c = {c}, k = {k}")
    ways = math.comb(n, k)
    return (ways - math.comb(n - c, k)) / ways


def powers_of_two(samples: int) -> list[int]:
    """1, 2, 4, … up to `samples`."""
    return [2**i for i in range(samples.bit_length())]


def mean_and_variance(scores: Sequence[float]) -> tuple[float, float]:
    """The mean of `scores` and the square of its standard error, s²/n (0 for a single score)."""
    values = np.asarray(scores, dtype=float)
    return float(values.mean()), float(values.var()) / max(1, len(values) - 1)


def limits(benchmarks: Sequence[Sequence[float]], extra: float, side: int) -> list[float]:
    """The average + side · 1.96 standard errors where one benchmark, each in turn, has `extra` as one more score."""
    parts, ends = [mean_and_variance(scores) for scores in benchmarks], []
    for i, scores in enumerate(benchmarks):
        means, variances = zip(*parts[:i], mean_and_variance(np.append(scores, extra)), *parts[i + 1 :])
        ends.append(mean(means) + side * 1.96 * math.sqrt(sum(variances)) / len(parts))
    return ends


def average_interval(benchmarks: Sequence[Sequence[float]]) -> tuple[float, float]:
    """95% interval of the plain average of several benchmarks' mean scores."""
    return max(0.0, min(limits(benchmarks, 0.0, -1))), min(1.0, max(limits(benchmarks, 1.0, 1)))


def interval(scores: Sequence[float]) -> tuple[float, float]:
    """95% interval of the mean of `scores`, each a problem's mean reward (or its pass@k) in [0, 1]."""
    return average_interval([scores])


def paired_difference(first: Sequence[float], second: Sequence[float]) -> tuple[float, float, float]:
    """Mean of second - first over the same problems, and its 95% interval.

    The made-up problem differs by Σd²/Σ|d|, the typical size of a difference d, divided by the range of the scores:
    by 1 for scores of 0 and 1 and if none differ, by little for two models that are alike on easy and hard problems.
    """
    scores = np.array([first, second], dtype=float)
    values = scores[1] - scores[0]
    sizes, step = np.abs(values), 1.0
    if sizes.max() > 1e-9:  # not rounding
        step = float(sizes @ sizes / sizes.sum() / np.ptp(scores))
    low, high = limits([values], -step, -1)[0], limits([values], step, 1)[0]
    return float(values.mean()), max(-1.0, low), min(1.0, high)


def natural_order(levels: Iterable[str]) -> list[str]:
    """The different levels as a reader counts them: numbered ones by their numbers (2 terms, 3 terms, 10 terms), easy
    before medium before hard, others as they come."""
    different = list(dict.fromkeys(levels))
    if all(re.search(r"\d", level) for level in different):
        return sorted(
            different,
            key=lambda level: [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", level)],
        )
    known = ("easy", "medium", "hard")
    return sorted(different, key=lambda level: known.index(level.lower()) if level.lower() in known else len(known))


def summarize(answers: Sequence[Answers]) -> dict[str, dict[str, float]]:
    """By level, and over all problems as "all": accuracy (avg@k: mean reward) with its 95% interval, mean response
    length, the shares of cut off and unread responses, pass@1, 2, 4, … up to the number of samples."""
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
