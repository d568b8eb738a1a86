"""What a step leaves behind: its metrics, two rows as text, and now and then one whole group, token by token.

Left out: figures (plot.py) and the files (support/checkpoint.py).
"""

import math
from collections.abc import Sequence
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from loss import Tokens, token_weights

RECORDED_TOKENS = 512  # of a row of a recorded group


def step_metrics(run: Any, batch: Any, updates: list[dict]) -> dict[str, Any]:
    """Of the whole batch, every mini-batch and micro-batch. None where there is nothing to average.

    `reward_on_policy`, `truncated` and `unread` are of the rows as they were sampled at first: of groups that were
    replaced or sampled again (hpt, rescue) only the batch without their failures is left.
    Over own tokens, `log_prob_gap` is the mean distance of their log-probs in sampling and in the training pass: 0 up
    to rounding. `surprise` is the mean of -log pi - H, log-prob and entropy both of the training pass: 0 up to noise
    if the sampler drew the tokens from pi, whatever it took their log-probs for.
    """
    rollouts, rewards, hybrid = batch.rollouts, batch.rewards, batch.rollouts.hybrid
    policy = rollouts.response_mask & ~rollouts.prefix_mask
    first, read = batch.first_try, run.reward.is_read
    own = [i for i, row in enumerate(first.rows) if not row.prefix_ids]
    sampled = [i for i, row in enumerate(first.rows) if not row.complete]

    def average(values: Tensor | list) -> float | None:
        mean = float(torch.as_tensor(values).float().mean()) if len(values) else math.nan
        return mean if math.isfinite(mean) else None

    groups = [rewards[rollouts.group == g] for g in range(int(rollouts.group.max()) + 1)]
    made = [u for u in updates if not u["skipped"]]  # a skipped one has neither loss nor gradient
    return {
        "loss": fmean(u["loss"] for u in made) if made else None,
        "grad_norm": fmean(u["grad_norm"] for u in made) if made else None,
        "lr": run.config.lr,
        "skipped_updates": sum(u["skipped"] for u in updates),
        "reward": average(rewards),
        "reward_on_policy": average([first.rewards[i] for i in own]),
        "reward_hybrid": average(rewards[hybrid]),
        "hybrid_rows": int(hybrid.sum()),
        "prefix_fraction": average(batch.fractions[hybrid]),
        "prefix_tokens": sum(u["demonstration_tokens"] for u in updates),
        "prefix_tokens_kept": sum(u["demonstration_kept"] for u in updates),
        "entropy": average(batch.entropy[policy]),
        "log_prob_gap": average((batch.old_log_probs[policy] - batch.drawn_log_probs).abs()),
        "surprise": average((-batch.old_log_probs - batch.entropy)[policy]),
        "clip_fraction": sum(u["clipped"] for u in updates) / max(1, sum(u["weighted"] for u in updates)),
        "response_tokens": average(rollouts.response_tokens),
        "truncated": average([first.truncated[i] for i in sampled]),
        "unread": average([not (first.truncated[i] or read(first.texts[i])) for i in sampled]),
        "unsolved": len(first.unsolved(run.config.gate if run.method.unsolved else 0)) / len(groups),
        "sampled_tokens": batch.sampled_tokens,
        "trained_tokens": sum(u["weighted"] for u in updates),
        "equal_reward_groups": fmean(float(r.min() == r.max()) for r in groups),
    }


def example_rows(run: Any, batch: Any, picked: Sequence[int]) -> list[dict[str, Any]]:
    """The first on-policy row and the first hybrid one as text, with prefix and continuation told apart."""
    rollouts, shown = batch.rollouts, []
    for wanted in (False, True):
        for i in (rollouts.hybrid == wanted).nonzero().flatten()[:1].tolist():
            problem = run.data.train[picked[int(rollouts.group[i])]]
            ids = rollouts.input_ids[i, -rollouts.response_mask.shape[1] :]
            prefix = ids[rollouts.prefix_mask[i]]
            rest = ids[rollouts.response_mask[i] & ~rollouts.prefix_mask[i]]
            shown.append(
                {
                    "id": problem.id,
                    "problem": problem.problem,
                    "answer": problem.answer,
                    "hybrid": wanted,
                    "prefix": run.tokenizer.decode(prefix),
                    "continuation": run.tokenizer.decode(rest),
                    "reward": float(batch.rewards[i]),
                    "truncated": bool(rollouts.truncated[i]),
                }
            )
    return shown


def group_record(run: Any, batch: Any, tokens: Tokens, rows: Tensor, picked: Sequence[int]) -> dict[str, Any]:
    """One group of the mini-batch `rows`, token by token: what `plot.py --group` draws.

    The first group that has demonstration tokens and unequal rewards of its on-policy rows, else one that has the
    former, else the first of all. Of each row at most RECORDED_TOKENS tokens, with entropy in nats, whether the
    entropy clip keeps the token, and its weight w. `tokens` is the policy that sampled, also after an update.
    """
    rollouts = batch.rollouts

    def interest(group: int) -> tuple[bool, bool]:
        members = rows[rollouts.group[rows] == group]
        hybrid = rollouts.hybrid[members]
        return bool(hybrid.any()), len(batch.rewards[members][~hybrid].unique()) > 1

    groups = rollouts.group[rows].unique().tolist()
    group = max(groups, key=interest)
    problem = run.data.train[picked[group]]
    weights = token_weights(run.method, tokens)

    def texts(ids: Tensor) -> list[str]:
        return [run.tokenizer.decode(i) for i in ids.tolist()]

    recorded = []
    for i in rows[rollouts.group[rows] == group].tolist():
        length = int(rollouts.response_tokens[i])
        shown = slice(0, min(length, RECORDED_TOKENS))
        ids = rollouts.input_ids[i, -rollouts.response_mask.shape[1] :][shown]
        recorded.append(
            {
                "hybrid": bool(rollouts.hybrid[i]),
                "complete": bool(rollouts.prefix_mask[i].sum() == length),
                "reward": float(batch.rewards[i]),
                "truncated": bool(rollouts.truncated[i]),
                "advantage": float(batch.response_advantage[i]),
                "prefix_advantage": float(batch.prefix_advantage[i]),
                "tokens": texts(ids),
                "ids": ids.tolist(),
                "source": rollouts.prefix_mask[i, shown].long().tolist(),
                "entropy": [round(value, 4) for value in batch.entropy[i, shown].tolist()],
                "kept": tokens.weight_mask[i, shown].long().tolist(),
                "weight": [round(value, 4) for value in weights[i, shown].tolist()],
                "tokens_total": length,
            }
        )
    prompt_columns = rollouts.attention_mask.shape[1] - rollouts.response_mask.shape[1]
    member = int(rows[rollouts.group[rows] == group][0])
    prompt = rollouts.input_ids[member, :prompt_columns][rollouts.attention_mask[member, :prompt_columns].bool()]
    return {
        "method": run.config.method,
        "id": problem.id,
        "problem": problem.problem,
        "answer": problem.answer,
        "prompt": texts(prompt),
        "rows": recorded,
    }
