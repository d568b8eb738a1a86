"""This file has the objective of Prefix-RFT: advantages, entropy clip, PPO's weight for each token, and one loss.

A group is the N = 8 rollouts of one problem. In Prefix-RFT (paper, section 3) it looks like this:

    prompt | on-policy response ........... <eos>    r_1
    prompt | on-policy response ..... <eos>          r_2
      ...                                            ...    N - 1 on-policy rows
    prompt | on-policy response ....... <eos>        r_7
    prompt | PREFIX PREFIX | continuation ... <eos>  r_h    1 hybrid row
             ^ demonstration  ^ the policy goes on from there
             prefix_mask = 1
             response_mask = 1 over prefix, continuation and <eos>

**Every method is a weight per token.** grad L = -(1/Z) sum_{i,t} w_{i,t} grad log pi(y_{i,t}), where w is detached. Z
is the number of planned rows of the mini-batch x max_response_tokens. In a batch of demonstrations only, Z is the
number of its tokens.

The functions stand in this order: `mean_of_members`, `advantages`; `entropy_clip`, `weighted_tokens`; the textbook
surrogate and its weight; `Tokens` (what a weight may depend on), `token_weights`, `weighted_loss`. The other methods'
weights and the table of methods are in methods.py.

Questions readers ask:
- *Which rows are in the baseline?* By default it is `on_policy`, as in the released code. The mean reward of the
  group's on-policy rows is the baseline of these rows and of prefix tokens. The continuation has none and keeps r_h.
  With `group` (the text of the paper's section 3) the mean over all N rows is the baseline of every token. See
  `advantages`.
- *Why is r = 1 in the first update of a step?* Before this update pi is still the sampling policy, so r = exp(0) = 1
  and nothing is clipped. The gradient is not zero: w = A. From the second update of the step on, r moves. The
  learning rates of this field are so small that PPO's clip still acts on few tokens (metric clip_fraction).
- *What is the old log-prob of a prefix token, which the policy did not sample?* It is the sampling policy's own
  log-prob of the forced token. Like that of every other token it is taken before anything is updated, so r = 1 there
  too.
- *Is it p or log p?* The ratio is exp(log_probs - old_log_probs). LUFFY's shaping uses p = exp(log_probs) itself.
- *Where are the KL and the entropy bonus?* The paper has neither (A.2). The released code also has a dual clip at 3
  and, in its yaml, an entropy bonus of 0.001. Both are left out, here and in every other method.
- *Why do the logged losses look strange?* -sum w log pi / Z has the right gradient, but its value means little.

The functions take tensors only; they know no model, no tokenizer and no config. In the shapes B is the number of rows
and R the number of response tokens.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# ---- advantages


def mean_of_members(values: Tensor, members: Tensor) -> tuple[Tensor, Tensor]:
    """Returns, for each row i, the mean of `values` [B] over the rows j where members[i, j] is True, and whether
    these values are all equal.

    If they are equal, the mean is that value to the bit. A rounded mean would leave 1e-8 as an advantage where there
    is none, and a division by the deviation would make it large.
    """
    low = values.where(members, math.inf).amin(1)
    high = values.where(members, -math.inf).amax(1)
    mean = values.where(members, 0.0).sum(1) / members.sum(1).clamp(min=1)
    return torch.where(low == high, low, mean), low >= high


def advantages(
    rewards: Tensor, group: Tensor, hybrid: Tensor, baseline: str = "on_policy", scale_by_std: bool = False
) -> tuple[Tensor, Tensor]:
    """Returns the advantage of each row's own tokens, and that of its prefix tokens.

    rewards [B] float, group [B] int (which problem), hybrid [B] bool -> (response_advantage, prefix_advantage) [B].

    | baseline                      | on-policy row       | prefix of a hybrid row | its continuation  |
    |-------------------------------|---------------------|------------------------|-------------------|
    | on_policy [release]           | r - mean(on-policy) | r_h - mean(on-policy)  | r_h               |
    | group [paper, section 3 text] | r - mean(all N)     | r_h - mean(all N)      | r_h - mean(all N) |

    A prefix starts where the on-policy rows start, at the prompt, so it is compared with them. A continuation starts
    at the end of its own prefix, where no on-policy row starts, so it is compared with nothing and keeps r_h. A
    second hybrid row (hybrid_per_prompt 2) is not in the baseline either, even if its prefix is the same. A single
    on-policy row gets r - r = 0 (in the release: r). prefix_advantage means something for hybrid rows only.
    scale_by_std divides the centred advantages by the unbiased standard deviation of the baseline's rewards + 1e-6,
    unless these rewards are equal. A continuation that keeps r_h is not divided. (GRPO divides; Dr.GRPO and the paper
    do not.)
    """
    if baseline not in ("on_policy", "group"):
        raise ValueError(f"baseline is {baseline!r}, expected 'on_policy' or 'group'")
    members = ~hybrid if baseline == "on_policy" else torch.ones_like(hybrid)
    baseline_rows = (group[:, None] == group) & members  # [B, B]; True where row j is in the baseline of row i
    mean, equal = mean_of_members(rewards, baseline_rows)
    centred = rewards - mean
    if scale_by_std:
        squares = (rewards - mean[:, None]).square().where(baseline_rows, 0.0)
        std = (squares.sum(1) / (baseline_rows.sum(1) - 1).clamp(min=1)).sqrt()
        centred = centred / torch.where(equal, 1.0, std + 1e-6)
    response = torch.where(hybrid, rewards, centred) if baseline == "on_policy" else centred
    return response, centred


# ---- which tokens keep their weight


def entropy_clip(
    prefix_mask: Tensor,
    entropy: Tensor,
    keep: float = 0.2,
    select: str = "high",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Returns which tokens of a mini-batch keep their weight: the share `keep` with the highest entropy. [paper, 3.3]

    prefix_mask [B, R] bool, entropy [B, R] of the sampling policy -> bool [B, R], True at kept tokens of the mask. Of
    n tokens, n - floor((1 - keep) n) are kept; of equal entropies the first is taken. Of ten tokens and keep = 0.2
    the two highest are kept. `select` is "high", or "low" or "random" for the ablations; "random" draws from
    `generator`.

    Give it a whole mini-batch, over all micro-batches and ranks, and the entropy that was taken with the old
    log-probs. Then the kept set cannot depend on how the batch is cut. (The release ranks the updating policy's
    entropy in each micro-batch, so its kept set changes with the layout. Its "bottom 20%" also sets the weight of
    every own token of the micro-batch to 0. Its "random" masks n/100 of n tokens, and none at a ratio of 0.8. Ours
    follow the paper's text.)
    """
    flat = prefix_mask.flatten()
    index = flat.nonzero().squeeze(1)
    dropped = math.floor((1 - keep) * len(index) + 1e-9)  # 1e-9 is added because (1 - 0.9) * 10 is 0.99… in floats
    if select == "random":
        order = torch.randperm(len(index), generator=generator).to(index.device)
    elif select in ("high", "low"):
        order = entropy.flatten()[index].sort(descending=select == "high", stable=True).indices
    else:
        raise ValueError(f"select is {select!r}, expected 'high', 'low' or 'random'")
    keep_mask = torch.zeros_like(flat)
    keep_mask[index[order[: len(index) - dropped]]] = True
    return keep_mask.view_as(prefix_mask)


