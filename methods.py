"""The table of methods: the rows of a group, and the weight of every token. Prefix-RFT's own formulas are in loss.py.

A new method is one entry of METHODS and, where no function here or in loss.py has its formula, one function.

In reading order: the weights, each formula beside its source; `Method` and METHODS; what some methods do besides:
`coefficient_at` (CHORD's mu falls), `second_chance` (HPT, rescue), `hint` and `hinted_log_probs` (SDFT), `Collector`
and `collect` (ReLIFT), and the rate of the supervised stage.

p = pi(y), r = p / pi_old(y), A = advantage. The first line of a weight's docstring is its formula. A coefficient
means something only with the denominators of the two terms it mixes. Here all tokens are summed and divided by Z.
T_own / T_d turns two token means of a source into that; Z / T_d is a token mean beside a sum over Z.
Looked at and left out: RL-PLUS (LUFFY's rows, another shaping), AMPO, Scaf-GRPO, Guide (hints in the prompt, several
teachers), QuestA (`rescue` with a constant share), distillation from a larger teacher. What the family's next members
would need stands in configs/README.md.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from loss import Tokens, clipped

RESCUE_SHARES = (0.25, 0.5, 0.75)  # of a demonstration, one after the other [GHPO: characters, here tokens]
# Share of the run in which a coefficient falls [CHORD: mu from 0.6 to 0 over 20 of 100 steps in Trinity-RFT's
# mix_chord_toolace.yaml; the values of its mix_chord.yaml are 0.9 and 0.05, over 200 steps of a longer run].
FALL = 0.2

# ---- the weights


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

    c times the mean of -log p over the demonstration's tokens, beside a sum over Z. In a batch of nothing but
    demonstrations Z = T_d and c = 1, so w = 1: plain SFT.
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


def row_entropy(t: Tokens) -> Tensor:
    """[B, 1] H, the mean entropy of a row's response tokens"""
    total = torch.where(t.response_mask, t.entropy, 0.0).sum(1, keepdim=True)
    return total / t.response_mask.sum(1, keepdim=True).clamp(min=1)


def srft_policy(t: Tokens) -> Tensor:
    """0.1·e^H where the reward is 1, else −1

    SRFT's own tokens: no baseline, no ratio; a row's H is the present policy's. There and here summed over tokens.
    """
    return torch.where(t.rewards[:, None] == 1, 0.1 * row_entropy(t).exp(), -1.0).expand_as(t.log_probs)


def srft_demonstration(t: Tokens) -> Tensor:
    """c·0.5·e^(−H)·Z/T_d + A·γp/(p + γ)², γ = 0.1

    SRFT's demonstration. There the first term is a token mean per micro-batch, the second a sum: c as for RFT + SFT.
    [2506.19767 has no official code: these are the weights of Unify-Post-Training's re-implementation]
    """
    return 0.5 * (-row_entropy(t)).exp() * token_mean(t) + shaped(dataclasses.replace(t, coefficient=0.1))


def trust(t: Tokens) -> Tensor:
    """min(1, 10p)

    TRAPO's prefix tokens: advantage 1, not graded, little weight where the policy would hardly go. There and here in
    the same sum as own tokens. Of TRAPO's rows only this weight and the baseline over all 8 rows are taken: there a
    group gets prefixes of 25, 50 and 100% of a demonstration, one after the other, as long as its rows fail, and an
    entropy bonus of 0.001; here one hybrid row with Prefix-RFT's share. [2512.17636; Su-my/TRAPO, "clip_low"]
    """
    return (10 * t.log_probs.exp()).clamp(max=1.0)


def toward_hinted(t: Tokens) -> Tensor:
    """r·(log q − log p)

    SDFT: q = π(y | x, y*), with a demonstration y* in the prompt x. In the mean over sampled tokens this is the
    gradient of KL(p ‖ q), r corrects for the updates since; 0 without a demonstration. There the
    divergence is summed over the vocabulary, here the sampled token stands for it; there the mean over rows of each
    row's token mean, without its first 3 tokens; here a sum over Z, so a row weighs len(y)/L of that. By the
    repository's README of April 2026 the paper's results are those of the forward KL, the default of its code.
    [2601.19897; idanshen/Self-Distillation, distil_trainer.py `_compute_loss`, as a fork has it]
    """
    gain = t.hinted_log_probs - t.log_probs
    return torch.where(gain.isnan(), 0.0, (t.log_probs - t.old_log_probs).exp() * gain)


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
    hinted: bool = False  # its weights read hinted_log_probs

    @property
    def needs_demonstrations(self) -> bool:
        return self.rows != "on_policy" or "sft" in self.stages or bool(self.unsolved) or self.hinted


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
    # no source has this sequence: DFT's stage in the place of SFT's
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
    "sdft": Method("2601.19897", policy_weight=toward_hinted, scale_by_std=False, hinted=True),  # no reward
}


