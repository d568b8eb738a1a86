"""This file makes the log entries of a step: its metrics, two rows as text, and sometimes one whole group, token by
token.

`run` is a step.Run, and `step` is a step.Step. plot.py draws the log entries, and support/checkpoint.py writes them
to files.
"""

import math
import re
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from loss import token_weights
from methods import unsolved_groups
from reward import extract_boxed

RECORDED_TOKENS = 512  # at most so many tokens of each row are written to groups.jsonl


def is_copied(text: str, problem: Any) -> bool:
    """Returns whether the boxed answer is copied from the problem word for word: `69 - 13`, which is in the problem,
    where the gold answer is 56.

    A boxed answer with the same words as the gold answer does not count as copied.
    """
    boxed = extract_boxed(text) or problem.answer
    if re.findall(r"\w+", boxed) == re.findall(r"\w+", problem.answer):
        return False
    inner, outer = (" ".join(re.findall(r"\w+|\S", part)) for part in (boxed, problem.problem))
    return f" {inner} " in f" {outer} "


def rl_metrics(run: Any, step: Any) -> dict[str, Any]:
    """Returns the metrics of a reinforcement step over the whole batch, with all mini-batches and micro-batches. The
    mean of no values is None.

    `reward_on_policy`, `truncated`, `unread` and `copied` count the rows as they were first sampled. (The methods hpt
    and rescue replace the rows of unsolved groups or sample them again, so the final batch would hide these
    failures.) `copied` is the share of responses that are right with a piece of the problem as their answer
    (is_copied). `log_prob_gap` is the mean distance between a sampled token's log-prob in sampling and in the
    training pass. `log_prob_gap` is 0 up to rounding. `surprise` is the mean of -log pi - H over sampled tokens, with
    log pi and the entropy H from the training pass. `surprise` is 0 up to noise if the sampler drew the tokens from
    pi, even if the log-probs kept from sampling were wrong.
    """
    batch, first_rows = step.batch, step.batch.first_rows
    rollouts, rewards, hybrid = batch.rollouts, batch.rewards, batch.rollouts.hybrid
    policy = rollouts.response_mask & ~rollouts.prefix_mask
    drawn = torch.tensor([value for row in batch.rows for value in row.log_probs])
    sampled = [row for row in first_rows if row.log_probs]

    def average(values: Tensor | list) -> float | None:
        mean = float(torch.as_tensor(values).float().mean()) if len(values) else math.nan
        return mean if math.isfinite(mean) else None

    def problem_of(row: Any) -> Any:
        return run.data.train[step.picked[row.group]]

    groups = [rewards[rollouts.group == g] for g in range(int(rollouts.group.max()) + 1)]
    # a skipped update has no loss and no gradient
    made = [update for update in step.updates if not update["skipped"]]
    # numbers of tokens with a weight other than 0: by the weights before each update, and by those in the update
    weighted, with_weight = 0, 0
    for tokens, update in zip(step.mini_batches, step.updates):
        if not update["skipped"]:
            weighted += int((token_weights(run.method, tokens) != 0).sum())
            with_weight += update["with_weight"]
    return {
        "loss": fmean(update["loss"] for update in made) if made else None,
        "grad_norm": fmean(update["grad_norm"] for update in made) if made else None,
        "lr": run.config.lr,
        "skipped_updates": len(step.updates) - len(made),
        "reward": average(rewards),
        "reward_on_policy": average([row.reward for row in first_rows if not row.prefix_ids]),
        "reward_hybrid": average(rewards[hybrid]),
        "hybrid_rows": int(hybrid.sum()),
        "prefix_fraction": average([row.fraction for row in batch.rows if row.prefix_ids]),
        "prefix_tokens": int(rollouts.prefix_mask.sum()),
        "prefix_tokens_kept": sum(int((t.weight_mask & t.prefix_mask).sum()) for t in step.mini_batches),
        "entropy": average(batch.entropy[policy]),
        "log_prob_gap": average((batch.old_log_probs[policy] - drawn).abs()),
        "surprise": average((-batch.old_log_probs - batch.entropy)[policy]),
        "clip_fraction": max(0, weighted - with_weight) / max(1, weighted),
        "response_tokens": average(rollouts.response_mask.sum(1)),
        "truncated": average([row.truncated for row in sampled]),
        "unread": average([not (row.truncated or run.reward.is_read(row.text)) for row in sampled]),
        "copied": average([row.reward == 1 and is_copied(row.text, problem_of(row)) for row in sampled]),
        "unsolved": len(unsolved_groups(first_rows, run.config.gate if run.method.unsolved else 0)) / len(groups),
        "sampled_tokens": batch.sampled_tokens,
        "trained_tokens": max(weighted, with_weight),
        "equal_reward_groups": fmean(float(r.min() == r.max()) for r in groups),
        **step.collected,
        "tokens_per_second": int(rollouts.response_mask.sum()) / sum(step.seconds),
        "seconds_sample": step.seconds[0],
        "seconds_update": step.seconds[1],
    }


