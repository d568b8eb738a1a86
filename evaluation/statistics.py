"""The statistics of an evaluation: pass@k, intervals over problems, paired differences, the summary by level.

All of them need only how many of a problem's samples were right, so that is what is kept. An interval says how far
the accuracy would move with other problems of the same kind: problems are resampled (percentile bootstrap, seeded).

Two made-up problems, one always right and one never, are resampled along with the real ones (the idea of Agresti and
Coull 1998). Without them 0 right of 30 problems gives the interval [0, 0], and on simulated hard benchmarks of 30
problems the "95%" interval holds the truth in 80% of cases; with them in 96% and more (tests/test_eval.py). Their
weight is 2 in n + 2, so with hundreds of problems they are not seen.

Left out: clustering of problems that belong together, corrections for many comparisons.
"""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

RESAMPLES = 2000


@dataclass
class Answers:
    """The graded samples of one problem, counted."""

    id: str
    level: str = ""
    samples: int = 0
    right: int = 0
    tokens: int = 0
    truncated: int = 0  # cut off by the budget: graded wrong
    unread: int = 0  # of the others: no boxed answer, or one that cannot be read

    def add(self, row: dict[str, Any]) -> None:
        """Count a graded response, a row of generations.jsonl."""
        self.samples += 1
        self.right += int(row["reward"])
        self.tokens += row["tokens"]
        self.truncated += int(row["truncated"])
        self.unread += int(not row["truncated"] and not row["read"])


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


def resampled_means(values: np.ndarray, seed: int = 0) -> np.ndarray:
    """Means of RESAMPLES draws of len(values) values with replacement -> [RESAMPLES], a few MB at a time."""
    generator = np.random.default_rng(seed)
    block = max(1, 2**20 // len(values))
    sizes = [min(block, RESAMPLES - start) for start in range(0, RESAMPLES, block)]
    return np.concatenate(
        [values[generator.integers(len(values), size=(size, len(values)))].mean(1) for size in sizes]
    )


def middle_95(means: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def interval(scores: Sequence[float]) -> tuple[float, float]:
    """95% interval of the mean of `scores`, each a problem's share of right samples (or its pass@k)."""
    return middle_95(resampled_means(np.array([*scores, 0.0, 1.0])))


def average_interval(benchmarks: Sequence[Sequence[float]]) -> tuple[float, float]:
    """95% interval of the plain average of several benchmarks' accuracies: each is resampled by itself."""
    means = [resampled_means(np.array([*scores, 0.0, 1.0]), seed) for seed, scores in enumerate(benchmarks)]
    return middle_95(np.mean(means, axis=0))


def paired_difference(first: Sequence[float], second: Sequence[float]) -> tuple[float, float, float]:
    """Mean of second - first over the same problems, and its 95% interval (paired bootstrap over problems).

    Differences of both signs need no made-up problems. Only where every problem differs by the same amount, so that
    all resamples are alike, the interval reaches as far to both sides as that of 0 right in so many problems.
    """
    values = np.array(second, dtype=float) - np.array(first, dtype=float)
    middle = float(values.mean())
    if values.min() == values.max():
        reach = interval([0.0] * len(values))[1]
        return middle, max(-1.0, middle - reach), min(1.0, middle + reach)
    return middle, *middle_95(resampled_means(values))


def natural_order(levels: Iterable[str]) -> list[str]:
    """The different levels as a reader counts them: numbered ones by their numbers (2 terms, 3 terms, 10 terms), easy
    before medium before hard, others as they come."""
    found = list(dict.fromkeys(levels))
    if all(re.search(r"\d", level) for level in found):
        return sorted(
            found, key=lambda level: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", level)]
        )
    known = ("easy", "medium", "hard")
    return sorted(found, key=lambda level: known.index(level.lower()) if level.lower() in known else len(known))


def summarize(answers: Sequence[Answers]) -> dict[str, dict[str, float]]:
    """By level, and over all problems as "all": accuracy (avg@k) with its 95% interval, mean response length, the
    shares of cut off and unread responses, pass@1, 2, 4, … up to the number of samples."""
    levels = natural_order(a.level for a in answers if a.level)
    table = {}
    for level in [*levels, "all"]:
        chosen = [a for a in answers if level in (a.level, "all")]
        samples = chosen[0].samples
        scores = [a.right / a.samples for a in chosen]
        low, high = interval(scores)
        table[level] = {
            "problems": len(chosen),
            "samples": samples,
            "accuracy": mean(scores),
            "low": low,
            "high": high,
            "response_tokens": mean([a.tokens / a.samples for a in chosen]),
            "truncated": mean([a.truncated / a.samples for a in chosen]),
            "unread": mean([a.unread / a.samples for a in chosen]),
        }
        for k in powers_of_two(samples):
            table[level][f"pass@{k}"] = mean([pass_at_k(samples, a.right, k) for a in chosen])
    return table
