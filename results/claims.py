"""What the paper [2507.01679] and its critics [2604.23747] claim, and what the stored runs say of each claim.

In reading order: differences with intervals, CLAIMS, the table of verdicts. The rules stand in README.md (Intervals,
Verdicts). A claim names two groups of runs and what the first is said to have more of. Claims with a number from the
paper were taken from its tables; whether the others stand in the table or figure they are filed under (2, 6; 2, 4, 6)
has still to be checked there.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from data.make_recipes import LEVELS, PROBLEMS_PER_LEVEL
from results.protocol import Line
from results.runs import unpack_counts

Interval = tuple[float, float, float]  # estimate, low, high
SAMPLES = {"greedy": 1, "sampled": 4}  # of each test problem, by kind of measure
KINDS = {"greedy": "greedy", "sampled": "T = 1"}
ENOUGH = 0.03  # a loss of accuracy that counts as none

# ---- differences


@cache
def t_quantile(freedom: float) -> float:
    """The 97.5% quantile of Student's t, by summing its density in steps of 1/10000."""
    x = np.linspace(0, 15, 150_001)
    log_scale = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2) - math.log(freedom * math.pi) / 2
    density = np.exp(log_scale - (freedom + 1) / 2 * np.log1p(x**2 / freedom))
    area = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2) * (x[1] - x[0])])
    return float(np.interp(0.475, area, x))


def combine(estimate: float, parts: Sequence[tuple[float, int]]) -> Interval:
    """95% interval from variances and their degrees of freedom, by Welch and Satterthwaite."""
    total = sum(variance for variance, _ in parts)
    if total == 0:
        return estimate, estimate, estimate
    freedom = total**2 / sum(variance**2 / free for variance, free in parts)
    reach = t_quantile(round(freedom, 2)) * math.sqrt(total)
    return estimate, estimate - reach, estimate + reach


def scores(lines: Sequence[Line], kind: str, level: str = "all") -> np.ndarray:
    """[runs, test problems] share of right samples, on the problems of a level."""
    count = PROBLEMS_PER_LEVEL["test"]
    levels = np.repeat(list(LEVELS), count)
    found = [unpack_counts(line["right"][kind], len(levels)) for line in lines]
    return np.array(found)[:, (levels == level) | (level == "all")] / SAMPLES[kind]


def difference(first: np.ndarray, second: np.ndarray) -> Interval | None:
    """Mean of `first` minus that of `second`, each [runs, the same problems]; None with a single run of either."""
    if min(len(first), len(second)) < 2:
        return None
    by_problem = first.mean(0) - second.mean(0)
    parts = [(by_problem.var(ddof=1) / len(by_problem), len(by_problem) - 1)]
    parts += [(runs.mean(1).var(ddof=1) / len(runs), len(runs) - 1) for runs in (first, second)]
    return combine(float(by_problem.mean()), parts)


def difference_of_runs(first: Sequence[float], second: Sequence[float]) -> Interval | None:
    """The same of one number a run."""
    if min(len(first), len(second)) < 2:
        return None
    parts = [(float(np.var(values, ddof=1)) / len(values), len(values) - 1) for values in (first, second)]
    return combine(float(np.mean(first) - np.mean(second)), parts)


# ---- the claims


@dataclass(frozen=True)
class Claim:
    """`more` is said to have more of `what` than `less`, in the runs of `regime`."""

    source: str
    text: str
    regime: str = ""  # "": no such runs
    more: str = ""  # method, or method@demonstrations
    less: str = ""
    what: str = "accuracy"  # or a curve of a line, in its last part; "advantage": of the prefix, over the whole run
    level: str = "all"
    equal: bool = False  # the claim is that `less` loses at most ENOUGH
    why: str = ""  # it may differ here


SMALL = "0.3 M parameters and a synthetic task: the base lacks a habit, hardly any knowledge"
ONLY_FEW = "60 steps here, 500 there"
REPORTED = {  # average of six benchmarks in Table 1: Prefix-RFT has 51.8
    "sft": 44.1,
    "rft": 45.5,
    "sft-rft": 48.2,
    "rft+sft": 40.1,
    "uft": 44.2,
    "relift": 47.8,
    "luffy": 50.1,
}
ABLATED = {
    "prefix-rft-frozen": "updating the prefix matters (45.4 without)",
    "prefix-rft-all": "the entropy clip matters (45.7 with all prefix tokens)",
    "prefix-rft-static": "weighing the prefix by its advantage matters (43.8 with a constant)",
    "rft-entropy-clip": "the clip alone, without a prefix, is not what helps (43.8)",
}


