"""This file has the table of methods: the rows of a group, and the weight of every token. Prefix-RFT's own formulas
are in loss.py.

A new method is one entry of METHODS, and one weight function more if no function here or in loss.py has its formula.

The order of this file: the weight functions, each with its source; `Method` and METHODS; then the parts that only
some methods use: `coefficient_at` (for CHORD, whose coefficient falls), `second_chance` (HPT and rescue replace or
resample groups without a right row), `hint` and `hinted_log_probs` (SDFT's teacher sees a demonstration), `Collector`
and `collect` (ReLIFT keeps a buffer of unsolved problems), and the learning rate of the supervised stage.

In the formulas p = pi(y) is a token's probability, r = p / pi_old(y) is PPO's ratio, and A is the advantage. T_own is
the number of the policy's own tokens in the mini-batch, and T_d the number of demonstration tokens. The first line of
a weight function's docstring is its formula. A coefficient c mixes an RL term and a demonstration term, and its value
depends on the denominators of the two terms. In this project all tokens are summed and divided by Z. If a method's
source (paper or code) takes the token mean of both terms, the factor T_own / T_d turns the source's c into a weight
of this sum. If the source adds a token mean to a sum over Z, the factor is Z / T_d. This project does not have
RL-PLUS (LUFFY's rows, another shaping), methods with hints in the prompt or several teachers (AMPO, Scaf-GRPO,
Guide), QuestA (`rescue` with a constant share), and distillation from a larger teacher. configs/README.md says what
the code lacks for further methods.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from loss import Tokens, clipped

# The method rescue tries prefixes of these shares of a demonstration, in this order. [GHPO counts a share in
# characters, this project in tokens.]
RESCUE_SHARES = (0.25, 0.5, 0.75)
# The coefficient of a method with a `coefficient_end` falls over this first share of the run. [CHORD's mu falls from
# 0.6 to 0 over 20 of 100 steps in Trinity-RFT's mix_chord_toolace.yaml, and from 0.9 to 0.05 over 200 steps of a
# longer run in mix_chord.yaml.]
FALL = 0.2

# ---- the weights


def unclipped(t: Tokens) -> Tensor:
    """A·r

    This is the policy gradient without PPO's clip, as the scripts of LUFFY, ReLIFT, HPT and TRAPO take it. Unlike
    this project, the four scripts do not divide the sum over tokens by the number of rows in a mini-batch, so their
    gradient is about 64 times as large. Their gradient clip at 1.0 (ReLIFT: 0.7) therefore acts nearly always, and
    the clip of this project rarely. The factor 64 does not change AdamW's step, because AdamW divides by the size of
    past gradients.
    """
    return torch.where(t.advantages != 0, t.advantages * (t.log_probs - t.old_log_probs).exp(), 0.0)


def zero(t: Tokens) -> Tensor:
    """0"""
    return torch.zeros_like(t.log_probs)


def constant(t: Tokens) -> Tensor:
    """c

    Every demonstration token has the same weight. [Source: paper Table 8]
    """
    return torch.full_like(t.log_probs, t.coefficient)


def token_mean(t: Tokens) -> Tensor:
    """c·Z/T_d

    The demonstration term is c times the token mean of -log p, added to an RL sum over Z. In a batch that holds only
    demonstrations Z = T_d and c = 1, so w = 1: this is plain SFT. In RFT + SFT loss [LUFFY, train_rl_sft_loss.sh] the
    RL term of each micro-batch is the sum over its tokens, divided by L = max_response_tokens and not by the number
    of rows. LUFFY's SFT term is the token mean of each micro-batch, with coefficient 1. With the denominators of this
    project LUFFY's coefficient is c = K/B, where K is the number of micro-batches in a step that hold a
    demonstration, and B = 512 rows. K/B is at most 0.125, and about 0.07 with 8 GPUs and micro-batches of 32768
    tokens; this project uses c = 0.1. Where few groups have a demonstration, as in the embedded task, K/B would be
    smaller, so tune c.
    """
    return torch.full_like(t.log_probs, t.coefficient * t.normalizer / max(1, t.demonstration_tokens))


def matched_means(t: Tokens) -> Tensor:
    """c·T_own/T_d

    UFT and CHORD take the token mean of each term and multiply the mean of the demonstration term by c. [Sources:
    UFT; CHORD's mu] The weight of this function is exactly that of UFT's code. UFT's KL and entropy terms (0.001
    each) and its rule that a prefix ends with a sentence are not in this project. Unlike in UFT, the tokens of the
    prefix count towards max_response_tokens, and a prefix never has the last token of a demonstration. UFT's script
    has 4 rollouts of 256 problems and 4 updates per step; in this project these numbers are settings.
    """
    return torch.full_like(t.log_probs, t.coefficient * t.policy_tokens / max(1, t.demonstration_tokens))


def probability_mean(t: Tokens) -> Tensor:
    """p·Z/T_d

    This is SFT in which each token is weighted by its own probability. As in DFT, the sum is divided by T_d.
    [Sources: DFT Eq. 9; trl's dft_loss]
    """
    return t.log_probs.exp() * t.normalizer / max(1, t.demonstration_tokens)


def shaped(t: Tokens) -> Tensor:
    """A·cp/(p + c)²

    This is the gradient of A f(p), where f(p) = p / (p + c) and c is LUFFY's gamma [LUFFY Eq. 7]. As in LUFFY,
    demonstration tokens are in the same sum as the policy's own tokens.
    """
    p = t.log_probs.exp()
    # the clamp makes the weight 0, not 0 / 0, if p underflows and c = 0
    below = (p + t.coefficient).clamp(min=torch.finfo(p.dtype).tiny)
    return t.advantages * (t.coefficient / below) * (p / below)


def remaining_clipped(t: Tokens) -> Tensor:
    """(1 − c)·I·A·r

    This is the weight of CHORD's policy tokens, where c is CHORD's mu. [Source: 2508.11408 Eq. 5; CHORD's code in
    Trinity-RFT also has a dual clip at 3]
    """
    return (1 - t.coefficient) * clipped(t)


def uncertain_means(t: Tokens) -> Tensor:
    """c·p(1 − p)·T_own/T_d

    CHORD's phi = p(1 − p) gives most weight to demonstration tokens with p near 1/2. CHORD takes the token mean of
    the RL term and of the demonstration term. [Source: 2508.11408 Eq. 7]
    """
    p = t.log_probs.exp()
    return p * (1 - p) * matched_means(t)


def row_mean(t: Tokens) -> Tensor:
    """c·L/len(y*)

    Each demonstration that replaces an unsolved group adds the mean of -log p over its tokens to the loss. [Source:
    HPT] In HPT's code the RL term is the sum over tokens divided by L, and the SFT term is c times the token mean of
    each micro-batch. The weight of this function equals HPT's if a demonstration is alone in its micro-batch;
    otherwise HPT's weight is smaller. The SFT term grows with the number of replaced groups. HPT cuts the rows that
    are left after the replacement into mini-batches of 512 rows. So HPT makes one update if more than 73 of 128
    problems are unsolved (at most 512 rows are left), else a second update with the rows beyond 512. In this project
    every update of a step has an equal part of the problems.
    """
    lengths = t.prefix_mask.sum(1, keepdim=True).clamp(min=1).to(t.log_probs)
    return (t.coefficient * t.max_response_tokens / lengths).expand_as(t.log_probs)


def row_entropy(t: Tokens) -> Tensor:
    """[B, 1] H, the mean entropy of each row's response tokens"""
    total = torch.where(t.response_mask, t.entropy, 0.0).sum(1, keepdim=True)
    return total / t.response_mask.sum(1, keepdim=True).clamp(min=1)


def srft_policy(t: Tokens) -> Tensor:
    """0.1·e^H where the reward is 1, else −1

    In SRFT the policy's own tokens have no baseline and no ratio. H is the mean entropy of the row's tokens under the
    present policy. As in SRFT, the tokens are summed.
    """
    return torch.where(t.rewards[:, None] == 1, 0.1 * row_entropy(t).exp(), -1.0).expand_as(t.log_probs)


def srft_demonstration(t: Tokens) -> Tensor:
    """c·0.5·e^(−H)·Z/T_d + A·γp/(p + γ)², γ = 0.1

    This is the weight of SRFT's demonstration tokens. In SRFT's code the first term is the token mean of a
    micro-batch and the second a sum, so c is chosen as for RFT + SFT. [2506.19767 has no official code: these are the
    weights of Unify-Post-Training's re-implementation]
    """
    return 0.5 * (-row_entropy(t)).exp() * token_mean(t) + shaped(dataclasses.replace(t, coefficient=0.1))


def trust(t: Tokens) -> Tensor:
    """min(1, 10p)

    In TRAPO the advantage of prefix tokens is 1, whatever the row's reward. Prefix tokens with p below 0.1 have less
    weight. As in TRAPO, prefix tokens are in the same sum as the policy's own tokens. This project takes from TRAPO
    only this weight and the baseline over all 8 rows. In TRAPO a group gets prefixes of 25, 50 and 100% of a
    demonstration, one after the other, as long as its rows fail, and the loss has an entropy bonus of 0.001. In this
    project a group has one hybrid row, and its prefix has the length that Prefix-RFT draws. [Sources: 2512.17636;
    Su-my/TRAPO, "clip_low"]
    """
    return (10 * t.log_probs.exp()).clamp(max=1.0)


def toward_hinted(t: Tokens) -> Tensor:
    """r·(log q − log p)

    SDFT's teacher is q = π(y | x, y*), the policy with a demonstration y* in the prompt x; p = π(y | x) is the policy
    without the demonstration. On average over sampled tokens, this weight gives the gradient of KL(p ‖ q). The factor
    r (PPO's ratio) corrects for the updates since the sampling. Rows of a problem without a demonstration have weight
    0. SDFT's code sums the divergence over the vocabulary; this project estimates the divergence from the sampled
    token. SDFT takes the token mean of each row, without the row's first 3 tokens, and averages these means over
    rows. In this project the loss is a sum over Z, so a row y weighs len(y)/L times as much as in SDFT. The README of
    SDFT's repository (April 2026) says that the paper's results used the forward KL, the default of its code.
    [Sources: 2601.19897; idanshen/Self-Distillation, distil_trainer.py `_compute_loss`, as a fork of that repository
    has it]
    """
    gain = t.hinted_log_probs - t.log_probs
    return torch.where(gain.isnan(), 0.0, (t.log_probs - t.old_log_probs).exp() * gain)


# ---- the methods


@dataclass(frozen=True)
class Method:
    """One entry of the table of methods: which rows a group has, and which weights their tokens have."""

    source: str  # the paper
    rows: str = "on_policy"  # rows of a group: on_policy | hybrid | demonstration | shared_prefix (sample.plan_group)
    policy_weight: Callable[[Tokens], Tensor] = clipped  # function that gives weights to the policy's own tokens
    demonstration_weight: Callable[[Tokens], Tensor] = zero  # function that gives weights to demonstration tokens
    entropy_clip: str = ""  # which tokens the entropy clip keeps: those of high | low | random entropy; "" for all
    coefficient: float | None = None  # c in the weights' formulas; the setting `coefficient` overrides it
    coefficient_end: float | None = None  # c falls to this value along half a cosine over the share FALL of the run
    schedule: str = "cosine"  # the schedule of the prefix fraction (sample.SCHEDULES)
    baseline: str | None = None  # the method's own baseline; None: as in the setting `baseline`
    scale_by_std: bool | None = None  # the method's own scale_by_std; None: as in the setting `scale_by_std`
    stages: tuple[str, ...] = ("rl",)  # stages of a run; "sft": updates on demonstrations, "rl": graded rollouts
    # what happens to a group without a right row: replace (by a demonstration) | rescue (sample it again behind a
    # prefix) | collect (train on a demonstration later)
    unsolved: str = ""
    hinted: bool = False  # whether the weights need hinted_log_probs (SDFT)

    @property
    def needs_demonstrations(self) -> bool:
        return self.rows != "on_policy" or "sft" in self.stages or bool(self.unsolved) or self.hinted


def variant(method: Method, **changes: object) -> Method:
    return dataclasses.replace(method, **changes)


RFT = Method("2503.20783 (Dr.GRPO)")
PREFIX_RFT = Method("2507.01679", "hybrid", clipped, clipped, entropy_clip="high")
PREFIX_RFT_FROZEN = variant(PREFIX_RFT, demonstration_weight=zero, entropy_clip="")
SFT = Method("token-mean cross-entropy", "demonstration", demonstration_weight=token_mean, stages=("sft",))
SFT_THEN_RFT = Method("2504.14945", demonstration_weight=token_mean, stages=("sft", "rl"))
CHORD = Method("2508.11408", "demonstration", remaining_clipped, baseline="on_policy", scale_by_std=True)

METHODS: dict[str, Method] = {
    "sft": SFT,
    "dft": variant(SFT, source="2508.05629", demonstration_weight=probability_mean),
    "rft": RFT,
    "sft-rft": SFT_THEN_RFT,
    # SFT→RFT with DFT (probability_mean) in place of SFT: a combination of this project, from no paper
    "dft-rft": variant(SFT_THEN_RFT, source="2508.05629", demonstration_weight=probability_mean),
    # ---- Prefix-RFT and its ablations [paper Table 8 and Figure 6]
    "prefix-rft": PREFIX_RFT,
    "prefix-rft-frozen": PREFIX_RFT_FROZEN,
    "prefix-rft-all": variant(PREFIX_RFT, entropy_clip=""),
    "prefix-rft-static": variant(PREFIX_RFT, demonstration_weight=constant, entropy_clip="", coefficient=0.001),
    "prefix-rft-low": variant(PREFIX_RFT, entropy_clip="low"),
    "prefix-rft-random": variant(PREFIX_RFT, entropy_clip="random"),
    "prefix-rft-uniform": variant(PREFIX_RFT, schedule="uniform"),
    "prefix-rft-constant": variant(PREFIX_RFT, schedule="constant"),
    "rft-entropy-clip": variant(RFT, source="2507.01679", entropy_clip="high"),
    # in DR-PO all 8 rows of a group have the same prefix, and prefix tokens are not in the loss
    "dr-po": variant(PREFIX_RFT_FROZEN, rows="shared_prefix", baseline="group"),
    # ---- the methods it is compared with, and those that came after
    "rft+sft": Method("2504.14945", "demonstration", unclipped, token_mean, coefficient=0.1, baseline="on_policy"),
    "luffy": Method("2504.14945", "demonstration", unclipped, shaped, coefficient=0.1, baseline="group"),
    "uft": Method(
        "2505.16984",
        "shared_prefix",
        clipped,
        matched_means,
        coefficient=0.001,
        schedule="uft",
        baseline="group",
        scale_by_std=True,
    ),
    "relift": Method("2506.07527", "on_policy", unclipped, token_mean, unsolved="collect"),
    "chord-mu": variant(CHORD, demonstration_weight=matched_means, coefficient=0.6, coefficient_end=0.0),
    "chord-phi": variant(CHORD, demonstration_weight=uncertain_means, coefficient=0.1),
    "hpt": Method("2509.04419", "on_policy", unclipped, row_mean, coefficient=1.0, unsolved="replace"),
    "srft": Method("2506.19767", "demonstration", srft_policy, srft_demonstration, coefficient=0.1, baseline="group"),
    "prefix-rft-trust": Method("2512.17636", "hybrid", unclipped, trust, baseline="group"),
    "rescue": Method("2507.10628, 2506.17211", baseline="group", unsolved="rescue"),
    # SDFT learns from its teacher's log-probs, not from the reward
    "sdft": Method("2601.19897", policy_weight=toward_hinted, scale_by_std=False, hinted=True),
}


# ---- what some methods do besides


def coefficient_at(method: Method, progress: float, setting: float | None) -> float:
    """Returns the coefficient c at `progress` (0 to 1) of the run: the `setting`, or else the method's own c, or 1
    for a method without c.

    If the method has a coefficient_end, c falls to coefficient_end along half a cosine over the first share FALL
    (20%) of the run.
    """
    start = method.coefficient if setting is None else setting
    if start is None or method.coefficient_end is None:
        return 1.0 if start is None else start
    end = min(start, method.coefficient_end)
    return end + (start - end) * (1 + math.cos(math.pi * min(1.0, progress / FALL))) / 2


def unsolved_groups(rows: Sequence[Any], gate: int) -> list[int]:
    """Returns the groups of `rows` (sample.Row) in which at most `gate` rows are right (reward 1)."""
    right: dict[int, int] = {}
    for row in rows:
        right[row.group] = right.get(row.group, 0) + (row.reward == 1)
    return [group for group, count in right.items() if count <= gate]


def second_chance(
    method: Method, rows: list[Any], gate: int, demonstrated: Sequence[bool], sample: Callable[..., list[Any]]
) -> tuple[list[Any], int]:
    """Before any update, replaces or samples again the unsolved groups whose problem has a demonstration
    (`demonstrated` says which problems have one). Returns all rows of the step, and how many tokens this function
    sampled.

    - replace: one whole demonstration takes the group's place. [HPT]
    - rescue: all rows are sampled again behind the same first 25%, then 50%, then 75% of a demonstration, until one
      row is right. [GHPO, BREAD. GHPO also puts the hint into the prompt, adds 0.5 to the reward for the format,
      divides advantages by the rewards' deviation, averages over tokens, and has a cosine learning rate with warm-up;
      this project does not.]

    `sample(groups, rows=…, rollouts=…, …)` is step.sample_groups, which returns graded rows of `groups`.
    """
    tries: list[dict[str, Any]] = []
    if method.unsolved == "replace":
        tries = [{"rows": "demonstration", "rollouts": 1}]
    elif method.unsolved == "rescue":
        tries = [{"rows": "shared_prefix", "share": lambda _, share=share: share} for share in RESCUE_SHARES]
    tokens = 0
    for attempt, settings in enumerate(tries, 1 if method.unsolved == "rescue" else 0):
        groups = [group for group in unsolved_groups(rows, gate) if demonstrated[group]]
        if not groups:
            break
        again = sample(groups, attempt=attempt, **settings)
        tokens += sum(len(row.log_probs) for row in again)
        others = [row for row in rows if row.group not in groups]
        rows = sorted([*others, *again], key=lambda row: row.group)
    return rows, tokens


def hint(problem: Any, step: int) -> list[int]:
    """Returns the ids of a prompt that shows a demonstration: the problem (data.loader.Encoded), a demonstration as
    its answer, and the problem again. If a problem has several demonstrations, the steps use them in turn. [SDFT puts
    problem and demonstration into one user message, which asks for a response of the model's own.]"""
    demonstration = problem.demonstrations[step % len(problem.demonstrations)]
    return [*problem.prompt_ids, *demonstration, problem.end_id, *problem.prompt_ids]


def hinted_log_probs(
    run: Any, picked: list[int], rows: list[Any], step: int, pack: Callable[..., Any], old_stats: Callable[..., Any]
) -> Tensor | None:
    """Returns the log-probs [B, R] that SDFT's teacher gives to the tokens of `rows`. The teacher is the policy that
    sampled the rows, with a demonstration in its prompt. Rows of a problem without a demonstration have NaN. Returns
    None for methods that are not `hinted`.

    In SDFT's code the teacher's weights are a running mean of the policy's weights, with a rate of 0.01 per step. In
    this project the teacher is the policy itself. `picked` are the step's problems; `pack` is sample.pack and
    `old_stats` is step.old_stats.
    """
    if not run.method.hinted:
        return None
    problems = [run.data.encoded[picked[row.group]] for row in rows]
    shown = torch.tensor([bool(problem.demonstrations) for problem in problems])
    hinted = list(rows)
    for i in shown.nonzero().flatten().tolist():
        hinted[i] = dataclasses.replace(rows[i], prompt_ids=hint(problems[i], step))
    rollouts = pack(hinted, run.model.generation_config.pad_token_id)
    log_probs, _ = old_stats(run.model, rollouts, run.config, shown.nonzero().squeeze(1))
    return log_probs.where(shown[:, None], math.nan)


@dataclass
class Collector:
    """What ReLIFT keeps between steps: unsolved problems that wait for an update on their demonstrations, newest
    first, and the optimizer of that update."""

    waiting: list[int]  # indices of the training problems in ReLIFT's buffer
    optimizer: torch.optim.Optimizer


def collect(run: Any, picked: list[int], rows: list[Any], sft_step: Callable[..., Any]) -> dict[str, Any]:
    """Collects ReLIFT's unsolved problems in a buffer. A problem of the step (`picked`) that has a demonstration and
    that no graded row solved is put at the front of the buffer, each time it is unsolved. Once the buffer has
    `relift_buffer` problems, the first `relift_buffer` of them give one supervised update, with an optimizer of its
    own. Returns the metrics of ReLIFT's buffer and update for metrics.jsonl.

    ReLIFT's code takes a token mean of every 4 rows and averages these means. ReLIFT clips the gradient of the
    supervised update at 1.0 and the gradient of reinforcement at 0.7. In this project the loss is one token mean over
    the whole update, and `max_grad_norm` clips both gradients.
    """
    config, collector, encoded = run.config, run.collector, run.data.encoded
    if not collector:
        return {}
    unsolved = [picked[group] for group in unsolved_groups(rows, config.gate)]
    collector.waiting[:0] = [i for i in unsolved if encoded[i].demonstrations]
    metrics: dict[str, Any] = {"relift_updates": 0, "relift_lr": config.relift_lr}
    if len(collector.waiting) >= config.relift_buffer:
        due = [encoded[i] for i in collector.waiting[: config.relift_buffer]]
        del collector.waiting[: config.relift_buffer]
        sums = sft_step(due, optimizer=collector.optimizer, lr=config.relift_lr).updates[0]
        metrics |= {"relift_updates": 1, "relift_loss": sums["loss"], "relift_grad_norm": sums["grad_norm"]}
        metrics |= {"relift_skipped_updates": sums["skipped"], "relift_tokens": sums["with_weight"]}
    return metrics | {"relift_buffer": len(collector.waiting)}


def sft_learning_rate(step: int, config: Any) -> float:
    """Returns the learning rate of supervised step `step` (from 0): it rises linearly to sft_lr over the first 10% of
    the supervised steps, then falls along half a cosine to sft_lr_end times sft_lr."""
    warm_up = max(1, round(0.1 * config.sft_steps))
    if step < warm_up:
        return config.sft_lr * (step + 1) / warm_up
    cosine = (1 + math.cos(math.pi * (step - warm_up) / max(1, config.sft_steps - warm_up))) / 2
    return config.sft_lr * (config.sft_lr_end + (1 - config.sft_lr_end) * cosine)
