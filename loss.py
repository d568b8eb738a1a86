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

**Every method is a weight per token.**  grad L = -(1/Z) sum_{i,t} w_{i,t} grad log pi(y_{i,t}), w detached, where
Z = rows of the mini-batch x max_response_tokens (in a batch of demonstrations only: its tokens).

In reading order: `advantages`, `entropy_clip`, `Tokens` (what a weight may depend on), a weight function for each
formula, METHODS, `token_weights`, `weighted_loss`. A new method is one entry of METHODS and, where no function here
has its formula, one function.

Questions readers ask:
- *Which rows are in the baseline?*  `on_policy` (default, as released): the mean reward of the group's on-policy
  rows, for those rows and for prefix tokens; the continuation, alone with its prefix, keeps r_h. `group` (paper
  Eq. 3): the mean over all N rows, for every token. See `advantages`.
- *Why is the ratio r always 1?*  Before the first update of a step pi is the sampling policy, so r = exp(0) = 1
  and nothing is clipped. The gradient is not zero: w = A. From the second update of the step on, r moves; at the
  small learning rates of this field PPO's clip still acts on few tokens (metric clip_fraction).
- *What is the old log-prob of a prefix token, which the policy did not sample?*  The sampling policy's own
  log-prob of the forced token, from the same forward pass as all others; so r = 1 there too.
- *p or log p?*  The ratio is exp(log_probs - old_log_probs); LUFFY's shaping uses p = exp(log_probs) itself.
- *Where are the KL and the entropy bonus?*  The paper has neither (A.2). The released code also has a dual clip
  at 3 and, in its yaml, an entropy bonus of 0.001; both are left out, here and in every other method.
- *Why do the logged losses look strange?*  -sum w log pi / Z has the right gradient, but its value means little.

Tensors only: no model, no tokenizer, no config. Shapes: B rows, R response tokens.
Looked at and left out: RL-PLUS (LUFFY's rows, another shaping), AMPO, Scaf-GRPO, Guide (hints in the prompt, several
teachers), QuestA (`rescue` with a constant share), on-policy distillation (needs a teacher model).
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# ---- advantages


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
    scale_by_std divides what has a baseline by the unbiased standard deviation of the baseline's rows + 1e-6 (GRPO;
    Dr.GRPO and the paper do not). Rewards are compared before any mean is taken: where the baseline's rows all have
    the same reward, that is their mean to the bit, and nothing is divided by a deviation that is only rounding.
    """
    if baseline not in ("on_policy", "group"):
        raise ValueError(f"baseline is {baseline!r}, expected 'on_policy' or 'group'")
    members = ~hybrid if baseline == "on_policy" else torch.ones_like(hybrid)
    baseline_rows = (group[:, None] == group) & members  # [B, B] True where column j is in the baseline of row i
    count = baseline_rows.sum(1)
    low, high = rewards.where(baseline_rows, math.inf).amin(1), rewards.where(baseline_rows, -math.inf).amax(1)
    mean = torch.where(low == high, low, rewards.where(baseline_rows, 0.0).sum(1) / count.clamp(min=1))
    centred = rewards - mean
    if scale_by_std:
        squares = (rewards - mean[:, None]).square().where(baseline_rows, 0.0)
        std = (squares.sum(1) / (count - 1).clamp(min=1)).sqrt()
        centred = centred / torch.where(low < high, std + 1e-6, 1.0)
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


def weight_mask(
    method: "Method",
    response_mask: Tensor,
    prefix_mask: Tensor,
    entropy: Tensor,
    keep: float,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The response's tokens without those that the method's entropy clip drops; all [B, R], a mini-batch.

    The clip ranks the prefix tokens; in a method without prefixes, every token.
    """
    if not method.entropy_clip:
        return response_mask
    ranked = response_mask if method.rows == "on_policy" else prefix_mask
    return response_mask & (~ranked | entropy_clip(ranked, entropy, keep, method.entropy_clip, generator))


# ---- what a weight may depend on


