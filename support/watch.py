"""What a run says, once each, when its numbers show that it is not what its name says.

`Watch.look` takes each step's row of metrics, in order, and gives the warnings that hold for the first time. It knows
nothing but these rows: a run that goes on lets it `recall` the rows of metrics.jsonl first, and then says what a run
never stopped would have said. Bounds are stated here; nothing is changed by a warning.
"""

import math
from collections import deque
from statistics import fmean, stdev
from typing import Any

import torch

from loss import Method

LONG, SHORT, FIRST = 20, 10, 5  # steps: of a window, of a window, of the start that later steps are compared with
COLLAPSED = 0.02  # of the entropy at the start
# log_prob_gap may be eps^this nats, as rounding may cost half of the digits: 0.00035 in fp32, 0.088 in bf16. Seen at
# most, in random models of 16 layers that are far from linear: 0.000004 and 0.037.
GAP_POWER = 0.5
SURPRISE = 0.02, 6.0  # nats per token, and standard errors, that sampling and training may differ by over LONG steps


class Watch:
    """The warnings of a run by `method` that computes in `dtype`; `said` holds all of them up to now by name."""

    def __init__(self, method: Method, said: dict[str, str], dtype: torch.dtype = torch.float32):
        self.method, self.said = method, dict(said)
        self.largest_gap = torch.finfo(dtype).eps ** GAP_POWER
        self.rows: deque[dict[str, Any]] = deque(maxlen=LONG)
        self.first_entropies: list[float] = []

    def look(self, row: dict[str, Any]) -> dict[str, str]:
        """The new warnings, by name, at the step whose metrics are `row`."""
        if row.get("reward") is not None:  # a step of reinforcement
            self.rows.append(row)
            if len(self.first_entropies) < FIRST and row["entropy"] is not None:
                self.first_entropies.append(row["entropy"])
        due = {**of_step(row, self.largest_gap), **self.of_window()}
        new = {name: f"step {row['step']}: {text}" for name, text in due.items() if text and name not in self.said}
        self.said |= new
        return new

    def recall(self, row: dict[str, Any]) -> None:
        """A step of a log: what it was warned of then, maybe on another device, stands in its row."""
        said = self.said | row.get("warnings", {})
        self.look(row)
        self.said = said

    def of_window(self) -> dict[str, str]:
        long = list(self.rows)
        short = long[-SHORT:]
        found = {}
        if len(short) == SHORT and not any(row["grad_norm"] or row["skipped_updates"] for row in short):
            found["no_gradient"] = (
                f"no row had a gradient for {SHORT} steps: every reward equal? look at equal_reward_groups"
            )
        start, entropies = fmean(self.first_entropies or [0.0]), [row["entropy"] for row in short]
        if len(short) == SHORT and all(e is not None and e < COLLAPSED * start for e in entropies):
            found["entropy_collapse"] = (
                f"the entropy is below {100 * COLLAPSED:.0f}% of its start for {SHORT} steps: responses of a group "
                "are nearly equal; lower lr"
            )
        if len(long) == LONG:
            if self.method.rows in ("hybrid", "demonstration") and not any(row["hybrid_rows"] for row in long):
                found["no_hybrid"] = (
                    f"no row saw a demonstration for {LONG} steps: few problems have one (see problems, above), and "
                    "this is plain reinforcement meanwhile"
                )
            found["surprise"] = self.of_surprise([row["surprise"] for row in long])
        return found

    def of_surprise(self, gaps: list[float | None]) -> str:
        """Tokens drawn from pi have E[-log pi] = H. Not where groups stay or leave by their rewards."""
        if None in gaps or self.method.unsolved in ("replace", "rescue"):
            return ""
        mean, error = fmean(gaps), stdev(gaps) / math.sqrt(len(gaps))
        nats, errors = SURPRISE
        if abs(mean) <= max(nats, errors * error):
            return ""
        more = "more" if mean > 0 else "less"
        return (
            f"over {LONG} steps sampled tokens were {abs(mean):.3f} nats {more} surprising than the training pass "
            "expects: sampling and training use different distributions"
        )


def of_step(row: dict[str, Any], largest_gap: float) -> dict[str, str]:
    """The warnings that one step is enough for."""
    found = {}
    if row["skipped_updates"] or row.get("relift_skipped_updates"):
        found["skipped"] = "an update was skipped, its loss or gradient was not finite (skipped_updates): lower lr"
    if (gap := row.get("log_prob_gap") or 0.0) > largest_gap:
        found["log_prob_gap"] = (
            f"the log-probs of sampled tokens are {gap:.2g} nats from those of the training pass on average, "
            f"rounding explains {largest_gap:.2g}: the sampler is not the policy that is trained"
        )
    shares = {"truncated": "are cut off by the budget: raise max_response_tokens"}
    shares["unread"] = "hold no readable boxed answer: look at samples.jsonl"
    for name, what in shares.items():
        if (row.get(name) or 0) > 0.5:
            found[name] = f"{100 * row[name]:.0f}% of the responses {what}"
    return found