def weighted_tokens(
    method: Any,
    response_mask: Tensor,
    prefix_mask: Tensor,
    entropy: Tensor,
    keep: float,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Returns the response's tokens without those that the method's entropy clip drops. All tensors are [B, R], for a
    whole mini-batch.

    The clip ranks the prefix tokens; in a method without prefixes it ranks every token.
    """
    if not method.entropy_clip:
        return response_mask
    ranked = response_mask if method.rows == "on_policy" else prefix_mask
    return response_mask & (~ranked | entropy_clip(ranked, entropy, keep, method.entropy_clip, generator))


# ---- PPO


def ppo_surrogate(ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float) -> Tensor:
    """Returns min(r A, clip(r, 1 - low, 1 + high) A), the surrogate as the textbook and the paper's Eq. 2 write it;
    [B, R].

    Nothing is trained with it: `ppo_weight` is its derivative with respect to log pi, and the tests compare the two.
    """
    return torch.minimum(ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages)


def ppo_weight(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, clip_low: float, clip_high: float
) -> Tensor:
    """Returns w = I_clip(r, A) * A * r, so that w grad log pi is the gradient of `ppo_surrogate`.

    log_probs, old_log_probs [B, R]; advantages [B, R] or [B, 1] -> [B, R], detached.
    I_clip = [A > 0 and r <= 1 + high] or [A < 0 and r >= 1 - low]. Elsewhere the minimum picks the clipped branch,
    which is flat, so the gradient is 0. The code uses `where` and no product, because 0 * inf is NaN.
    """
    ratio = (log_probs.detach() - old_log_probs).exp()
    inside = torch.where(advantages > 0, ratio <= 1 + clip_high, ratio >= 1 - clip_low)
    return torch.where(inside & (advantages != 0), advantages * ratio, 0.0)


# ---- the weight of every token, and the loss


@dataclass(frozen=True)
class Tokens:
    """The tokens of some rows, and the numbers of their whole mini-batch. No gradient flows through these tensors.

    Before an update the log-probs are the sampling policy's, and the rows are those of the whole batch.
    """

    log_probs: Tensor  # [B, R] of the present policy
    old_log_probs: Tensor  # [B, R] of the sampling policy
    entropy: Tensor  # [B, R] of the present policy, nats
    response_mask: Tensor  # [B, R] bool
    prefix_mask: Tensor  # [B, R] bool: tokens of the demonstration
    weight_mask: Tensor  # [B, R] bool: `weighted_tokens`
    advantages: Tensor  # [B, R] A of each token
    rewards: Tensor  # [B]
    clip_low: float
    clip_high: float
    coefficient: float  # c: the method's constant, or --coefficient
    policy_tokens: int  # T_own: the policy's own response tokens in the mini-batch
    demonstration_tokens: int  # T_d: its demonstration tokens
    normalizer: float  # Z
    max_response_tokens: int  # L
    # [B, R] with a demonstration in the prompt, NaN for problems without one [SDFT]
    hinted_log_probs: Tensor | None = None

    def at(self, rows: Tensor, log_probs: Tensor, entropy: Tensor) -> "Tokens":
        """Returns the tokens of `rows`, on the device of their log_probs and entropy [b, R]."""
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        changed = {name: value[rows].to(log_probs.device) for name, value in tensors.items()}
        return dataclasses.replace(self, **changed | {"log_probs": log_probs.detach(), "entropy": entropy})


def clipped(t: Tokens) -> Tensor:
    """I·A·r

    This is PPO's surrogate, for the policy's own tokens and for Prefix-RFT's prefix tokens. [paper Eq. 2; Dr.GRPO]
    """
    return ppo_weight(t.log_probs, t.old_log_probs, t.advantages, t.clip_low, t.clip_high)


@torch.no_grad()
def token_weights(method: Any, tokens: Tokens) -> Tensor:
    """Returns the weight w of every token [B, R]; it is 0 outside `weight_mask`. Methods differ in this place only.

    `method` is an entry of methods.METHODS. For Prefix-RFT both of its weights are `clipped`.
    """
    weights = torch.where(tokens.prefix_mask, method.demonstration_weight(tokens), method.policy_weight(tokens))
    return torch.where(tokens.weight_mask, weights, 0.0)


def weighted_loss(log_probs: Tensor, weights: Tensor, mask: Tensor, normalizer: float) -> Tensor:
    """Returns -sum(w log pi) / Z over the tokens of `mask`, a scalar. log_probs, weights and mask are [B, R].

    Z is the same constant in all micro-batches and on all ranks, so that their losses add up to the mini-batch's.
    [Dr.GRPO does not divide by response lengths either.]
    """
    return -torch.where(mask, weights * log_probs, 0.0).sum() / normalizer
