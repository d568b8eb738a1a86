"""This file makes the warnings that a run prints, each once, when its metrics show that training goes wrong.

`Watch.look` takes each step's row of metrics, in order, and returns the warnings that apply for the first time. The
warnings depend on the rows of metrics only. A resumed run first passes the rows of metrics.jsonl to `Watch.recall`,
and then gives the warnings that an uninterrupted run would have given. The thresholds of all warnings are the
constants of this file. A warning changes nothing in the run.
"""

import math
from collections import deque
from statistics import fmean, stdev
from typing import Any

import torch

from methods import Method

# numbers of steps: in the long window, in the short window, and at the start, with which later steps are compared
LONG, SHORT, FIRST = 20, 10, 5
COLLAPSED = 0.02  # entropy has collapsed below this share of the entropy at the start
# The threshold of log_prob_gap is eps^GAP_POWER nats, because rounding may cost half of the digits: 0.00035 in fp32,
# 0.088 in bf16. Random, strongly nonlinear models of 16 layers had gaps of at most 0.000004 in fp32 and 0.037 in
# bf16.
GAP_POWER = 0.5
# there is no warning "surprise" while the mean of the metric `surprise` over LONG steps is at most so many nats per
# token, or so many standard errors, away from 0
SURPRISE = 0.02, 6.0
# Two numbers: the share of a step's trained tokens that PPO may clip, and how many trained tokens a step must have to
# be judged. In 45 runs that learned the embedded task or a similar task PPO clipped a share of at most 0.1 (with the
# defaults 0.004). In runs whose policy had collapsed after the first step PPO clipped a share of 0.16 (lr 5e-3) to
# 0.56 (lr 1e3).
CLIPPED = 0.15, 100
# the warning "copied" comes if more than this share of a step's responses are right with an answer copied from the
# problem
COPIED = 0.03
# The reward is lost if it is below this share of the best reward over SHORT steps, and below that best reward by so
# many standard errors. In 45 runs that learned a task the reward stayed at least at 0.3 of its best value; a
# collapsed run (rft at lr 1e-3) kept 0.09.
LOST = 0.2, 6.0


class Watch:
    """Collects the warnings of a run that trains by the method `method` and computes in `dtype`. `warnings` holds all
    warnings so far, by name."""

    def __init__(self, method: Method, warnings: dict[str, str], dtype: torch.dtype = torch.float32):
        self.method, self.warnings = method, dict(warnings)
        self.largest_gap = torch.finfo(dtype).eps ** GAP_POWER
        self.rows: deque[dict[str, Any]] = deque(maxlen=LONG)
        self.first_entropies: list[float] = []
        # best mean reward over SHORT steps, the last SHORT steps excluded, and the standard error of this mean
        self.best_reward = 0.0, 0.0

    def look(self, row: dict[str, Any]) -> dict[str, str]:
        """Returns the new warnings, by name, at the step whose metrics are `row`."""
        if row.get("reward") is not None:  # only reinforcement steps have the metric `reward`
            self.rows.append(row)
            if len(self.first_entropies) < FIRST and row["entropy"] is not None:
                self.first_entropies.append(row["entropy"])
        due = {**of_step(row, self.largest_gap), **self.of_window()}
        new = {
            name: f"step {row['step']}: {text}" for name, text in due.items() if text and name not in self.warnings
        }
        self.warnings |= new
        return new

    def recall(self, row: dict[str, Any]) -> None:
        """Take a step's row from metrics.jsonl. The warnings in the row are kept as they were given, even if the run
        was then on another device."""
        warnings = self.warnings | row.get("warnings", {})
        self.look(row)
        self.warnings = warnings

    def of_window(self) -> dict[str, str]:
        long = list(self.rows)
        short = long[-SHORT:]
        warnings = {}
        if len(short) == SHORT and not any(row["grad_norm"] or row["skipped_updates"] for row in short):
            warnings["no_gradient"] = (
                f"no row had a gradient for {SHORT} steps: in every group all rewards are equal "
                "(equal_reward_groups). If all are 0, begin with demonstrations (--method sft-rft), an easier task "
                "or another model"
            )
        start, entropies = fmean(self.first_entropies or [0.0]), [row["entropy"] for row in short]
        if len(short) == SHORT and all(e is not None and e < COLLAPSED * start for e in entropies):
            warnings["entropy_collapse"] = (
                f"the entropy is below {100 * COLLAPSED:.0f}% of its start for {SHORT} steps: responses of a group "
                "are nearly equal; lower lr"
            )
        if len(long) == LONG:
            if self.method.rows in ("hybrid", "demonstration") and not any(row["hybrid_rows"] for row in long):
                warnings["no_hybrid"] = (
                    f"no row saw a demonstration for {LONG} steps: few problems have one (see problems, above); "
                    "without one this is plain reinforcement"
                )
            warnings["surprise"] = self.of_surprise([row["surprise"] for row in long])
        if len(long) >= FIRST + SHORT:
            warnings["reward_lost"] = self.of_rewards([row["reward_on_policy"] for row in long])
        return warnings

    def of_rewards(self, rewards: list[float | None]) -> str:
        """Returns the warning "reward_lost" or "". of_rewards compares the last SHORT `rewards` with the best earlier
        mean over SHORT steps.

        `rewards` has the mean reward of each of the last LONG reinforcement steps, or of all such steps early in the
        run.
        """
        if None in rewards:
            return ""
        before, now = rewards[:-SHORT], rewards[-SHORT:]
        self.best_reward = max(self.best_reward, mean_and_error(before))
        (best, best_error), (mean, error), (share, errors) = self.best_reward, mean_and_error(now), LOST
        if mean >= share * best or best - mean <= errors * math.hypot(best_error, error):
            return ""
        return (
            f"the reward of on-policy rows was {best:.2g} over {SHORT} steps and is {mean:.2g} over the last "
            f"{SHORT}: the policy has collapsed; start again with a lower lr"
        )

    def of_surprise(self, gaps: list[float | None]) -> str:
        """Returns the warning "surprise" or "": if tokens are drawn from pi, the mean of -log pi is the entropy H.
        Methods that replace or resample unsolved groups are not checked, because their rows are selected by
        reward."""
        if None in gaps or self.method.unsolved in ("replace", "rescue"):
            return ""
        mean, error = mean_and_error(gaps)
        nats, errors = SURPRISE
        if abs(mean) <= max(nats, errors * error):
            return ""
        more = "more" if mean > 0 else "less"
        return (
            f"over {LONG} steps sampled tokens were {abs(mean):.3f} nats {more} surprising than the training pass "
            "expects: sampling and training use different distributions"
        )