def claims() -> list[Claim]:
    """In the order of the table."""
    found = []
    for method, value in REPORTED.items():
        for regime in ("habit", "silent") if method != "rft+sft" else ("habit",):
            text = f"Prefix-RFT is above `{method}` (51.8 against {value})"
            found.append(Claim("Table 1", text, regime, "prefix-rft", method, why=SMALL))
    for method in ("sft", "rft", "sft-rft"):
        text = f"Prefix-RFT is above `{method}` outside its training domain too"
        why = "out of domain here: longer recipes; there: other subjects"
        found.append(Claim("Table 2", text, "habit", "prefix-rft", method, level="ood", why=why))
    found.append(Claim("Table 2", "The order holds for other base models", why="one base model here"))
    for number in (32, 8, 2):
        text = f"{number} demonstrations are enough: at most 3 points below 512 (there 10%: 0.3, 1%: 3.5 of 41.1)"
        pair = {"more": "prefix-rft@512", "less": f"prefix-rft@{number}", "equal": True}
        found.append(Claim("Table 6", text, "scarce", **pair, why="the 512 problems are the same; " + ONLY_FEW))
    found.append(Claim("Table 6", "Weaker experts are enough", why="no runs with weaker experts yet"))
    for method, text in ABLATED.items():
        found.append(Claim("Table 8", f"In Prefix-RFT {text}", "habit", "prefix-rft", method, why=ONLY_FEW))
    text = "Hybrid rows earn more than on-policy ones: the prefix has a positive advantage over the run"
    found.append(Claim("Figure 2", text, "habit", "prefix-rft", what="advantage", why="means of rows, not of groups"))
    text = "Without the entropy clip responses grow longer"
    why = "a solution here has one right length; " + ONLY_FEW
    found.append(Claim("Figure 4", text, "habit", "prefix-rft-all", "prefix-rft", what="length", why=why))
    for method, text in (
        ("prefix-rft-low", "the tokens of high entropy are the right ones, not those of low"),
        ("prefix-rft-random", "the tokens of high entropy are the right ones, not random ones"),
        ("prefix-rft-uniform", "the falling schedule is better than uniform lengths"),
    ):
        found.append(Claim("Figure 6", f"In Prefix-RFT {text}", "habit", "prefix-rft", method, why=ONLY_FEW))
    for regime in ("habit", "silent"):
        for method in ("prefix-rft", "luffy", "relift", "uft"):
            text = f"A correct SFT→RFT is above `{method}`"
            found.append(Claim("[2604.23747]", text, regime, "sft-rft", method, why=SMALL))
        text = "SFT→RFT is above Prefix-RFT with no more tokens, too"
        why = "there: 50 steps, counted in FLOPs; here: sampled and trained tokens"
        found.append(Claim("[2604.23747]", text, regime, "sft-rft-equal", "prefix-rft", why=why))
        text = "A correct SFT alone is above Prefix-RFT (54.0 against 51.8)"
        found.append(Claim("[2604.23747]", text, regime, "sft", "prefix-rft", why=SMALL))
    return found


# ---- the verdicts


def runs_of(lines: Sequence[Line], name: str) -> list[Line]:
    """The runs of `method` or `method@demonstrations`."""
    method, _, number = name.partition("@")
    return [
        line
        for line in lines
        if not line["trial"]
        and line["method"] == method
        and number in ("", str(line["settings"].get("demonstrations")))
    ]


def prefix_advantage(line: Line) -> list[float]:
    """Mean reward of hybrid rows minus that of on-policy ones, over the parts of a run."""
    pairs = zip(line["curve"]["hybrid"], line["curve"]["on_policy"])
    return [hybrid - own for hybrid, own in pairs if hybrid is not None and own is not None]


def measured(claim: Claim, lines: Sequence[Line]) -> dict[str, Interval]:
    """The differences that decide a claim, by what they are of; {} where there are too few runs."""
    more, less = runs_of(lines, claim.more), runs_of(lines, claim.less)
    if not claim.regime or not more or not (less or claim.what == "advantage"):
        return {}
    if claim.what == "accuracy":
        found = {
            title: difference(scores(more, kind, claim.level), scores(less, kind, claim.level))
            for kind, title in KINDS.items()
        }
    elif claim.what == "advantage":
        means = [float(np.mean(prefix_advantage(line))) for line in more]
        found = {"reward": difference_of_runs(means, [0.0, 0.0])}
    else:
        last = [[line["curve"][claim.what][-1] for line in runs] for runs in (more, less)]
        found = {claim.what: difference_of_runs(*last)}
    return {title: values for title, values in found.items() if values}


def verdict(claim: Claim, found: dict[str, Interval]) -> str:
    """seen | not seen | opposite | cannot be tested"""
    if not found:
        return "cannot be tested"
    if claim.equal:
        if all(high <= ENOUGH for _, _, high in found.values()):
            return "seen"
        return "opposite" if any(low > ENOUGH for _, low, _ in found.values()) else "not seen"
    above = any(low > 0 for _, low, _ in found.values())
    below = any(high < 0 for _, _, high in found.values())
    return "not seen" if above == below else "seen" if above else "opposite"


def evidence(claim: Claim, found: dict[str, Interval], lines: Sequence[Line]) -> str:
    """The differences as text: accuracies in points, others in their units."""
    if not claim.regime:
        return "no such runs"
    if not found:
        return f"{claim.regime}: not run yet"
    scale, unit = {"accuracy": (100, ""), "length": (1, " tokens")}.get(claim.what, (1, ""))
    digits = 2 if claim.what == "advantage" else 1
    shown = [
        f"{title} {scale * mid:+.{digits}f}{unit} [{scale * low:+.{digits}f}, {scale * high:+.{digits}f}]"
        for title, (mid, low, high) in found.items()
    ]
    counts = [str(len(runs_of(lines, name))) for name in (claim.more, claim.less) if name]
    return f"{claim.regime}: {', '.join(shown)} (seeds: {', '.join(counts)})"


def verdict_rows(stored: dict[str, list[Line]]) -> list[list[str]]:
    """The table of verdicts, its header first."""
    rows = [["source", "claim", "our evidence: difference and 95% interval", "why it may differ", "verdict"]]
    for claim in claims():
        lines = stored.get(claim.regime, [])
        found = measured(claim, lines)
        told = evidence(claim, found, lines)
        rows.append([claim.source, claim.text, told, claim.why, verdict(claim, found)])
    return rows
