"""Evaluation: sample answers to problems, grade them, report accuracy and pass@k by level.

In reading order: `evaluate` (sample and grade), `summarize` (by level), `pass_at_k`.
A response cut off by the budget counts as wrong, as in training; `unread` is the share of the others that hold no
readable boxed answer.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedModel

from data.loader import Encoded, Problem
from reward import grade_batch, is_read
from sample import Row, generate, pack


@dataclass
class Answers:
    """The graded samples of one problem."""

    problem: Problem
    rewards: list[float]
    response_tokens: list[int]
    truncated: list[bool]
    unread: list[bool]
    texts: list[str]


def evaluate(
    model: PreTrainedModel,
    tokenizer,
    problems: Sequence[Problem],
    encoded: Sequence[Encoded],
    *,
    samples: int = 1,
    temperature: float = 0.0,
    max_response_tokens: int,
    seed: int = 0,
    rows_per_call: int = 512,
    progress: str | None = None,
) -> list[Answers]:
    """`samples` graded responses to each problem (temperature 0: greedy). Draws depend on (seed, problem, sample)."""
    rows = [
        Row(group=i, key=(seed, "eval", problem.id, k), prompt_ids=problem.prompt_ids, prefix_ids=[])
        for i, problem in enumerate(encoded)
        for k in range(samples)
    ]
    responses = generate(
        model, rows, max_response_tokens, temperature, rows_per_call=rows_per_call, progress=progress
    )
    rollouts = pack(rows, responses, model, tokenizer)
    truncated = rollouts.truncated.tolist()
    golds = [problem.answer for problem in problems for _ in range(samples)]
    rewards = grade_batch(rollouts.texts, golds)
    answers = []
    for i, problem in enumerate(problems):
        block = range(i * samples, (i + 1) * samples)
        answers.append(
            Answers(
                problem=problem,
                rewards=[0.0 if truncated[j] else rewards[j] for j in block],
                response_tokens=[len(responses[j]) for j in block],
                truncated=[truncated[j] for j in block],
                unread=[not truncated[j] and not is_read(rollouts.texts[j]) for j in block],
                texts=[rollouts.texts[j] for j in block],
            )
        )
    return answers


def pass_at_k(n: int, c: int, k: int) -> float:
    """Chance that k of n samples, drawn without replacement, hold one of the c right ones: 1 - C(n-c, k) / C(n, k).

    The unbiased estimator of pass@k (Chen et al. 2021, arXiv 2107.03374, Eq. 1). Needs k <= n and c <= n.
    """
    if not 0 <= c <= n or not 1 <= k <= n:
        raise ValueError(f"pass_at_k needs 0 <= c <= n and 1 <= k <= n, found n = {n}, c = {c}, k = {k}")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def interval(answers: Sequence[Answers], resamples: int = 2000, seed: int = 0) -> tuple[float, float]:
    """95% bootstrap interval of the accuracy over problems (resampled with replacement, percentile method)."""
    values = np.array([mean(a.rewards) for a in answers])
    picks = np.random.default_rng(seed).integers(len(values), size=(resamples, len(values)))
    low, high = np.quantile(values[picks].mean(1), [0.025, 0.975])
    return float(low), float(high)


def summarize(answers: Sequence[Answers]) -> dict[str, dict[str, float]]:
    """By level, and over all problems as "all": accuracy (avg@k) with its 95% interval, mean length, the shares of
    cut off and unread responses, pass@1, 2, 4, …"""
    levels = list(dict.fromkeys(a.problem.level for a in answers if a.problem.level))
    table = {}
    for level in [*levels, "all"]:
        chosen = [a for a in answers if level in (a.problem.level, "all")]
        samples = len(chosen[0].rewards)
        low, high = interval(chosen)
        table[level] = {
            "problems": len(chosen),
            "samples": samples,
            "accuracy": mean([mean(a.rewards) for a in chosen]),
            "low": low,
            "high": high,
            "response_tokens": mean([mean(a.response_tokens) for a in chosen]),
            "truncated": mean([mean(a.truncated) for a in chosen]),
            "unread": mean([mean(a.unread) for a in chosen]),
        }
        for k in (2**i for i in range(samples.bit_length())):
            table[level][f"pass@{k}"] = mean([pass_at_k(samples, round(sum(a.rewards)), k) for a in chosen])
    return table
