"""The objective: advantages, entropy clip, a weight per token, one loss for every method.

A group, the N = 8 rollouts of one problem (Prefix-RFT, paper section 3):

    prompt | on-policy response ........... <eos>    r_1
    prompt | on-policy response ..... <eos>          r_2
      ...                                            ...    N - 1 on-policy rows
    prompt | on-policy response ....... <eos>        r_7
    prompt | PREFIX PREFIX | continuation ... <eos>  r_h    1 hybrid row
             ^ demonstration  ^ the policy goes on from there
             prefix_mask = 1
             response_mask = 1 over prefix, continuation and <eos>

**Every method is a weight per token.**  grad L = -(1/Z) sum_{i,t} w_{i,t} grad log pi(y_{i,t}), w detached.
METHODS is the table of methods; `token_weights` turns an entry into w.

Questions readers ask:
- *Which rows are in the baseline?*  `on_policy` (default, as released): the mean reward of the group's on-policy
  rows, for those rows and for prefix tokens; the continuation, alone with its prefix, keeps r_h. `group` (paper
  Eq. 3): the mean over all N rows, for every token. See `advantages`.
- *Why is the ratio r always 1?*  Before the first update of a step pi is the sampling policy, so r = exp(0) = 1
  and nothing is clipped. The gradient is not zero: w = A. From the second update of the step on, r moves.
- *What is the old log-prob of a prefix token, which the policy did not sample?*  The sampling policy's own
  log-prob of the forced token, from the same forward pass as all others; so r = 1 there too.
- *p or log p?*  The ratio is exp(log_probs - old_log_probs); LUFFY's shaping uses pi = exp(log_probs) itself.
- *Where are the KL and the entropy bonus?*  The paper has neither (A.2). The released code also has a dual clip
  at 3 and, in its yaml, an entropy bonus of 0.001; both are left out.
- *Why do the logged losses look strange?*  -sum w log pi / Z has the right gradient, but its value means little.

Tensors only: no model, no tokenizer, no config. Shapes: B rows, R response tokens.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Method:
    """One row of the table of methods: which rows a group has and what its tokens weigh."""

    rows: str = "on_policy"  # what guides a group: on_policy (nothing) | hybrid | demonstration | shared_prefix
    stages: tuple[str, ...] = ("rl",)  # "sft" updates on demonstrations, then "rl" steps on graded rollouts
    guided: str = "ppo"  # weight of demonstration tokens: ppo | zero | static | mean | shaped (token_weights)
    coefficient: float = 1.0  # the constant in static and mean
    policy: str = "ppo"  # weight of the policy's own tokens: ppo (clipped) | ratio (not clipped)
    select: str = "all"  # which tokens of the clip scope keep their weight: all | high | low | random entropy
    clip_scope: str = "prefix"  # the tokens the entropy clip ranks: prefix | response
    baseline: str | None = None  # fixed by the method, else the config's choice
    schedule: str = "cosine"  # of the prefix fraction (sample.prefix_fraction)
    relift: bool = False  # problems no rollout solved are collected for SFT updates


PREFIX_RFT = Method(rows="hybrid", select="high")  # [paper, section 3]

METHODS: dict[str, Method] = {
    "sft": Method(rows="demonstration", stages=("sft",), guided="mean"),
    "rft": Method(),  # Dr.GRPO, arXiv 2503.20783
    "sft-rft": Method(stages=("sft", "rl")),
    # ---- Prefix-RFT and its ablations [paper, Table 8 and Figure 6]
    "prefix-rft": PREFIX_RFT,
    "prefix-rft-frozen": Method(rows="hybrid", guided="zero"),
    "prefix-rft-all": Method(rows="hybrid"),
    "prefix-rft-static": Method(rows="hybrid", guided="static", coefficient=0.001),
    "prefix-rft-low": Method(rows="hybrid", select="low"),
    "prefix-rft-random": Method(rows="hybrid", select="random"),
    "prefix-rft-uniform": Method(rows="hybrid", select="high", schedule="uniform"),
    "prefix-rft-constant": Method(rows="hybrid", select="high", schedule="constant"),
    "rft-entropy-clip": Method(select="high", clip_scope="response"),
    # ---- the methods it is compared with
    "rft+sft": Method(rows="demonstration", guided="mean", baseline="on_policy"),  # lambda = 1 [LUFFY's script]
    "luffy": Method(rows="demonstration", guided="shaped", policy="ratio", baseline="group"),  # arXiv 2504.14945
    "uft": Method(
        rows="shared_prefix", guided="mean", coefficient=0.001, baseline="group", schedule="uft"
    ),  # 2505.16984
    "relift": Method(relift=True),  # arXiv 2506.07527
}


def _group_mean(values: Tensor, group: Tensor, members: Tensor) -> tuple[Tensor, Tensor]:
    """Mean of `values` over the `members` of each row's group, and their number, both [B]; mean 0 of none."""
    size = int(group.max()) + 1
    total = values.new_zeros(size).index_add(0, group[members], values[members])
    count = values.new_zeros(size).index_add(0, group[members], torch.ones_like(values[members]))
    return (total / count.clamp(min=1))[group], count[group]


