"""This file has the objective of Prefix-RFT: advantages, entropy clip, PPO's weight for each token, and one loss.

A group is the N = 8 rollouts of one problem. In Prefix-RFT (paper, section 3) a group looks like this:

    prompt | on-policy response ........... <eos>    r_1
    prompt | on-policy response ..... <eos>          r_2
      ...                                            ...    N - 1 on-policy rows
    prompt | on-policy response ....... <eos>        r_7
    prompt | PREFIX PREFIX | continuation ... <eos>  r_h    1 hybrid row
             ^ demonstration  ^ the policy goes on from there
             prefix_mask = 1
             response_mask = 1 over prefix, continuation and <eos>

**Every method is a weight per token.** The gradient of the loss is grad L = -(1/Z) sum_{i,t} w_{i,t} grad log
pi(y_{i,t}). No gradient flows through the weights w. The constant Z is the number of rows planned for the mini-batch
times max_response_tokens. In a batch that holds only demonstrations, Z is the number of demonstration tokens.

The order of this file: `mean_of_members` and `advantages`; `entropy_clip` and `weighted_tokens`; PPO's textbook
surrogate and its weight; `Tokens` (all that a weight may depend on), `token_weights` and `weighted_loss`. The other
methods' weights and the table of methods are in methods.py.

Questions that readers ask:
- *Which rows are in the baseline?* By default (`on_policy`, as in the released code) the baseline is the mean reward
  of the group's on-policy rows. For the tokens of on-policy rows and of prefixes the baseline is subtracted from the
  row's reward. The continuation has no baseline and keeps the reward r_h. With baseline `group` (the text of the
  paper's section 3) the mean reward of all N rows is subtracted for all tokens of all rows. See `advantages`.
- *Why is the ratio r = 1 in the first update of a step?* Before this update pi is still the sampling policy, so r =
  exp(0) = 1 and PPO clips nothing. The gradient is not zero at r = 1, because the weight is w = A. From the second
  update of each step on, r differs from 1. Usual learning rates are so small that PPO's clip still acts on few tokens
  (metric clip_fraction).
- *What is the old log-prob of a prefix token, which the policy did not sample?* It is the log-prob that the sampling
  policy gives to the forced token. All old log-probs are computed before the policy changes, so a prefix token also
  starts with r = 1.
- *Do the formulas use p or log p?* PPO's ratio is exp(log_probs - old_log_probs). LUFFY's shaping uses the
  probability p = exp(log_probs) itself.
- *Where are the KL and the entropy bonus?* The paper uses neither a KL term nor an entropy bonus (A.2). The paper's
  released code has a dual clip at 3 and, in its yaml file, an entropy bonus of 0.001. This project leaves out the
  dual clip and the entropy bonus in every method.
- *Why do the logged losses look strange?* The loss -sum w log pi / Z is built to have the right gradient; its value
  means little.

The functions of this file take tensors only, and no model, tokenizer or config. In the shapes of tensors B is the
number of rows and R the number of response tokens.
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

    If the values of a row's members are equal, their mean is that value to the bit. A rounded mean of equal rewards
    would leave an advantage of about 1e-8 instead of 0, and dividing this advantage by the rewards' deviation would
    make the advantage large.
    """
    low = values.where(members, math.inf).amin(1)
    high = values.where(members, -math.inf).amax(1)
    mean = values.where(members, 0.0).sum(1) / members.sum(1).clamp(min=1)
    return torch.where(low == high, low, mean), low >= high


