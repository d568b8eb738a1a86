"""This file is one training step, top to bottom: rollouts, rewards, advantages, old log-probs, updates.

A step of reinforcement (`rl_step`) does this:

    problems  -> plan_group, generate                  rollouts: on-policy rows and hybrid ones
              -> grade                                 0 to 1; a response cut off by the limit gets 0
              -> (hpt, rescue) second_chance           groups without a right row are replaced or sampled again
              -> advantages                            of each row's own tokens and of its prefix
              -> old log-probs and entropies           one forward pass, before the first update (known_before)
              -> (sdft) hinted_log_probs               another forward pass, with a demonstration in the prompt
              -> for each mini-batch: entropy clip, then micro-batches: token_stats, token_weights, loss, backward;
                 clip the gradient, AdamW
              -> (relift) one update on demonstrations of collected problems

In a supervised step (`sft_step`) the rows are whole demonstrations and nothing is sampled. Methods differ in the
fields of methods.METHODS, and no code here asks for a method's name. support/record.py computes metrics.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from data.loader import Data, Encoded
from loss import Tokens, advantages, token_weights, weighted_loss, weighted_tokens
from methods import Collector, Method, coefficient_at, collect, hinted_log_probs, second_chance
from model import token_stats
from reward import Reward, grade_all
from sample import Rollouts, Row, generate, pack, plan_group, prefix_fraction, torch_generator
from support.config import Config
from support.distributed import clip_gradients, micro_batches, sum_over_ranks, world_size


@dataclass
class Run:
    """The parts of a run in progress that its steps use."""

    config: Config
    method: Method
    model: PreTrainedModel
    tokenizer: Any
    reward: Reward
    data: Data
    optimizer: torch.optim.Optimizer
    decode: Callable | None = None  # a decoding loop (fast.decode) that replaces HF's
    collector: Collector | None = None  # ReLIFT
    skipped: int = 0  # number of consecutive updates, up to the last one, skipped because a number was not finite


def problems_of_step(count: int, per_step: int, step: int, *key: object) -> list[int]:
    """Returns the indices of the problems of `step`. Each epoch shuffles all problems and leaves out a last,
    incomplete step."""
    per_step = min(per_step, count)
    epoch, place = divmod(step, count // per_step)
    order = torch.randperm(count, generator=torch_generator(*key, epoch)).tolist()
    return order[place * per_step : (place + 1) * per_step]


# ---- rollouts and their rewards


def sample_groups(
    run: Run,
    picked: Sequence[int],
    step: int,
    groups: Sequence[int],
    *,
    rows: str,
    rollouts: int | None = None,
    share: Callable[[torch.Generator], float] | None = None,
    attempt: int = 0,
) -> list[Row]:
    """Returns sampled and graded rows of `groups`. `picked` are the step's problems. `share` replaces the schedule's
    draw of the prefix fraction, `rollouts` replaces rollouts_per_prompt; plan_group explains `rows` and `attempt`. A
    truncated response gets reward 0; the paper's code grades it (consequences: configs/README.md)."""
    config = run.config
    rollouts = rollouts or config.rollouts_per_prompt
    schedule = partial(prefix_fraction, step, config.steps, run.method.schedule)
    planned: list[Row] = []
    for group in groups:
        planned += plan_group(
            run.data.encoded[picked[group]],
            group,
            rows=rows,
            share=share or schedule,
            rollouts=rollouts,
            hybrid=min(rollouts, config.hybrid_per_prompt),
            max_response_tokens=config.max_response_tokens,
            key=(config.seed, step),
            attempt=attempt,
        )
    sampled = generate(
        run.model,
        run.tokenizer,
        planned,
        config.max_response_tokens,
        config.temperature,
        rows_per_call=config.rows_per_call,
        decode=run.decode,
    )
    problems = [run.data.train[picked[row.group]] for row in sampled]
    rewards = grade_all(run.reward, [row.text for row in sampled], problems)
    return [replace(row, reward=0.0 if row.truncated else reward) for row, reward in zip(sampled, rewards)]


