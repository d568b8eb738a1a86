"""This file reads groups.jsonl of a run folder, which has one group of rollouts for each recorded step. This file
also has the labels, colours and sentences with which figures describe a group.

A line is {"step", "method", "id", "problem", "answer", "prompt": [token, …], "rows": [row, …]}. A row has these
fields:

    hybrid, complete     whether the row starts with demonstration tokens; whether it is a whole demonstration
    reward, truncated    grade of the response; whether the limit of tokens cut the response off
    advantage            A of the policy's tokens; prefix_advantage: A of the demonstration tokens (loss.advantages)
    tokens, ids          the first 512 of the tokens_total response tokens, as text and as ids
    source               1 at demonstration tokens, 0 at tokens that the policy sampled
    entropy              entropy of the sampling policy at each token, in nats
    kept                 0 where the method sets the weight of a token to 0 (loss.weighted_tokens)
    weight               w of each token under the policy that sampled it (loss.token_weights)

train.py writes groups.jsonl; figures/group_figure.py draws a group.
"""

from collections import Counter
from pathlib import Path
from typing import Any

from figures.figure import BLUE, VERMILLION
from support.errors import InputError
from support.files import check_object, read_log

Group = dict[str, Any]
Row = dict[str, Any]

FIELDS = ("step", "method", "id", "problem", "answer", "prompt", "rows")
ROW_FIELDS = ("hybrid", "complete", "reward", "truncated", "advantage", "prefix_advantage")
ROW_FIELDS += ("tokens", "tokens_total", "source", "entropy", "kept", "weight")
SOURCES = {  # who wrote a token -> colour of its cell, and a description for the legend
    "prefix": ("#F8C65C", "beginning of a demonstration: given"),
    "demonstration": ("#F8C65C", "a whole demonstration: given"),
    "continuation": ("#63C2A1", "the policy goes on from the prefix"),
    "own": ("#C3E1F6", "the policy answers without help"),
}
DROPPED = "#FBEBC8"  # colour of a cell whose token the entropy clip drops
LESS, MORE = VERMILLION, BLUE  # colours of weights below and above 0
INK, FAINT = "#222222", "#6B6B6B"


def read_groups(folder: Path) -> list[Group]:
    """Returns all recorded groups in the order of their steps. Raises InputError if the file is missing, empty or has
    a damaged line."""
    log = folder / "groups.jsonl"
    if not log.exists():
        raise InputError(f"{folder} has no groups.jsonl: only runs of train.py that sample rollouts write it")
    groups = read_log(log, *FIELDS)
    for group in groups:
        for row in group["rows"]:
            check_object(row, f"{log}: step {group['step']}", ROW_FIELDS)
    if not groups:
        raise InputError(f"{log} is empty: the first group is recorded after the first step")
    return groups


def read_group(folder: Path, step: int | None = None) -> Group:
    """Returns the group recorded at `step`, or the last one if `step` is None. If no group was recorded at `step`,
    raises an InputError that lists the recorded steps."""
    groups = {group["step"]: group for group in read_groups(folder)}
    if step is None:
        return list(groups.values())[-1]
    if step not in groups:
        raise InputError(f"{folder} has no group of step {step}: choose from {', '.join(map(str, groups))}")
    return groups[step]


# ---- words


def kind(row: Row) -> str:
    return "demonstration" if row["complete"] else "hybrid" if row["hybrid"] else "on-policy"


def source(row: Row, place: int) -> str:
    """Returns the key in SOURCES for the token at index `place` of a row."""
    if row["source"][place]:
        return "demonstration" if row["complete"] else "prefix"
    return "continuation" if row["hybrid"] else "own"


def sources(group: Group) -> list[str]:
    """Returns the sources of the tokens in a group, in the order of SOURCES."""
    present = {source(row, t) for row in group["rows"] for t in range(len(row["tokens"]))}
    return [name for name in SOURCES if name in present]


def drops(row: Row) -> bool:
    return not all(row["kept"])


