"""One training step, top to bottom: rollouts, rewards, advantages, the updates, the metrics.

A step of reinforcement (`rl_step`):

    problems  -> plan_group, generate, pack            rollouts: on-policy rows and hybrid ones, in one batch
              -> grade                                 0 to 1; a response cut off by the budget gets 0
              -> (hpt, rescue) `second_chance`         groups without a right row are replaced or sampled again
              -> advantages                            of each row's own tokens and of its prefix
              -> old log-probs and entropies           one forward pass, before the first update
              -> for each mini-batch: weight_mask, then micro-batches: token_stats, token_weights, loss, backward;
                 clip the gradient, AdamW
              -> (relift) one update on demonstrations of collected problems

A supervised step (`sft_step`) is the same with whole demonstrations as rows and nothing to sample. Every method is an
entry of loss.METHODS; nothing here asks which one it is.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from data.loader import Encoded, Problem
from loss import Method, Tokens, advantages, coefficient_at, token_weights, weight_mask, weighted_loss
from model import token_stats
from reward import Reward, grade_all
from sample import Rollouts, Row, generate, pack, plan_group, torch_generator
from support.config import Config
from support.distributed import clip_gradients, sum_over_ranks, world_size
from support.micro_batches import rank_micro_batches
from support.record import example_rows, group_record, step_metrics

RESCUE_FRACTIONS = (0.25, 0.5, 0.75)  # of a demonstration, one after the other [GHPO: characters, here tokens]
SKIPPED = {"skipped": 1, "weighted": 0, "loss": None, "grad_norm": None}  # what an update is that was not made


@dataclass
class Data:
    """The problems of a run, as text and as ids."""

    train: list[Problem]
    encoded: list[Encoded]
    supervised: list[Encoded]  # problems with a demonstration, for the sft stage
    held: dict[str, tuple[list[Problem], list[Encoded]]]  # "validation" and "test", where there are such problems


@dataclass
class Run:
    """A run in progress."""

    config: Config
    method: Method
    model: PreTrainedModel
    tokenizer: Any
    reward: Reward
    data: Data
    optimizer: torch.optim.Optimizer
    collector: "Collector | None" = None  # ReLIFT
    skipped: int = 0  # updates in a row, up to now, that were left out because their numbers were not finite

    @property
    def sft_steps(self) -> int:
        return self.config.sft_steps if "sft" in self.method.stages else 0

    @property
    def total_steps(self) -> int:
        return self.sft_steps + (self.config.steps if "rl" in self.method.stages else 0)


@dataclass
class Collector:
    """ReLIFT: unsolved problems that wait for an update on their demonstrations, newest first; its optimizer."""

    waiting: list[int]  # indices of training problems
    optimizer: torch.optim.Optimizer


def problems_of_step(count: int, per_step: int, step: int, *key: object) -> list[int]:
    """Indices of step `step`'s problems: a fresh random order each epoch, whose remainder is skipped."""
    per_step = min(per_step, count)
    epoch, place = divmod(step, count // per_step)
    order = torch.randperm(count, generator=torch_generator(*key, epoch)).tolist()
    return order[place * per_step : (place + 1) * per_step]


# ---- the rollouts of a step


@dataclass
class Graded:
    """Sampled rows with their responses and rewards, group after group."""

    rows: list[Row]
    responses: list[list[int]]
    rewards: list[float]
    log_probs: list[list[float]]  # of own tokens, as the sampler drew them
    truncated: list[bool]
    texts: list[str]
    sampled_tokens: int  # those of replaced groups too

    def with_groups(self, other: "Graded") -> "Graded":
        """The same, with the groups of `other` in place of their own."""
        changed = {row.group for row in other.rows}
        stay = [entry for entry in self.entries() if entry[0].group not in changed]
        columns = zip(*sorted([*stay, *other.entries()], key=lambda entry: entry[0].group))
        return Graded(*map(list, columns), self.sampled_tokens + other.sampled_tokens)

    def entries(self) -> list[tuple[Row, list[int], float, list[float], bool, str]]:
        return list(zip(self.rows, self.responses, self.rewards, self.log_probs, self.truncated, self.texts))

    def unsolved(self, gate: int) -> list[int]:
        """Groups in which at most `gate` rows are right (reward 1)."""
        right: dict[int, int] = {}
        for row, reward in zip(self.rows, self.rewards):
            right[row.group] = right.get(row.group, 0) + (reward == 1)
        return [group for group, count in right.items() if count <= gate]


def plan(run: Run, picked: Sequence[int], groups: Sequence[int], step: int, rollouts: int, **how: Any) -> list[Row]:
    """The rows of some groups of this step; `picked` are the step's problems, `how` goes to plan_group."""
    config = run.config
    settings = {
        "schedule": run.method.schedule,
        "hybrid": min(rollouts, config.hybrid_per_prompt),
        "max_response_tokens": config.max_response_tokens,
        "seed": config.seed,
        "step": step,
        "total_steps": config.steps,
    }
    return [
        row
        for group in groups
        for row in plan_group(run.data.encoded[picked[group]], group, rollouts=rollouts, **settings, **how)
    ]


def sample_and_grade(run: Run, picked: Sequence[int], rows: list[Row]) -> Graded:
    config = run.config
    log_probs: list[list[float]] = []
    responses = generate(
        run.model,
        rows,
        config.max_response_tokens,
        config.temperature,
        rows_per_call=config.rows_per_call,
        prefill=config.prefill,
        decode=config.decode,
        log_probs=log_probs,
    )
    rollouts = pack(rows, responses, run.model, run.tokenizer)
    rewards = grade_all(run.reward, rollouts.texts, [run.data.train[picked[row.group]] for row in rows])
    truncated = rollouts.truncated.tolist()
    rewards = [0.0 if cut else reward for reward, cut in zip(rewards, truncated)]
    return Graded(rows, responses, rewards, log_probs, truncated, rollouts.texts, sum(map(len, log_probs)))


def second_chance(run: Run, picked: Sequence[int], graded: Graded, step: int) -> Graded:
    """What the method does, before any update, with groups that no rollout solved and that have a demonstration.

    replace   one whole demonstration in the group's place [HPT]
    rescue    all rows again behind the same first 25%, then 50%, then 75% of a demonstration, until one is right
              [GHPO, BREAD; GHPO puts the hint into the prompt, adds 0.5 to the reward for the format, divides
              advantages by the deviation, takes a token mean and a cosine rate with warm-up: none of it here]
    """

    def unsolved() -> list[int]:
        return [g for g in graded.unsolved(run.config.gate) if run.data.encoded[picked[g]].demonstrations]

    if run.method.unsolved == "replace" and (groups := unsolved()):
        rows = plan(run, picked, groups, step, rollouts=1, rows="demonstration")
        graded = graded.with_groups(sample_and_grade(run, picked, rows))
    elif run.method.unsolved == "rescue":
        for attempt, fraction in enumerate(RESCUE_FRACTIONS, 1):
            if not (groups := unsolved()):
                break
            again = {"rows": "shared_prefix", "attempt": attempt, "fraction": fraction}
            rows = plan(run, picked, groups, step, run.config.rollouts_per_prompt, **again)
            graded = graded.with_groups(sample_and_grade(run, picked, rows))
    return graded


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
    passed: Tensor  # [B] bool: rows whose old log-probs were taken before the update; the others get them in it
    fractions: Tensor  # [B] share of the demonstration a row was given
    sampled_tokens: int = 0
    drawn_log_probs: Tensor | None = None  # [n] of the own tokens, row after row, as the sampler had them
    first_try: Graded | None = None  # what was sampled before any second chance


def forward(model: PreTrainedModel, rollouts: Rollouts, rows: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """token_stats of some rows -> log_probs, entropy [b, R]"""
    ids, mask = rollouts.input_ids[rows], rollouts.attention_mask[rows]
    return token_stats(model, ids.to(model.device), mask.to(model.device), rollouts.response_mask.shape[1], temperature)


@torch.no_grad()
def old_stats(
    model: PreTrainedModel, rollouts: Rollouts, config: Config, wanted: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies of the sampling policy, [B, R]; 0 in rows that are not `wanted` [B]."""
    log_probs = torch.zeros(rollouts.response_mask.shape)
    entropy = torch.zeros_like(log_probs)
    wanted = torch.ones(len(rollouts.texts), dtype=torch.bool) if wanted is None else wanted
    for rows, counts in rank_micro_batches(rollouts, wanted.nonzero().squeeze(1), config.micro_batch_tokens):
        found = forward(model, rollouts, rows, config.temperature)
        if counts:
            width = found[0].shape[1]
            log_probs[rows, :width], entropy[rows, :width] = found[0].cpu(), found[1].cpu()
    return sum_over_ranks(log_probs), sum_over_ranks(entropy)


def passed_before(method: Method, config: Config, rollouts: Rollouts, response_advantage: Tensor) -> Tensor:
    """Rows [B] bool whose old log-probs are taken before the first update.

    All of them, but where a step has one update, on one process: there pi is still the policy that sampled, and the
    pass of the update gives both. Not for rows that an entropy clip ranks before the update, nor for rows without
    an advantage, which the update leaves out.
    """
    everything = config.updates_per_step > 1 or world_size() > 1
    if everything or (method.entropy_clip and method.rows == "on_policy"):
        return torch.ones_like(rollouts.hybrid)
    return rollouts.prefix_mask.any(1) | (response_advantage == 0)


def rollout_batch(run: Run, picked: Sequence[int], step: int) -> Batch:
    """Sample, grade and compare: the batch of one step of reinforcement."""
    config, method = run.config, run.method
    rows = plan(run, picked, range(len(picked)), step, config.rollouts_per_prompt, rows=method.rows)
    first_try = sample_and_grade(run, picked, rows)
    graded = second_chance(run, picked, first_try, step)
    rollouts, rewards = pack(graded.rows, graded.responses, run.model, run.tokenizer), torch.tensor(graded.rewards)
    baseline = method.baseline or config.baseline
    scale_by_std = config.scale_by_std if method.scale_by_std is None else method.scale_by_std
    compared = advantages(rewards, rollouts.group, rollouts.hybrid, baseline, scale_by_std)
    fractions = torch.tensor([row.fraction for row in graded.rows])
    passed = passed_before(method, config, rollouts, compared[0])
    old = old_stats(run.model, rollouts, config, passed)
    drawn = torch.tensor([value for log_probs in graded.log_probs for value in log_probs])
    return Batch(rollouts, rewards, *compared, *old, passed, fractions, graded.sampled_tokens, drawn, first_try)


def demonstration_batch(run: Run, problems: Sequence[Encoded], step: int) -> Batch:
    """Whole demonstrations, one per problem: what an SFT update reads. Nothing is sampled or graded."""
    settings = {"schedule": "constant", "rollouts": 1, "hybrid": 1, "max_response_tokens": 0, "total_steps": 1}
    settings |= {"rows": "demonstration", "seed": run.config.seed, "step": step}
    rows = [row for i, problem in enumerate(problems) for row in plan_group(problem, i, **settings)]
    rollouts = pack(rows, [row.prefix_ids for row in rows], run.model, run.tokenizer)
    none, zeros = torch.zeros(len(rows)), torch.zeros(rollouts.response_mask.shape)
    return Batch(rollouts, none, none, none, zeros, zeros.clone(), none.bool(), torch.ones(len(rows)))


# ---- one update


def mini_batch(run: Run, batch: Batch, rows: Tensor, normalizer: float, progress: float, key: tuple) -> Tokens:
    """What the weights of the mini-batch `rows` depend on, before its update: taken before it is cut into
    micro-batches or dealt to ranks. Its tensors have all rows of the batch; outside `rows` no token has a weight."""
    config, rollouts = run.config, batch.rollouts
    demonstration_tokens = int(rollouts.prefix_mask[rows].sum())
    mask = torch.zeros_like(rollouts.response_mask)
    mask[rows] = weight_mask(
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
        weight_mask=mask,
        rewards=batch.rewards,
        response_advantage=batch.response_advantage,
        prefix_advantage=batch.prefix_advantage,
        clip_low=config.clip_low,
        clip_high=config.clip_high,
        coefficient=coefficient_at(run.method, progress, config.coefficient),
        policy_tokens=int(rollouts.response_mask[rows].sum()) - demonstration_tokens,
        demonstration_tokens=demonstration_tokens,
        normalizer=normalizer,
        max_response_tokens=config.max_response_tokens,
    )


def update(
    run: Run, batch: Batch, tokens: Tokens, temperature: float, optimizer: torch.optim.Optimizer, lr: float
) -> dict[str, float]:
    """One optimizer step on a mini-batch; sums over its tokens for the metrics.

    The gradient is that of the whole mini-batch whatever the micro-batches are. Rows without any weight are left out
    of the forward pass (Z stays); without any row there is no optimizer step. Where an old log-prob, the loss or the
    gradient is not finite the update is SKIPPED, on every rank.
    """
    config, method, model = run.config, run.method, run.model
    has_weight = token_weights(method, tokens) != 0
    sums = {
        "loss": 0.0,
        "grad_norm": 0.0,
        "entropy": 0.0,
        "clipped": 0,
        "weighted": int(has_weight.sum()),
        "demonstration_tokens": tokens.demonstration_tokens,
        "demonstration_kept": int((tokens.weight_mask & tokens.prefix_mask).sum()),
        "skipped": 0,
    }
    if not batch.old_log_probs.isfinite().all():
        run.skipped += 1
        return sums | SKIPPED
    active = (has_weight.any(1) | (~batch.passed & tokens.weight_mask.any(1))).nonzero().squeeze(1)
    if len(active) == 0:
        return sums
    total = torch.zeros(3, dtype=torch.float64)  # loss, entropy, tokens with a weight
    for rows, counts in rank_micro_batches(batch.rollouts, active, config.micro_batch_tokens):
        log_probs, entropy = forward(model, batch.rollouts, rows, temperature)
        late, width = ~batch.passed[rows], log_probs.shape[1]  # pi is still the policy that sampled them: r = 1
        batch.old_log_probs[rows[late], :width] = log_probs.detach().cpu()[late]
        batch.entropy[rows[late], :width] = entropy.cpu()[late]
        part = tokens.at(rows, log_probs, entropy)  # its old_log_probs are the batch's
        weights = token_weights(method, part)
        loss = weighted_loss(log_probs, weights, part.response_mask & counts, tokens.normalizer)
        loss.backward()
        if counts:
            total += torch.tensor([float(loss.detach()), float(entropy.sum()), float((weights != 0).sum())])
    loss, entropy, unclipped = sum_over_ranks(total).tolist()
    norm = clip_gradients(model.parameters(), config.max_grad_norm)
    if not (math.isfinite(loss) and math.isfinite(norm)):
        optimizer.zero_grad()
        run.skipped += 1
        return sums | SKIPPED
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad()
    run.skipped = 0
    clipped = sums["weighted"] - int(unclipped)
    return sums | {"loss": loss, "grad_norm": norm, "entropy": entropy, "clipped": clipped}


# ---- the two kinds of step


def sft_learning_rate(step: int, config: Config) -> float:
    """10% linear warm-up, then half a cosine from sft_lr to the share `sft_lr_end` of it; `step` from 0."""
    warm_up = max(1, round(0.1 * config.sft_steps))
    if step < warm_up:
        return config.sft_lr * (step + 1) / warm_up
    cosine = (1 + math.cos(math.pi * (step - warm_up) / max(1, config.sft_steps - warm_up))) / 2
    return config.sft_lr * (config.sft_lr_end + (1 - config.sft_lr_end) * cosine)


def sft_step(
    run: Run, problems: Sequence[Encoded], step: int, optimizer: torch.optim.Optimizer, lr: float
) -> dict[str, Any]:
    """One update on the demonstrations of `problems`, at temperature 1: nothing is sampled here."""
    start = time.perf_counter()
    batch = demonstration_batch(run, problems, step)
    count = int(batch.rollouts.prefix_mask.sum())
    tokens = mini_batch(run, batch, torch.arange(len(problems)), count, 0.0, ("sft", step))
    sums = update(run, batch, tokens, 1.0, optimizer, lr)
    seconds = time.perf_counter() - start
    return {
        "loss": sums["loss"],
        "grad_norm": sums["grad_norm"],
        "lr": lr,
        "skipped_updates": sums["skipped"],
        "entropy": None if sums["skipped"] else sums["entropy"] / count,
        "response_tokens": count / len(problems),
        "trained_tokens": sums["weighted"],
        "tokens_per_second": count / seconds,
        "seconds_update": seconds,
    }


def collect(run: Run, picked: Sequence[int], batch: Batch, step: int) -> dict[str, Any]:
    """ReLIFT: unsolved problems wait, newest first and each as often as it was met; once `relift_buffer` wait, the
    first so many give one supervised update, with an optimizer of its own.

    The source takes the mean of the token means of 4 rows, and clips this gradient at 1.0 and reinforcement's at 0.7;
    here one token mean over the buffer, and `max_grad_norm` for both.
    """
    config, collector = run.config, run.collector
    unsolved = [picked[group] for group in batch.first_try.unsolved(config.gate)]
    collector.waiting[:0] = [i for i in unsolved if run.data.encoded[i].demonstrations]
    metrics: dict[str, Any] = {"relift_updates": 0, "relift_lr": config.relift_lr}
    if len(collector.waiting) >= config.relift_buffer:
        chosen = [run.data.encoded[i] for i in collector.waiting[: config.relift_buffer]]
        del collector.waiting[: config.relift_buffer]
        found = sft_step(run, chosen, step, collector.optimizer, config.relift_lr)
        metrics |= {"relift_updates": 1, "relift_loss": found["loss"], "relift_grad_norm": found["grad_norm"]}
        metrics["relift_skipped_updates"] = found["skipped_updates"]
        metrics["relift_tokens"] = found["trained_tokens"]
    return metrics | {"relift_buffer": len(collector.waiting)}


def rl_step(run: Run, step: int, record: bool = False) -> tuple[dict[str, Any], list[dict], dict | None]:
    """One step of reinforcement -> its metrics, two of its rows to look at and, if asked for, one whole group."""
    config = run.config
    start = time.perf_counter()
    picked = problems_of_step(len(run.data.train), config.prompts_per_step, step, config.seed, "order")
    parts = torch.arange(len(picked)).tensor_split(config.updates_per_step)
    batch = rollout_batch(run, picked, step)
    sampled = time.perf_counter()
    updates, recorded = [], None
    for part, groups in enumerate(parts):
        rows = torch.isin(batch.rollouts.group, groups).nonzero().squeeze(1)
        # Z counts the planned rows: where a demonstration has taken a group's place, fewer are left
        normalizer = len(groups) * config.rollouts_per_prompt * config.max_response_tokens
        tokens = mini_batch(run, batch, rows, normalizer, step / config.steps, (step, part))
        updates.append(update(run, batch, tokens, config.temperature, run.optimizer, config.lr))
        if record and not (recorded and any(row["hybrid"] for row in recorded["rows"])):
            recorded = group_record(run, batch, tokens, rows, picked)
    metrics = step_metrics(run, batch, updates)
    if run.collector:
        metrics |= collect(run, picked, batch, step)
    end = time.perf_counter()
    metrics |= {
        "tokens_per_second": int(batch.rollouts.response_mask.sum()) / (end - start),
        "seconds_sample": sampled - start,
        "seconds_update": end - sampled,
    }
    return metrics, example_rows(run, batch, picked), recorded