@dataclass
class Batch:
    """What the updates of one step read: tensors on the CPU with B rows and R response columns."""

    rollouts: Rollouts
    rewards: Tensor  # [B]
    response_advantage: Tensor  # [B]
    prefix_advantage: Tensor  # [B]
    old_log_probs: Tensor  # [B, R] log-probs of the sampling policy
    entropy: Tensor  # [B, R] entropies of the sampling policy
    old_known: Tensor  # [B] bool: True if old_log_probs were taken before the first update (known_before)
    rows: list[Row]
    first_rows: list[Row]  # the rows before second_chance replaces or resamples some of them
    sampled_tokens: int  # number of sampled tokens, including those of replaced rows
    hinted_log_probs: Tensor | None = None  # [B, R] log-probs of SDFT's teacher (methods.hinted_log_probs)


def forward(model: PreTrainedModel, rollouts: Rollouts, rows: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Returns the token_stats of b `rows` of the batch: log_probs and entropy [b, R]. If `rows` is empty, row 0
    passes through the model without a result, because FSDP needs equally many forward passes on every rank."""
    passing = rows if len(rows) else torch.tensor([0])
    ids, mask = rollouts.input_ids[passing].to(model.device), rollouts.attention_mask[passing].to(model.device)
    log_probs, entropy = token_stats(model, ids, mask, rollouts.response_mask.shape[1], temperature)
    return log_probs[: len(rows)], entropy[: len(rows)]


@torch.no_grad()
def old_stats(model: PreTrainedModel, rollouts: Rollouts, config: Config, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the sampling policy's log-probs and entropies of all tokens, [B, R]; outside `rows` they are 0."""
    log_probs, entropy = torch.zeros(2, *rollouts.response_mask.shape)
    for part in micro_batches(rollouts, rows, config.micro_batch_tokens):
        part_log_probs, part_entropy = forward(model, rollouts, part, config.temperature)
        log_probs[part], entropy[part] = part_log_probs.cpu(), part_entropy.cpu()
    return sum_over_ranks(log_probs), sum_over_ranks(entropy)


def known_before(method: Method, config: Config, rollouts: Rollouts, response_advantage: Tensor) -> Tensor:
    """Returns a mask [B] of rows whose old log-probs are taken before a step's first update: all rows if there are
    several updates. If a step has one update, on one process, the forward pass of the update itself gives the old
    log-probs, because pi has not changed yet. Then the mask has only rows with a prefix, which the entropy clip ranks
    before the update, and rows with advantage 0, which the update skips.
    """
    several = config.updates_per_step > 1 or world_size() > 1
    if several or (method.entropy_clip and method.rows == "on_policy"):
        return torch.ones_like(rollouts.hybrid)
    return rollouts.prefix_mask.any(1) | (response_advantage == 0)


def rollout_batch(run: Run, picked: Sequence[int], step: int) -> Batch:
    """Samples and grades the rows of one step of reinforcement; returns them with advantages and old log-probs."""
    config, method = run.config, run.method
    sample = partial(sample_groups, run, picked, step)
    first_rows = sample(range(len(picked)), rows=method.rows)
    demonstrated = [bool(run.data.encoded[i].demonstrations) for i in picked]
    rows, more_tokens = second_chance(method, first_rows, config.gate, demonstrated, sample)
    rollouts = pack(rows, run.model.generation_config.pad_token_id)
    rewards = torch.tensor([row.reward for row in rows])
    baseline = method.baseline or config.baseline
    scale_by_std = config.scale_by_std if method.scale_by_std is None else method.scale_by_std
    own, prefix = advantages(rewards, rollouts.group, rollouts.hybrid, baseline, scale_by_std)
    old_known = known_before(method, config, rollouts, own)
    old_log_probs, entropy = old_stats(run.model, rollouts, config, old_known.nonzero().squeeze(1))
    return Batch(
        rollouts=rollouts,
        rewards=rewards,
        response_advantage=own,
        prefix_advantage=prefix,
        old_log_probs=old_log_probs,
        entropy=entropy,
        old_known=old_known,
        rows=rows,
        first_rows=first_rows,
        sampled_tokens=more_tokens + sum(len(row.log_probs) for row in first_rows),
        hinted_log_probs=hinted_log_probs(run, picked, rows, step, pack, old_stats),
    )


def demonstration_batch(run: Run, problems: Sequence[Encoded], step: int) -> Batch:
    """Returns a batch for an SFT update: one whole demonstration per problem. Nothing is sampled or graded."""
    rows: list[Row] = []
    for i, problem in enumerate(problems):
        rows += plan_group(problem, i, rows="demonstration", rollouts=1, hybrid=1, key=(run.config.seed, step))
    rollouts = pack(rows, run.model.generation_config.pad_token_id)
    nothing, zeros = torch.zeros(len(rows)), torch.zeros(rollouts.response_mask.shape)
    return Batch(rollouts, nothing, nothing, nothing, zeros, zeros.clone(), nothing.bool(), rows, rows, 0)


def mini_batch_tokens(run: Run, batch: Batch, rows: Tensor, normalizer: float, progress: float, key: tuple) -> Tokens:
    """Returns all that the token weights of the mini-batch `rows` depend on. Numbers such as T_d are those of the
    whole mini-batch, so that micro-batches and ranks cannot change them. The tensors have all rows of the batch, but
    weight_mask is False outside `rows`."""
    config, rollouts = run.config, batch.rollouts
    prefix_advantage, own_advantage = batch.prefix_advantage[:, None], batch.response_advantage[:, None]
    demonstration_tokens = int(rollouts.prefix_mask[rows].sum())
    weight_mask = torch.zeros_like(rollouts.response_mask)
    weight_mask[rows] = weighted_tokens(
        run.method,
        rollouts.response_mask[rows],
        rollouts.prefix_mask[rows],
        batch.entropy[rows],
        config.entropy_keep,
        torch_generator(config.seed, "entropy clip", *key),
    )
    return Tokens(
        log_probs=batch.old_log_probs,
        old_log_probs=batch.old_log_probs,
        entropy=batch.entropy,
        response_mask=rollouts.response_mask,
        prefix_mask=rollouts.prefix_mask,
        weight_mask=weight_mask,
        advantages=torch.where(rollouts.prefix_mask, prefix_advantage, own_advantage),
        rewards=batch.rewards,
        clip_low=config.clip_low,
        clip_high=config.clip_high,
        coefficient=coefficient_at(run.method, progress, config.coefficient),
        policy_tokens=int(rollouts.response_mask[rows].sum()) - demonstration_tokens,
        demonstration_tokens=demonstration_tokens,
        normalizer=normalizer,
        max_response_tokens=config.max_response_tokens,
        hinted_log_probs=batch.hinted_log_probs,
    )


def update(
    run: Run, batch: Batch, tokens: Tokens, temperature: float, optimizer: torch.optim.Optimizer, lr: float
) -> dict[str, Any]:
    """Makes one optimizer step on a mini-batch, and returns its loss, gradient norm and sums for metrics.

    The gradient does not depend on the micro-batches. Rows whose weights are all 0 skip the forward and backward
    pass, but Z counts them. If an old log-prob, the loss or the gradient is not finite, every rank skips the update.
    """
    active = ~batch.old_known & tokens.weight_mask.any(1)  # rows whose old log-probs are taken in this update
    for nats in (-1, 0, 1):  # a weight that is 0 at r = 1 can differ from 0 after an update
        moved = replace(tokens, log_probs=tokens.old_log_probs + nats)
        active |= (token_weights(run.method, moved) != 0).any(1)
    if not batch.old_log_probs.isfinite().all():
        return skipped_update(run)
    if not active.any():
        run.skipped = 0
        return {"loss": 0.0, "grad_norm": 0.0, "entropy": 0.0, "with_weight": 0, "skipped": 0}
    totals = torch.zeros(3, dtype=torch.float64)  # sum of loss, sum of entropies, number of tokens with a weight
    for rows in micro_batches(batch.rollouts, active.nonzero().squeeze(1), run.config.micro_batch_tokens):
        log_probs, entropy = forward(run.model, batch.rollouts, rows, temperature)
        late = ~batch.old_known[rows]  # rows that have no old log-probs yet; pi has not changed, so r = 1
        batch.old_log_probs[rows[late]] = log_probs.detach().cpu()[late]
        batch.entropy[rows[late]] = entropy.cpu()[late]
        part = tokens.at(rows, log_probs, entropy)  # `at` reads the old log-probs that were just written to `batch`
        weights = token_weights(run.method, part)
        loss = weighted_loss(log_probs, weights, part.response_mask, tokens.normalizer)
        loss.backward()
        totals += torch.tensor([float(loss.detach()), float(entropy.sum()), float((weights != 0).sum())])
    loss, entropy, with_weight = sum_over_ranks(totals).tolist()
    norm = clip_gradients(run.model.parameters(), run.config.max_grad_norm)
    if not math.isfinite(loss + norm):
        optimizer.zero_grad()
        return skipped_update(run)
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_times", 1.0)
    optimizer.step()
    optimizer.zero_grad()
    run.skipped = 0
    return {"loss": loss, "grad_norm": norm, "entropy": entropy, "with_weight": int(with_weight), "skipped": 0}


def skipped_update(run: Run) -> dict[str, Any]:
    run.skipped += 1
    return {"loss": None, "grad_norm": None, "entropy": None, "with_weight": 0, "skipped": 1}


@dataclass
class Step:
    """What one step did. support/record.py computes the metrics of the step from these fields."""

    batch: Batch
    mini_batches: list[Tokens]
    updates: list[dict[str, Any]]  # what `update` returned for each mini-batch
    seconds: tuple[float, float]  # seconds that making the batch took, and seconds that the updates took
    picked: list[int]  # indices of the step's problems; [] in a supervised step
    collected: dict[str, Any]  # ReLIFT's metrics


def sft_step(run: Run, problems: Sequence[Encoded], step: int, optimizer: torch.optim.Optimizer, lr: float) -> Step:
    """Make one SFT update on the demonstrations of `problems`, with log-probs at temperature 1."""
    start = time.perf_counter()
    batch = demonstration_batch(run, problems, step)
    ready = time.perf_counter()
    normalizer = int(batch.rollouts.prefix_mask.sum())
    tokens = mini_batch_tokens(run, batch, torch.arange(len(problems)), normalizer, 0.0, ("sft", step))
    sums = update(run, batch, tokens, 1.0, optimizer, lr)
    return Step(batch, [tokens], [sums], (ready - start, time.perf_counter() - ready), [], {})


def rl_step(run: Run, step: int) -> Step:
    """Make one step of reinforcement; `step` counts from 0."""
    config = run.config
    start = time.perf_counter()
    picked = problems_of_step(len(run.data.train), config.prompts_per_step, step, config.seed, "order")
    batch = rollout_batch(run, picked, step)
    ready = time.perf_counter()
    mini_batches, updates = [], []
    for part, groups in enumerate(torch.arange(len(picked)).tensor_split(config.updates_per_step)):
        rows = torch.isin(batch.rollouts.group, groups).nonzero().squeeze(1)
        # Z counts all planned rows, also those of a group that one demonstration has replaced
        normalizer = len(groups) * config.rollouts_per_prompt * config.max_response_tokens
        tokens = mini_batch_tokens(run, batch, rows, normalizer, step / config.steps, (step, part))
        updates.append(update(run, batch, tokens, config.temperature, run.optimizer, config.lr))
        mini_batches.append(tokens)
    collected = collect(run, picked, batch.first_rows, partial(sft_step, run, step=step))
    return Step(batch, mini_batches, updates, (ready - start, time.perf_counter() - ready), picked, collected)