def framed(row: Row) -> list[bool]:
    """Returns for each token whether it gets a frame: the entropy clip keeps it, but drops another token of the same
    source."""
    losing = {source(row, t) for t, kept in enumerate(row["kept"]) if not kept}
    return [bool(kept) and source(row, t) in losing for t, kept in enumerate(row["kept"])]


def verdict(row: Row) -> str:
    if row["reward"] in (0, 1):
        return "✓ right" if row["reward"] else "✗ cut off" if row["truncated"] else "✗ wrong"
    return f"reward {row['reward']:.2f}"


def parts(row: Row) -> list[tuple[str, str, float]]:
    """Returns the parts of a hybrid row from left to right, as (key of SOURCES, label, advantage A)."""
    if row["complete"]:
        return [("demonstration", "the expert's whole demonstration", row["prefix_advantage"])]
    prefix = f"prefix: the expert's first {sum(row['source'])} tokens"
    parts = [("prefix", prefix, row["prefix_advantage"])]
    if 0 in row["source"]:
        parts.append(("continuation", "continuation: the policy goes on", row["advantage"]))
    return parts


def signed(value: float) -> str:
    """Returns a number as signed text: 0.25 as "+0.25", -0.25 with a typographic minus sign, 0 without a sign.

    A number has two decimals, but two significant digits if its size is below 0.01.
    """
    if value == 0:
        return "0"
    return (f"{value:+.2f}" if abs(value) >= 0.01 else f"{value:+.2g}").replace("-", "−")


def visible(text: str, longest: int = 24) -> str:
    """Returns the text of a token on one line, with visible signs for spaces, line ends and tabs, and � for
    unprintable characters."""
    signs = {" ": "·", "\n": "↵", "\t": "⇥"}
    shown = "".join(signs.get(c, c if c.isprintable() else "�") for c in text)
    return (shown if len(shown) <= longest else shown[: longest - 1] + "…") or "∅"


def scales(group: Group) -> tuple[float, float]:
    """Returns the largest entropy and the largest |w| of a group, which get full bars. If all entropies or all
    weights are 0, returns 1 for them."""
    entropies = [value for row in group["rows"] for value in row["entropy"]]
    weights = [abs(value) for row in group["rows"] for value in row["weight"]]
    return max(entropies, default=0.0) or 1.0, max(weights, default=0.0) or 1.0


def sign_colour(value: float) -> str:
    """Returns the colour for a weight or an advantage, which depends only on the sign."""
    return MORE if value > 0 else LESS if value < 0 else FAINT


def title(group: Group) -> str:
    return f"One group of {group['method']}: {len(group['rows'])} answers to one problem, step {group['step']}"


def summary(group: Group) -> str:
    """Returns the sentences under the title of the picture, which count the rows by kind."""
    kinds = Counter(map(kind, group["rows"]))
    words = (("on-policy", "by the policy alone"), ("hybrid", "begun with an expert's tokens"))
    words += (("demonstration", "written by an expert"),)
    listed = ", ".join(f"{kinds[name]} {what}" for name, what in words if kinds[name])
    return f"{listed}. Each is graded; then every token gets a weight w: how much more or less likely it is made."


def lanes(group: Group) -> list[tuple[str, str]]:
    """Returns the lanes that are drawn under each row of tokens, as (name, explanation). The lane "kept" is included
    only if the entropy clip drops a token."""
    entropy_top, weight_top = scales(group)
    rows = [("entropy", f"how unsure the policy was; full bar: {entropy_top:.2f} nats")]
    if any(map(drops, group["rows"])):
        rows.insert(0, ("kept", "■ keeps its weight, □ loses it, w = 0 (loss.weighted_tokens)"))
    return [*rows, ("weight", f"w before any update; full bar: |w| = {weight_top:.3g}")]


FORMULA = (
    "grad L = −(1/Z) Σ w ∇ log π(token)      w: loss.token_weights; before any update w = A in most methods, the "
    "advantage (loss.advantages)"
)