def sft_metrics(step: Any, lr: float) -> dict[str, Any]:
    """Returns the metrics of a supervised step, whose learning rate was `lr`."""
    sums, tokens, rows = step.updates[0], step.mini_batches[0].demonstration_tokens, len(step.batch.rows)
    return {
        "loss": sums["loss"],
        "grad_norm": sums["grad_norm"],
        "lr": lr,
        "skipped_updates": sums["skipped"],
        "entropy": None if sums["skipped"] else sums["entropy"] / tokens,
        "response_tokens": tokens / rows,
        "trained_tokens": sums["with_weight"],
        "tokens_per_second": tokens / sum(step.seconds),
        "seconds_update": sum(step.seconds),
    }


def example_rows(run: Any, step: Any) -> list[dict[str, Any]]:
    """Returns the first on-policy row and the first hybrid row of a step as text, with prefix and continuation
    apart."""
    examples = []
    for hybrid in (False, True):
        for row in [row for row in step.batch.rows if bool(row.prefix_ids) == hybrid][:1]:
            problem, cut = run.data.train[step.picked[row.group]], len(row.prefix_ids)
            examples.append(
                {
                    "id": problem.id,
                    "problem": problem.problem,
                    "answer": problem.answer,
                    "hybrid": hybrid,
                    "prefix": run.tokenizer.decode(row.response[:cut]),
                    "continuation": run.tokenizer.decode(row.response[cut:]),
                    "reward": row.reward,
                    "truncated": row.truncated,
                }
            )
    return examples


def telling_group(step: Any) -> int:
    """Returns the first group of a step that has demonstration tokens and unequal rewards among its on-policy rows.
    If there is no such group, returns the first group with demonstration tokens, or else the first group."""
    rollouts = step.batch.rollouts

    def interest(group: int) -> tuple[bool, bool]:
        members = rollouts.group == group
        hybrid = rollouts.hybrid[members]
        return bool(hybrid.any()), len(step.batch.rewards[members][~hybrid].unique()) > 1

    return max(range(len(step.picked)), key=interest)


def record_group(run: Any, step: Any) -> dict[str, Any]:
    """Returns one group of a step (`telling_group`), token by token, for `plot.py --group`.

    At most RECORDED_TOKENS tokens of each row are kept, each token with its entropy in nats, whether the entropy clip
    keeps it, and its weight w before the update.
    """
    batch, rollouts, group = step.batch, step.batch.rollouts, telling_group(step)
    parts = torch.arange(len(step.picked)).tensor_split(len(step.mini_batches))
    tokens = next(tokens for tokens, groups in zip(step.mini_batches, parts) if group in groups)
    problem = run.data.train[step.picked[group]]
    weights = token_weights(run.method, tokens)

    def texts(ids: list[int]) -> list[str]:
        return [run.tokenizer.decode(i) for i in ids]

    recorded = []
    members = (rollouts.group == group).nonzero().flatten().tolist()
    for i in members:
        row = batch.rows[i]
        ids = list(row.response[:RECORDED_TOKENS])
        shown = slice(0, len(ids))
        recorded.append(
            {
                "hybrid": bool(row.prefix_ids),
                "complete": len(row.prefix_ids) == len(row.response),
                "reward": row.reward,
                "truncated": row.truncated,
                "advantage": float(batch.response_advantage[i]),
                "prefix_advantage": float(batch.prefix_advantage[i]),
                "tokens": texts(ids),
                "ids": ids,
                "source": rollouts.prefix_mask[i, shown].long().tolist(),
                "entropy": [round(value, 4) for value in batch.entropy[i, shown].tolist()],
                "kept": tokens.weight_mask[i, shown].long().tolist(),
                "weight": [round(value, 4) for value in weights[i, shown].tolist()],
                "tokens_total": len(row.response),
            }
        )
    return {
        "method": run.config.method,
        "id": problem.id,
        "problem": problem.problem,
        "answer": problem.answer,
        "prompt": texts(batch.rows[members[0]].prompt_ids),
        "rows": recorded,
    }
