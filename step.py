"""One training step, top to bottom: rollouts, rewards, advantages, the updates, the metrics.

A step of reinforcement (`rl_step`):

    problems  -> plan_group, generate, pack            rollouts: on-policy rows and hybrid ones, in one batch
              -> grade_batch                           0 / 1; a response cut off by the budget gets 0
              -> advantages                            of each row's own tokens and of its prefix
              -> old log-probs and entropies           one forward pass, before the first update
              -> for each mini-batch: kept_tokens, then micro-batches: token_stats, token_weights, loss, backward;
                 clip the gradient, AdamW

A supervised step (`sft_step`) is the same with whole demonstrations as rows, weight 1 and nothing to sample. Every
method is an entry of loss.METHODS; nothing here asks which one it is.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean as mean
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

import loss as objective
from data.loader import Encoded, Problem
from loss import METHODS, Method
from model import token_stats
from reward import grade_batch, is_read
from sample import Rollouts, Row, generate, pack, plan_group, torch_generator
from support.config import Config
from support.distributed import all_sum, clip_gradients, rank, world_size

SFT = METHODS["sft"]


@dataclass
class Data:
    """The problems of a run, as text and as ids."""

    train: list[Problem]
    encoded: list[Encoded]
    demonstrated: list[int]  # indices of training problems that have a demonstration
    held: dict[str, tuple[list[Problem], list[Encoded]]]  # "validation" and "test", where there are such problems


@dataclass
class Run:
    """A run in progress."""

    config: Config
    method: Method
    model: PreTrainedModel
    tokenizer: Any
    data: Data
    optimizer: torch.optim.Optimizer
    buffer: list[int]  # ReLIFT: unsolved problems that wait for an SFT update


def pick(count: int, per_step: int, step: int, *key: object) -> list[int]:
    """Indices of step `step`'s problems: a fresh random order each epoch, whose remainder is skipped."""
    per_step = min(per_step, count)
    epoch, place = divmod(step, count // per_step)
    order = torch.randperm(count, generator=torch_generator(*key, epoch)).tolist()
    return order[place * per_step : (place + 1) * per_step]


# ---- one batch


@dataclass
class Batch:
    """What a step's updates read; B rows, R response columns, on the CPU."""

    rollouts: Rollouts
    rewards: Tensor  # [B]
    response_advantage: Tensor  # [B]
    prefix_advantage: Tensor  # [B]
    old_log_probs: Tensor  # [B, R] of the sampling policy
    entropy: Tensor  # [B, R] of the sampling policy
    fractions: Tensor  # [B] share of the demonstration a row was given


def micro_batches(rollouts: Rollouts, rows: Tensor, budget: int) -> list[Tensor]:
    """`rows` sorted by length and cut so that rows x columns stay within `budget` tokens (or a row is alone)."""
    responses = rollouts.response_tokens
    prompts, responses = (rollouts.attention_mask.sum(1) - responses).tolist(), responses.tolist()
    chunks: list[list[int]] = []
    prompt = response = 0
    for i in sorted(rows.tolist(), key=lambda i: (responses[i], prompts[i])):
        prompt, response = max(prompt, prompts[i]), max(response, responses[i])
        if not chunks or (len(chunks[-1]) + 1) * (prompt + response) > budget:
            chunks.append([])
            prompt, response = prompts[i], responses[i]
        chunks[-1].append(i)
    return [torch.tensor(chunk) for chunk in chunks]


def rank_share(rollouts: Rollouts, rows: Tensor, budget: int) -> list[tuple[Tensor, bool]]:
    """This rank's micro-batches of `rows`, and whether each counts.

    Rows are dealt to the ranks by length. FSDP wants equally many passes on every rank: one with fewer micro-batches
    than another passes a row once more, which counts for nothing.
    """
    order = torch.cat(micro_batches(rollouts, rows, budget))
    shares = [micro_batches(rollouts, order[r :: world_size()], budget) for r in range(world_size())]
    mine, most = shares[rank()], max(map(len, shares))
    return [(chunk, True) for chunk in mine] + [(order[:1], False)] * (most - len(mine))


def forward(model: PreTrainedModel, rollouts: Rollouts, rows: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """token_stats of some rows, cut to the columns they use -> log_probs, entropy [b, r]"""
    columns, width = rollouts.columns(rows)
    ids, mask = rollouts.input_ids[rows, columns], rollouts.attention_mask[rows, columns]
    return token_stats(model, ids.to(model.device), mask.to(model.device), width, temperature)


def check_finite(what: str, value: float) -> None:
    """Raises ValueError if the run has diverged."""
    if not math.isfinite(value):
        fix = "start again in a new folder, with a lower lr or sft_lr"
        raise ValueError(f"{what} is {value}: the run has diverged; {fix}")


@torch.no_grad()
def old_stats(model: PreTrainedModel, rollouts: Rollouts, config: Config) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies of the sampling policy, [B, R]."""
    log_probs = torch.zeros(rollouts.response_mask.shape)
    entropy = torch.zeros_like(log_probs)
    for rows, counts in rank_share(rollouts, torch.arange(len(rollouts.texts)), config.micro_batch_tokens):
        found = forward(model, rollouts, rows, config.temperature)
        if counts:
            width = found[0].shape[1]
            log_probs[rows, :width], entropy[rows, :width] = found[0].cpu(), found[1].cpu()
    log_probs, entropy = all_sum(log_probs), all_sum(entropy)
    check_finite("the sum of log-probs", float(log_probs.sum()))
    return log_probs, entropy


def plan(problems: Sequence[Encoded], method: Method, config: Config, step: int, rollouts: int) -> list[Row]:
    """The rows of all groups; `step` counts from 0 in its stage."""
    settings = {
        "rows": method.rows,
        "schedule": method.schedule,
        "rollouts": rollouts,
        "guided": min(rollouts, config.hybrid_per_prompt),
        "max_response_tokens": config.max_response_tokens,
        "seed": config.seed,
        "step": step,
        "total_steps": config.steps,
    }
    return [row for group, problem in enumerate(problems) for row in plan_group(problem, group, **settings)]


def rollout_batch(run: "Run", picked: Sequence[int], step: int) -> Batch:
    """Sample, grade and compare: the batch of one step of reinforcement."""
    config, method = run.config, run.method
    rows = plan([run.data.encoded[i] for i in picked], method, config, step, config.rollouts_per_prompt)
    responses = generate(
        run.model,
        rows,
        config.max_response_tokens,
        config.temperature,
        rows_per_call=config.rows_per_call,
        prefill=config.prefill,
        decode=config.decode,
    )
    rollouts = pack(rows, responses, run.model, run.tokenizer)
    golds = [run.data.train[picked[row.group]].answer for row in rows]
    rewards = torch.tensor(grade_batch(rollouts.texts, golds)) * ~rollouts.truncated
    baseline = method.baseline or config.baseline
    own, forced = objective.advantages(rewards, rollouts.group, rollouts.hybrid, baseline, config.scale_by_std)
    log_probs, entropy = old_stats(run.model, rollouts, config)
    fractions = torch.tensor([row.fraction for row in rows])
    return Batch(rollouts, rewards, own, forced, log_probs, entropy, fractions)


def demonstration_batch(run: "Run", picked: Sequence[int], step: int) -> Batch:
    """Whole demonstrations, one per problem: what an SFT update reads. Nothing is sampled or graded."""
    rows = plan([run.data.encoded[i] for i in picked], SFT, run.config, step, rollouts=1)
    rollouts = pack(rows, [row.prefix_ids for row in rows], run.model, run.tokenizer)
    none, zeros = torch.zeros(len(rows)), torch.zeros(rollouts.response_mask.shape)
    return Batch(rollouts, none, none, none, zeros, zeros, torch.ones(len(rows)))


# ---- one update


def update(run: "Run", batch: Batch, rows: Tensor, method: Method, normalizer: float, lr: float, key: tuple) -> dict:
    """One optimizer step on the mini-batch `rows`; sums over its tokens for the metrics.

    The gradient is that of the whole mini-batch whatever the micro-batches are: the kept tokens, Z (`normalizer`)
    and the number of demonstration tokens are taken before it is cut. Rows without any weight are left out of the
    forward pass (Z stays); without any row there is no signal, and no optimizer step.
    """
    config, model, rollouts = run.config, run.model, batch.rollouts
    forced = int(rollouts.prefix_mask[rows].sum())
    kept = torch.zeros_like(rollouts.response_mask)
    kept[rows] = objective.kept_tokens(
        method,
        rollouts.response_mask[rows],
        rollouts.prefix_mask[rows],
        batch.entropy[rows],
        config.entropy_keep,
        torch_generator(config.seed, "entropy clip", *key),
    )

    def weights(rows: Tensor, log_probs: Tensor) -> Tensor:
        width, device = log_probs.shape[1], log_probs.device
        return objective.token_weights(
            method,
            log_probs.detach(),
            batch.old_log_probs[rows, :width].to(device),
            batch.response_advantage[rows].to(device),
            batch.prefix_advantage[rows].to(device),
            rollouts.prefix_mask[rows, :width].to(device),
            kept[rows, :width].to(device),
            config.clip_low,
            config.clip_high,
            normalizer / max(1, forced),
        )

    weighted = weights(rows, batch.old_log_probs[rows]) != 0
    sums = {"loss": 0.0, "entropy": 0.0, "clipped": 0, "weighted": int(weighted.sum()), "forced": forced}
    sums["kept"] = int((kept & rollouts.prefix_mask)[rows].sum())
    active = rows[weighted.any(1)]
    if len(active) == 0:
        return sums | {"grad_norm": 0.0}
    total = torch.zeros(3, dtype=torch.float64)  # loss, entropy, tokens with a weight
    for chunk, counts in rank_share(rollouts, active, config.micro_batch_tokens):
        log_probs, entropy = forward(model, rollouts, chunk, config.temperature)
        w = weights(chunk, log_probs)
        mask = counts & rollouts.response_mask[chunk, : log_probs.shape[1]].to(log_probs.device)
        loss = objective.weighted_loss(log_probs, w, mask, normalizer)
        loss.backward()
        if counts:
            total += torch.tensor([float(loss.detach()), float(entropy.sum()), float((w != 0).sum())])
    sums["loss"], sums["entropy"], unclipped = all_sum(total).tolist()
    sums["clipped"] = sums["weighted"] - int(unclipped)
    sums["grad_norm"] = clip_gradients(model.parameters(), config.max_grad_norm)
    check_finite("the gradient's norm", sums["grad_norm"])
    for group in run.optimizer.param_groups:
        group["lr"] = lr
    run.optimizer.step()
    run.optimizer.zero_grad()
    return sums


# ---- the two kinds of step


def sft_learning_rate(step: int, config: Config) -> float:
    """10% linear warm-up, then half a cosine to 0; `step` from 0."""
    warm_up = max(1, round(0.1 * config.sft_steps))
    if step < warm_up:
        return config.sft_lr * (step + 1) / warm_up
    return config.sft_lr * (1 + math.cos(math.pi * (step - warm_up) / max(1, config.sft_steps - warm_up))) / 2


def sft_step(run: Run, picked: Sequence[int], step: int, lr: float) -> dict[str, Any]:
    """One supervised update: the mean negative log-likelihood of the demonstrations' tokens."""
    start = time.perf_counter()
    batch = demonstration_batch(run, picked, step)
    tokens = int(batch.rollouts.prefix_mask.sum())
    sums = update(run, batch, torch.arange(len(picked)), SFT, tokens, lr, ("sft", step))
    seconds = time.perf_counter() - start
    return {
        "loss": sums["loss"],
        "grad_norm": sums["grad_norm"],
        "lr": lr,
        "entropy": sums["entropy"] / tokens,
        "response_tokens": tokens / len(picked),
        "tokens_per_second": tokens / seconds,
        "seconds_update": seconds,
    }


def rl_step(run: Run, step: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """One step of reinforcement -> its metrics, and two of its rows to look at."""
    config, method = run.config, run.method
    start = time.perf_counter()
    picked = pick(len(run.data.train), config.prompts_per_step, step, config.seed, "order")
    batch = rollout_batch(run, picked, step)
    sampled = time.perf_counter()
    group = batch.rollouts.group
    updates = []
    for part, groups in enumerate(torch.arange(len(picked)).chunk(config.updates_per_step)):
        rows = torch.isin(group, groups).nonzero().squeeze(1)
        normalizer = len(rows) * config.max_response_tokens
        updates.append(update(run, batch, rows, method, normalizer, config.lr, (step, part)))
    if method.relift:
        solved = set(group[batch.rewards > 0].tolist())
        unsolved = [i for g, i in enumerate(picked) if g not in solved and run.data.encoded[i].demonstrations]
        run.buffer += [i for i in unsolved if i not in run.buffer]
        if len(run.buffer) >= config.sft_batch:
            chosen, run.buffer = run.buffer[: config.sft_batch], run.buffer[config.sft_batch :]
            sft_step(run, chosen, step, config.sft_lr)
    metrics = rl_metrics(batch, updates, config)
    end = time.perf_counter()
    metrics |= {
        "tokens_per_second": int(batch.rollouts.response_mask.sum()) / (end - start),
        "seconds_sample": sampled - start,
        "seconds_update": end - sampled,
    }
    return metrics, samples(run, batch, picked)


def rl_metrics(batch: Batch, updates: list[dict], config: Config) -> dict[str, Any]:
    """Of the whole batch, every mini-batch and micro-batch. None where there is nothing to average."""
    rollouts, rewards, hybrid = batch.rollouts, batch.rewards, batch.rollouts.hybrid
    own = rollouts.response_mask & ~rollouts.prefix_mask
    sampled = own.any(1)  # not a whole demonstration

    def average(values: Tensor) -> float | None:
        return float(values.float().mean()) if len(values) else None

    groups = [rewards[rollouts.group == g] for g in range(int(rollouts.group.max()) + 1)]
    unread = [not cut and not is_read(text) for text, cut in zip(rollouts.texts, rollouts.truncated.tolist())]
    return {
        "loss": mean([u["loss"] for u in updates]),
        "grad_norm": mean([u["grad_norm"] for u in updates]),
        "lr": config.lr,
        "reward": average(rewards),
        "reward_on_policy": average(rewards[~hybrid]),
        "reward_hybrid": average(rewards[hybrid]),
        "prefix_fraction": average(batch.fractions[hybrid]),
        "prefix_tokens": sum(u["forced"] for u in updates),
        "prefix_tokens_kept": sum(u["kept"] for u in updates),
        "entropy": average(batch.entropy[own]),
        "clip_fraction": sum(u["clipped"] for u in updates) / max(1, sum(u["weighted"] for u in updates)),
        "response_tokens": average(rollouts.response_tokens),
        "truncated": average(rollouts.truncated[sampled]),
        "unread": average(torch.tensor(unread)[sampled]),
        "equal_reward_groups": mean([float(r.min() == r.max()) for r in groups]),
    }


def samples(run: Run, batch: Batch, picked: Sequence[int]) -> list[dict[str, Any]]:
    """The first on-policy row and the first hybrid one, with prefix and continuation told apart."""
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