def mean_and_error(values: list[float]) -> tuple[float, float]:
    return fmean(values), stdev(values) / math.sqrt(len(values))


def of_step(row: dict[str, Any], largest_gap: float) -> dict[str, str]:
    """Returns the warnings that depend on the metrics of one step only."""
    warnings = {}
    if row["skipped_updates"] or row.get("relift_skipped_updates"):
        warnings["skipped"] = "an update was skipped: its loss or gradient was not finite (skipped_updates); lower lr"
    supervised = {"trained_tokens": "skipped_updates"} if row.get("reward") is None else {}
    supervised |= {"relift_tokens": "relift_skipped_updates"}
    if any(row.get(tokens) == 0 and not row[skipped] for tokens, skipped in supervised.items()):
        warnings["no_weight"] = (
            "an update on demonstrations changed nothing: the method's demonstration_weight (methods.METHODS) is 0 "
            "for all of their tokens"
        )
    if (gap := row.get("log_prob_gap") or 0.0) > largest_gap:
        warnings["log_prob_gap"] = (
            f"log-probs of the sampled tokens differ by {gap:.2g} nats on average between sampling and training; "
            f"rounding explains {largest_gap:.2g}: the sampler is not the policy that is trained"
        )
    share, least = CLIPPED
    if (clipped := row.get("clip_fraction") or 0.0) > share and row["trained_tokens"] >= least:
        warnings["clipped"] = (
            f"{100 * clipped:.0f}% of the trained tokens lost their weight to PPO's clip (clip_fraction): the step's "
            "first update changed the policy too much; lower lr"
        )
    if (copied := row.get("copied") or 0.0) > COPIED:
        warnings["copied"] = (
            f"{100 * copied:.0f}% of the responses are right with a piece of the problem as their answer (69 - 13 "
            "for 56), which --reward math accepts: --reward exact does not"
        )
    shares = {"truncated": "are cut off by the budget: raise max_response_tokens"}
    shares["unread"] = "hold no readable boxed answer: look at samples.jsonl"
    for name, what in shares.items():
        if (row.get(name) or 0) > 0.5:
            warnings[name] = f"{100 * row[name]:.0f}% of the responses {what}"
    return warnings