@dataclass(frozen=True)
class Tokens:
    """The tokens of some rows of a mini-batch, and the numbers of the whole mini-batch. No gradient flows here."""

    log_probs: Tensor  # [B, R] of the policy as it is now
    old_log_probs: Tensor  # [B, R] of the sampling policy
    entropy: Tensor  # [B, R] of the policy as it is now, nats
    response_mask: Tensor  # [B, R] bool
    prefix_mask: Tensor  # [B, R] bool: tokens of the demonstration
    weight_mask: Tensor  # [B, R] bool: the function of this name
    rewards: Tensor  # [B]
    response_advantage: Tensor  # [B] A of own tokens
    prefix_advantage: Tensor  # [B] A of prefix tokens
    clip_low: float
    clip_high: float
    coefficient: float  # c: the method's constant, or --coefficient
    policy_tokens: int  # T_own: the policy's own response tokens in the mini-batch
    demonstration_tokens: int  # T_d: its demonstration tokens
    normalizer: float  # Z
    max_response_tokens: int  # L

    @property
    def advantages(self) -> Tensor:
        """[B, R] A of each token"""
        return torch.where(self.prefix_mask, self.prefix_advantage[:, None], self.response_advantage[:, None])

    @property
    def row_entropy(self) -> Tensor:
        """[B, 1] H, the mean entropy of a row's response tokens"""
        total = torch.where(self.response_mask, self.entropy, 0.0).sum(1, keepdim=True)
        return total / self.response_mask.sum(1, keepdim=True).clamp(min=1)

    def at(self, rows: Tensor, log_probs: Tensor, entropy: Tensor) -> "Tokens":
        """The same of `rows`, on the device of their log_probs and entropy [b, r], cut to those r columns."""
        width, device = log_probs.shape[1], log_probs.device
        changed: dict[str, Tensor] = {"log_probs": log_probs.detach(), "entropy": entropy}
        for name in ("old_log_probs", "response_mask", "prefix_mask", "weight_mask"):
            changed[name] = getattr(self, name)[rows, :width].to(device)
        for name in ("rewards", "response_advantage", "prefix_advantage"):
            changed[name] = getattr(self, name)[rows].to(device)
        return dataclasses.replace(self, **changed)


# ---- the weights: p = pi(y), r = p / pi_old(y), A = advantage. The first line of a docstring is the formula.
#
# A coefficient means something only with the denominators of the two terms it mixes. Here all tokens are summed and
# divided by Z. T_own / T_d turns two token means of a source into that; Z / T_d is a token mean beside a sum over Z.


def ppo_weight(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, clip_low: float, clip_high: float
) -> Tensor:
    """w = I_clip(r, A) * A * r, the gradient weight of the PPO surrogate min(r A, clip(r, 1-low, 1+high) A).

    log_probs, old_log_probs [B, R]; advantages [B, R] or [B, 1] -> [B, R], detached.
    I_clip = [A > 0 and r <= 1 + high] or [A < 0 and r >= 1 - low]: where the minimum picks the clipped branch the
    surrogate is flat. `where`, not a product: 0 * inf is NaN.
    """
    ratio = (log_probs.detach() - old_log_probs).exp()
    inside = torch.where(advantages > 0, ratio <= 1 + clip_high, ratio >= 1 - clip_low)
    return torch.where(inside & (advantages != 0), advantages * ratio, 0.0)


def clipped(t: Tokens) -> Tensor:
    """I·A·r

    PPO's surrogate. [paper Eq. 2; Dr.GRPO]
    """
    return ppo_weight(t.log_probs, t.old_log_probs, t.advantages, t.clip_low, t.clip_high)


def unclipped(t: Tokens) -> Tensor:
    """A·r

    The policy gradient without PPO's clip, as LUFFY's, ReLIFT's, HPT's and TRAPO's scripts take it. Their sums are
    not divided by the rows of a mini-batch: 64 times our gradient, so their gradient clip at 1.0 (ReLIFT 0.7) nearly
    always acts, ours rarely; AdamW does not see the factor.
    """
    return torch.where(t.advantages != 0, t.advantages * (t.log_probs - t.old_log_probs).exp(), 0.0)


def zero(t: Tokens) -> Tensor:
    """0"""
    return torch.zeros_like(t.log_probs)


def constant(t: Tokens) -> Tensor:
    """c

    One weight for every demonstration token. [paper Table 8]
    """
    return torch.full_like(t.log_probs, t.coefficient)


def token_mean(t: Tokens) -> Tensor:
    """c·Z/T_d

    c times the mean of -log p over the demonstration's tokens, beside a sum over Z. In a batch of demonstrations
    alone Z = T_d and w = c = 1: SFT.
    RFT + SFT loss [LUFFY, train_rl_sft_loss.sh]: RL is a sum over tokens / L per micro-batch, not divided by rows;
    SFT a token mean per micro-batch, coefficient 1; so c = K/B over our denominators, where K of the step's
    micro-batches hold a demonstration and B = 512 rows: at most 0.125, about 0.07 at 8 GPUs x 32768 tokens. Ours 0.1;
    where few groups have a demonstration, as in the embedded task, K and so c would be smaller: tune it.
    """
    return torch.full_like(t.log_probs, t.coefficient * t.normalizer / max(1, t.demonstration_tokens))