def advantages(
    rewards: Tensor, group: Tensor, hybrid: Tensor, baseline: str = "on_policy", scale_by_std: bool = False
) -> tuple[Tensor, Tensor]:
    """Advantage of each row's own tokens and of its prefix tokens.

    rewards [B] float, group [B] int (which problem), hybrid [B] bool -> (response_advantage, prefix_advantage) [B].

    | baseline            | on-policy row         | prefix of a hybrid row  | its continuation |
    |---------------------|-----------------------|-------------------------|------------------|
    | on_policy [release] | r - mean(on-policy)   | r_h - mean(on-policy)   | r_h              |
    | group [paper Eq. 3] | r - mean(all N)       | r_h - mean(all N)       | r_h - mean(all N)|

    A continuation shares its prefix with no other row: a group of one, whose baseline is 0. A single on-policy row
    gets r - r = 0 (the release: r). prefix_advantage means something for hybrid rows only.
    scale_by_std divides what has a baseline by the standard deviation of the baseline's rows + 1e-6 (GRPO;
    Dr.GRPO and the paper do not; 1 where there are fewer than two rows).
    """
    if baseline not in ("on_policy", "group"):
        raise ValueError(f"baseline is {baseline!r}, expected 'on_policy' or 'group'")
    members = ~hybrid if baseline == "on_policy" else torch.ones_like(hybrid)
    mean, count = _group_mean(rewards, group, members)
    centred = rewards - mean
    if scale_by_std:
        mean_square, _ = _group_mean(centred.square(), group, members)
        std = (mean_square * count / (count - 1).clamp(min=1)).sqrt()
        centred = centred / torch.where(count > 1, std + 1e-6, 1.0)
    response = torch.where(hybrid, rewards, centred) if baseline == "on_policy" else centred
    return response, centred


def entropy_clip(
    prefix_mask: Tensor,
    entropy: Tensor,
    keep: float = 0.2,
    select: str = "high",
    generator: torch.Generator | None = None,
) -> Tensor:
    """The tokens of a mini-batch that keep their weight: the share `keep` with the highest entropy. [paper, 3.3]

    prefix_mask [B, R] bool, entropy [B, R] of the sampling policy -> bool [B, R], True at kept tokens of the mask.
    Of n tokens n - floor((1 - keep) n) are kept, ties by index. select: "high" | "low" | "random" (ablations;
    random draws from `generator`).

    Give it a whole mini-batch, over all micro-batches and ranks, and the entropy taken with the old log-probs:
    then the kept set cannot depend on how the batch is cut. (The release ranks the updating policy's entropy in
    each micro-batch: its kept set changes with the layout.)
    """
    flat = prefix_mask.flatten()
    index = flat.nonzero().squeeze(1)
    dropped = math.floor((1 - keep) * len(index) + 1e-9)  # 1e-9: (1 - 0.9) * 10 is 0.99… in floats
    if select == "random":
        order = torch.randperm(len(index), generator=generator).to(index.device)
    elif select in ("high", "low"):
        order = entropy.flatten()[index].sort(descending=select == "high", stable=True).indices
    else:
        raise ValueError(f"select is {select!r}, expected 'high', 'low' or 'random'")
    kept = torch.zeros_like(flat)
    kept[index[order[: len(index) - dropped]]] = True
    return kept.view_as(prefix_mask)