# ---- what some methods do besides


def coefficient_at(method: Method, progress: float, setting: float | None) -> float:
    """c at `progress` (0 to 1) of the run: the `setting` or the method's own; 1 for a method without c.

    Where the method has a coefficient_end, c falls to it along half a cosine over the first FALL of the run.
    """
    start = method.coefficient if setting is None else setting
    if start is None or method.coefficient_end is None:
        return 1.0 if start is None else start
    end = min(start, method.coefficient_end)
    return end + (start - end) * (1 + math.cos(math.pi * min(1.0, progress / FALL))) / 2


def unsolved_groups(rows: Sequence[Any], gate: int) -> list[int]:
    """Groups of `rows` (sample.Row) in which at most `gate` rows are right (reward 1)."""
    right: dict[int, int] = {}
    for row in rows:
        right[row.group] = right.get(row.group, 0) + (row.reward == 1)
    return [group for group, count in right.items() if count <= gate]


def second_chance(
    method: Method, rows: list[Any], gate: int, demonstrated: Sequence[bool], sample: Callable[..., list[Any]]
) -> tuple[list[Any], int]:
    """What the method does, before any update, with groups that no rollout solved and that have a demonstration
    (`demonstrated` says which groups have one) -> the step's rows, and how many tokens were sampled for it.

    replace   one whole demonstration in the group's place [HPT]
    rescue    all rows again behind the same first 25%, then 50%, then 75% of a demonstration, until one is right
              [GHPO, BREAD; GHPO puts the hint into the prompt, adds 0.5 to the reward for the format, divides
              advantages by the deviation, takes a token mean and a cosine rate with warm-up: none of it here]

    `sample(groups, rows=…, rollouts=…, …)` gives graded rows of groups: step.sample_groups.
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
    """The ids of a prompt that shows a demonstration: the problem (data.loader.Encoded), a demonstration as its
    answer, the problem again. Several demonstrations take turns. [SDFT has both in one user message and asks there
    for a response of one's own.]"""
    demonstration = problem.demonstrations[step % len(problem.demonstrations)]
    return [*problem.prompt_ids, *demonstration, problem.end_id, *problem.prompt_ids]


def hinted_log_probs(
    run: Any, picked: list[int], rows: list[Any], step: int, pack: Callable[..., Any], old_stats: Callable[..., Any]
) -> Tensor | None:
    """SDFT's teacher: log-probs [B, R] of the tokens of `rows` by the policy that sampled them, once its prompt shows
    a demonstration; NaN where the problem has none. For methods that are not `hinted` None.

    In the source the teacher is a running mean of the policy's weights (0.01 of them a step), here the policy itself.
    `picked`: the step's problems; sample.pack, step.old_stats.
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
    """ReLIFT: unsolved problems that wait for an update on their demonstrations, newest first; its optimizer."""

    waiting: list[int]  # indices of training problems
    optimizer: torch.optim.Optimizer


def collect(run: Any, picked: list[int], rows: list[Any], sft_step: Callable[..., Any]) -> dict[str, Any]:
    """ReLIFT: of the problems `picked` for the step, those that its graded `rows` did not solve wait, newest first
    and each as often as it was met. Once `relift_buffer` wait, the first so many give one supervised update, with an
    optimizer of its own -> what metrics.jsonl says of it.

    The source takes the mean of the token means of 4 rows, and clips this gradient at 1.0 and reinforcement's at 0.7;
    here one token mean over the buffer, and `max_grad_norm` for both.
    """
    config, collector, encoded = run.config, run.collector, run.data.encoded
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
    """10% linear warm-up, then half a cosine from sft_lr to the share `sft_lr_end` of it; `step` from 0."""
    warm_up = max(1, round(0.1 * config.sft_steps))
    if step < warm_up:
        return config.sft_lr * (step + 1) / warm_up
    cosine = (1 + math.cos(math.pi * (step - warm_up) / max(1, config.sft_steps - warm_up))) / 2
    return config.sft_lr * (config.sft_lr_end + (1 - config.sft_lr_end) * cosine)