def matched_means(t: Tokens) -> Tensor:
    """c·T_own/T_d

    Where the source takes a token mean of each term, c times the demonstration's. [UFT; CHORD's mu]
    UFT here and there: the same weight; left out are its KL and entropy terms (0.001 each) and its cuts at sentences;
    here the prefix counts in the response budget and the last token of a demonstration is never given. UFT's script
    has 4 rollouts of 256 problems and 4 updates a step; rows and updates are settings here.
    """
    return torch.full_like(t.log_probs, t.coefficient * t.policy_tokens / max(1, t.demonstration_tokens))


def probability_mean(t: Tokens) -> Tensor:
    """p·Z/T_d

    SFT with each token weighted by its own probability, both there and here over T_d. [DFT Eq. 9; trl's dft_loss]
    """
    return t.log_probs.exp() * t.normalizer / max(1, t.demonstration_tokens)


def shaped(t: Tokens) -> Tensor:
    """A·cp/(p + c)²

    The gradient of A f(p), f(p) = p / (p + c), c = gamma. [LUFFY Eq. 7] There and here in the same sum as own tokens.
    """
    p = t.log_probs.exp()
    below = (p + t.coefficient).clamp(min=torch.finfo(p.dtype).tiny)  # where p underflows and c = 0: 0, not 0 / 0
    return t.advantages * (t.coefficient / below) * (p / below)


def remaining_clipped(t: Tokens) -> Tensor:
    """(1 − c)·I·A·r

    CHORD's policy tokens, c = mu. [2508.11408 Eq. 5; Trinity-RFT has a dual clip at 3 too]
    """
    return (1 - t.coefficient) * clipped(t)


def uncertain_means(t: Tokens) -> Tensor:
    """c·p(1 − p)·T_own/T_d

    CHORD's phi: demonstration tokens that are neither known nor hopeless, both terms token means. [2508.11408 Eq. 7]
    """
    p = t.log_probs.exp()
    return p * (1 - p) * matched_means(t)


def row_mean(t: Tokens) -> Tensor:
    """c·L/len(y*)

    The token mean of each demonstration that stands in a group's place. [HPT] There RL is a sum / L and SFT c times a
    token mean per micro-batch: where such a demonstration is alone in its own, this is that weight, else more. It
    grows with the number of replaced groups, as no constant over Z would. There the rows left after groups were
    replaced are cut into mini-batches of 512 rows: one update where more than 73 of 128 problems are unsolved, else
    one of 512 and one of the rest; here each update has half of the problems.
    """
    lengths = t.prefix_mask.sum(1, keepdim=True).clamp(min=1).to(t.log_probs)
    return (t.coefficient * t.max_response_tokens / lengths).expand_as(t.log_probs)


def srft_policy(t: Tokens) -> Tensor:
    """0.1·e^H where the reward is 1, else −1

    SRFT's own tokens: no baseline, no ratio; a row's H is the present policy's. There and here summed over tokens.
    """
    return torch.where(t.rewards[:, None] == 1, 0.1 * t.row_entropy.exp(), -1.0).expand_as(t.log_probs)


def srft_demonstration(t: Tokens) -> Tensor:
    """c·0.5·e^(−H)·Z/T_d + A·γp/(p + γ)², γ = 0.1

    SRFT's demonstration. There the first term is a token mean per micro-batch, the second a sum: c as for RFT + SFT.
    [2506.19767 has no official code: these are the weights of Unify-Post-Training's re-implementation]
    """
    return 0.5 * (-t.row_entropy).exp() * token_mean(t) + shaped(dataclasses.replace(t, coefficient=0.1))


def trust(t: Tokens) -> Tensor:
    """min(1, 10p)

    TRAPO's prefix tokens: advantage 1, not graded, little weight where the policy would hardly go. There and here in
    the same sum as own tokens. Of TRAPO's rows only this weight and the baseline over all 8 rows are taken: there a
    group gets prefixes of 25, 50 and 100% of a demonstration, one after the other, as long as its rows fail, and an
    entropy bonus of 0.001; here one hybrid row with Prefix-RFT's share. [2512.17636; Su-my/TRAPO, "clip_low"]
    """
    return (10 * t.log_probs.exp()).clamp(max=1.0)


# ---- the methods