def kept_tokens(
    method: Method,
    response_mask: Tensor,
    prefix_mask: Tensor,
    entropy: Tensor,
    keep: float,
    generator: torch.Generator | None = None,
) -> Tensor:
    """bool [B, R]: tokens that keep their weight: not a frozen prefix, not what the method's entropy clip drops.

    All shapes [B, R], a mini-batch.
    """
    if method.guided == "zero":
        return response_mask & ~prefix_mask
    if method.select == "all":
        return response_mask
    scope = prefix_mask if method.clip_scope == "prefix" else response_mask
    return response_mask & (~scope | entropy_clip(scope, entropy, keep, method.select, generator))


@torch.no_grad()
def ppo_weight(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, clip_low: float, clip_high: float
) -> Tensor:
    """w = I_clip(r, A) * A * r, the gradient weight of the PPO surrogate min(r A, clip(r, 1-low, 1+high) A).

    log_probs, old_log_probs [B, R]; advantages [B, R] or [B, 1] -> [B, R].
    I_clip = [A > 0 and r <= 1 + high] or [A < 0 and r >= 1 - low]: where the minimum picks the clipped branch the
    surrogate is flat. `where`, not a product: 0 * inf is NaN.
    """
    ratio = (log_probs - old_log_probs).exp()
    inside = torch.where(advantages > 0, ratio <= 1 + clip_high, ratio >= 1 - clip_low)
    return torch.where(inside & (advantages != 0), advantages * ratio, 0.0)


@torch.no_grad()
def token_weights(
    method: Method,
    log_probs: Tensor,
    old_log_probs: Tensor,
    response_advantage: Tensor,
    prefix_advantage: Tensor,
    prefix_mask: Tensor,
    kept: Tensor,
    clip_low: float,
    clip_high: float,
    mean_scale: float,
    gamma: float = 0.1,
) -> Tensor:
    """The weight w of every token: the one place where methods differ. -> [B, R]

    log_probs, old_log_probs [B, R]; response_advantage, prefix_advantage [B]; prefix_mask, kept [B, R] bool.
    mean_scale = Z / (demonstration tokens of the mini-batch) turns the sum over Z into a mean over those tokens.

    tokens of the policy     ppo     I_clip A r
                             ratio   A r, no clip                             [LUFFY: on-policy rows]
    demonstration tokens     ppo     I_clip A r                               [paper Eq. 2]
                             zero    0                                        [frozen prefix]
                             static  coefficient                              [Table 8]
                             mean    coefficient * Z / tokens                 [SFT, RFT + SFT loss, UFT]
                             shaped  A gamma pi / (pi + gamma)^2 = A f'(pi) pi, f(p) = p / (p + gamma)   [LUFFY Eq. 7]
    tokens outside `kept`            0
    """
    own, forced = response_advantage[:, None], prefix_advantage[:, None]
    if method.policy == "ppo":
        policy = ppo_weight(log_probs, old_log_probs, own, clip_low, clip_high)
    else:
        policy = torch.where(own != 0, own * (log_probs - old_log_probs).exp(), 0.0)

    if method.guided == "ppo":
        guided = ppo_weight(log_probs, old_log_probs, forced, clip_low, clip_high)
    elif method.guided == "shaped":
        prob = log_probs.exp()
        guided = forced * gamma * prob / (prob + gamma).square()
    else:
        constant = {"zero": 0.0, "static": method.coefficient, "mean": method.coefficient * mean_scale}
        guided = torch.full_like(log_probs, constant[method.guided])
    return torch.where(kept, torch.where(prefix_mask, guided, policy), 0.0)


def weighted_loss(log_probs: Tensor, weights: Tensor, mask: Tensor, normalizer: float) -> Tensor:
    """-sum(w log pi) / Z over the tokens of `mask`, a scalar; log_probs, weights, mask [B, R].

    Z = rows of the mini-batch x max_response_tokens, a constant over micro-batches and ranks, so that their losses
    add up to the mini-batch's. [Dr.GRPO: no division by response length]
    """
    return -torch.where(mask, weights * log_probs, 0.0).sum() / normalizer