def advantages(
    rewards: Tensor, group: Tensor, hybrid: Tensor, baseline: str = "on_policy", scale_by_std: bool = False
) -> tuple[Tensor, Tensor]:
    """Returns two advantages for each row: one for the tokens that the policy wrote, and one for the prefix tokens.

    rewards [B] float, group [B] int (which problem), hybrid [B] bool -> (response_advantage, prefix_advantage) [B].

    | baseline                      | on-policy row       | prefix of a hybrid row | its continuation  |
    |-------------------------------|---------------------|------------------------|-------------------|
    | on_policy [release]           | r - mean(on-policy) | r_h - mean(on-policy)  | r_h               |
    | group [paper, section 3 text] | r - mean(all N)     | r_h - mean(all N)      | r_h - mean(all N) |

    A prefix starts where the on-policy rows start, at the prompt, so its reward is compared with the on-policy rows'
    rewards. A continuation starts at the end of its own prefix, where no on-policy row starts, so its reward r_h is
    compared with nothing. A second hybrid row of a group (hybrid_per_prompt 2) is not in the baseline either, even if
    both hybrid rows have the same prefix. The advantage of a single on-policy row in a group is r - r = 0 (in the
    paper's released code: r). For rows without a prefix, prefix_advantage is not used. `scale_by_std` divides centred
    advantages by the unbiased standard deviation of the baseline's rewards + 1e-6, unless these rewards are equal.
    The advantage r_h of a continuation is not divided. (GRPO divides by the standard deviation; Dr.GRPO and the paper
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
    """Returns which prefix tokens of a mini-batch keep their weight: the share `keep` with the highest entropy.
    [paper, 3.3]

    prefix_mask [B, R] bool, entropy [B, R] of the sampling policy -> bool [B, R], True at the kept tokens of
    prefix_mask. Of n tokens, n - floor((1 - keep) n) are kept: two of ten if keep is 0.2. Of tokens with equal
    entropy, earlier ones are kept first. `select` is "high" for the highest entropy. The paper's ablations use "low"
    for the lowest entropy, and "random" for tokens drawn from `generator`.

    entropy_clip takes the tokens of a whole mini-batch, over all micro-batches and ranks, with the entropies of the
    sampling policy. So the kept tokens cannot depend on how the mini-batch is cut into micro-batches. (The paper's
    released code ranks the updating policy's entropy in each micro-batch, so the kept tokens change with the
    micro-batches. In the released code the ablation "bottom 20%" also gives weight 0 to every token that the policy
    wrote. In the released code the ablation "random" drops only n/100 of n prefix tokens, and none if the ablation's
    ratio is 0.8. This function follows the paper's text.)
    """
    flat = prefix_mask.flatten()
    index = flat.nonzero().squeeze(1)
    # without 1e-9, (1 - 0.9) * 10 = 0.99… would be rounded down to 0
    dropped = math.floor((1 - keep) * len(index) + 1e-9)
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
    """Returns the mask of the response tokens that keep a weight: all but those that the method's entropy clip drops.
    All tensors are [B, R], for the B rows of a whole mini-batch.

    The entropy clip ranks the prefix tokens; in a method without prefixes the clip ranks every response token.
    """
    if not method.entropy_clip:
        return response_mask
    ranked = response_mask if method.rows == "on_policy" else prefix_mask
    return response_mask & (~ranked | entropy_clip(ranked, entropy, keep, method.entropy_clip, generator))


# ---- PPO


def ppo_surrogate(ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float) -> Tensor:
    """Returns min(r A, clip(r, 1 - low, 1 + high) A), the surrogate as the textbook and the paper's Eq. 2 write it;
    [B, R].

    No training uses this function: `ppo_weight` is its derivative with respect to log pi, and the tests compare the
    two functions.
    """
    return torch.minimum(ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages)


def ppo_weight(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, clip_low: float, clip_high: float
) -> Tensor:
    """Returns w = I_clip(r, A) * A * r, so that w grad log pi is the gradient of `ppo_surrogate`.

    log_probs, old_log_probs [B, R]; advantages [B, R] or [B, 1] -> [B, R], detached.
    I_clip = [A > 0 and r <= 1 + high] or [A < 0 and r >= 1 - low]. Where I_clip is 0, the minimum in `ppo_surrogate`
    picks its clipped branch, which is constant, so the gradient is 0. The code uses torch.where and no product with
    I_clip, because 0 * inf is NaN.
    """
    ratio = (log_probs.detach() - old_log_probs).exp()
    inside = torch.where(advantages > 0, ratio <= 1 + clip_high, ratio >= 1 - clip_low)
    return torch.where(inside & (advantages != 0), advantages * ratio, 0.0)


# ---- the weight of every token, and the loss


@dataclass(frozen=True)
class Tokens:
    """The inputs of the weight functions: tensors of some rows of a mini-batch, and numbers of the whole mini-batch.
    No gradient flows through the tensors of Tokens. step.mini_batch_tokens fills the fields of Tokens for all rows of
    a batch, with the sampling policy's log_probs and entropy. `Tokens.at` then takes the rows of a micro-batch.
    """

    log_probs: Tensor  # [B, R] log-probs of the tokens under the present policy
    old_log_probs: Tensor  # [B, R] log-probs of the tokens under the sampling policy
    entropy: Tensor  # [B, R] entropy of the present policy at each token, in nats
    response_mask: Tensor  # [B, R] bool: True at response tokens
    prefix_mask: Tensor  # [B, R] bool: True at tokens of the demonstration
    weight_mask: Tensor  # [B, R] bool: True at tokens that keep a weight (`weighted_tokens`)
    advantages: Tensor  # [B, R] the advantage A of each token
    rewards: Tensor  # [B]
    clip_low: float
    clip_high: float
    coefficient: float  # the constant c in a method's formula: the method's own c, or the setting --coefficient
    policy_tokens: int  # T_own, the number of the policy's own response tokens in the mini-batch
    demonstration_tokens: int  # T_d, the number of demonstration tokens in the mini-batch
    normalizer: float  # Z
    max_response_tokens: int  # L
    # for SDFT: [B, R] log-probs with a demonstration in the prompt; NaN if the problem has none
    hinted_log_probs: Tensor | None = None

    def at(self, rows: Tensor, log_probs: Tensor, entropy: Tensor) -> "Tokens":
        """Returns the Tokens of `rows` with their present log_probs and entropy [b, R], on the device of
        log_probs."""
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        changed = {name: value[rows].to(log_probs.device) for name, value in tensors.items()}
        return dataclasses.replace(self, **changed | {"log_probs": log_probs.detach(), "entropy": entropy})


def clipped(t: Tokens) -> Tensor:
    """I·A·r

    This is the weight of PPO's clipped surrogate, for tokens that the policy wrote and for Prefix-RFT's prefix
    tokens. [paper Eq. 2; Dr.GRPO]
    """
    return ppo_weight(t.log_probs, t.old_log_probs, t.advantages, t.clip_low, t.clip_high)


@torch.no_grad()
def token_weights(method: Any, tokens: Tokens) -> Tensor:
    """Returns the weight w of every token [B, R]; w is 0 outside `weight_mask`. Only this function calls the two
    weight functions of a method.

    `method` is an entry of methods.METHODS. For Prefix-RFT both weight functions, of prefix tokens and of the
    policy's own tokens, are `clipped`.
    """
    weights = torch.where(tokens.prefix_mask, method.demonstration_weight(tokens), method.policy_weight(tokens))
    return torch.where(tokens.weight_mask, weights, 0.0)


def weighted_loss(log_probs: Tensor, weights: Tensor, mask: Tensor, normalizer: float) -> Tensor:
    """Returns -sum(w log pi) / Z over the tokens of `mask`, a scalar. log_probs, weights and mask are [B, R].

    The normalizer Z is the same constant in all micro-batches and on all ranks, so that the losses of micro-batches
    and ranks add up to the loss of the mini-batch. [Like Dr.GRPO, this loss does not divide by response lengths.]
    """
    return -torch.where(mask, weights * log_probs, 0.0).sum() / normalizer