@dataclass(frozen=True)
class Method:
    """One row of the table of methods: the rows of a group and what their tokens weigh."""

    source: str  # the paper
    rows: str = "on_policy"  # on_policy | hybrid | demonstration | shared_prefix (sample.plan_group)
    policy_weight: Callable[[Tokens], Tensor] = clipped  # w of the policy's own tokens
    demonstration_weight: Callable[[Tokens], Tensor] = (
        zero  # w of demonstration tokens, also in batches of them alone
    )
    entropy_clip: str = ""  # which tokens it keeps: high | low | random entropy; "": no clip
    coefficient: float | None = None  # c in its formulas; the setting `coefficient` takes its place
    coefficient_end: float | None = None  # c falls to this along half a cosine over FALL of the run
    schedule: str = "cosine"  # of the prefix fraction (sample.SCHEDULES)
    baseline: str | None = None  # fixed by the method, else the setting's
    scale_by_std: bool | None = None  # likewise
    stages: tuple[str, ...] = ("rl",)  # "sft": updates on demonstrations; "rl": steps on graded rollouts
    unsolved: str = ""  # a group without right rows: replace (by a demonstration) | rescue (sample again) | collect

    @property
    def needs_demonstrations(self) -> bool:
        return self.rows != "on_policy" or "sft" in self.stages or bool(self.unsolved)


def variant(method: Method, **changes: object) -> Method:
    return dataclasses.replace(method, **changes)


RFT = Method("2503.20783 (Dr.GRPO)")
PREFIX_RFT = Method("2507.01679", "hybrid", clipped, clipped, entropy_clip="high")
SFT = Method("token-mean cross-entropy", "demonstration", demonstration_weight=token_mean, stages=("sft",))
SFT_THEN_RFT = Method("2504.14945", demonstration_weight=token_mean, stages=("sft", "rl"))
CHORD = Method("2508.11408", "demonstration", remaining_clipped, baseline="on_policy", scale_by_std=True)

METHODS: dict[str, Method] = {
    "sft": SFT,
    "dft": variant(SFT, source="2508.05629", demonstration_weight=probability_mean),
    "rft": RFT,
    "sft-rft": SFT_THEN_RFT,
    "dft-rft": variant(SFT_THEN_RFT, source="2508.05629", demonstration_weight=probability_mean),
    # ---- Prefix-RFT and its ablations [paper Table 8 and Figure 6]
    "prefix-rft": PREFIX_RFT,
    "prefix-rft-frozen": variant(PREFIX_RFT, demonstration_weight=zero, entropy_clip=""),
    "prefix-rft-all": variant(PREFIX_RFT, entropy_clip=""),
    "prefix-rft-static": variant(PREFIX_RFT, demonstration_weight=constant, entropy_clip="", coefficient=0.001),
    "prefix-rft-low": variant(PREFIX_RFT, entropy_clip="low"),
    "prefix-rft-random": variant(PREFIX_RFT, entropy_clip="random"),
    "prefix-rft-uniform": variant(PREFIX_RFT, schedule="uniform"),
    "prefix-rft-constant": variant(PREFIX_RFT, schedule="constant"),
    "rft-entropy-clip": variant(RFT, source="2507.01679", entropy_clip="high"),
    "dr-po": variant(
        PREFIX_RFT, rows="shared_prefix", demonstration_weight=zero, entropy_clip="", baseline="group"
    ),  # all 8 rows behind one prefix, which is not in the loss
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
}


FALL = 0.2  # share of the run [CHORD: mu from 0.6 to 0 over 20 of 100 steps in Trinity-RFT's mix_chord_toolace.yaml;
# the values of its mix_chord.yaml are 0.9 and 0.05, over 200 steps of a longer run]


def coefficient_at(method: Method, progress: float, chosen: float | None) -> float:
    """c at `progress` (0 to 1) of the run: `chosen` or the method's own, falling to its coefficient_end, where it has
    one, over the first FALL of the run; 1 for a method without c."""
    start = method.coefficient if chosen is None else chosen
    if start is None or method.coefficient_end is None:
        return 1.0 if start is None else start
    end = min(start, method.coefficient_end)
    return end + (start - end) * (1 + math.cos(math.pi * min(1.0, progress / FALL))) / 2


@torch.no_grad()
def token_weights(method: Method, tokens: Tokens) -> Tensor:
    """The weight w of every token, 0 outside `weight_mask` -> [B, R]. The one place where methods differ."""
    weights = torch.where(tokens.prefix_mask, method.demonstration_weight(tokens), method.policy_weight(tokens))
    return torch.where(tokens.weight_mask, weights, 0.0)


def weighted_loss(log_probs: Tensor, weights: Tensor, mask: Tensor, normalizer: float) -> Tensor:
    """-sum(w log pi) / Z over the tokens of `mask`, a scalar; log_probs, weights, mask [B, R].

    Z is a constant over micro-batches and ranks, so that their losses add up to the mini-batch's. [Dr.GRPO: no
    division by response length]
    """
    return -torch.where(mask, weights * log_probs, 0.0).sum() / normalizer
