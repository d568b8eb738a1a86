"""What the paper [2507.01679] and its critics [2604.23747] claim, and what the stored runs say of each claim.

In reading order: differences with intervals, CLAIMS, the table of verdicts. The rules stand in README.md (Intervals,
Verdicts). A claim names two groups of runs and what the first is said to have more of. Table and figure numbers are
those of the paper's third version; a row whose number we have not seen names its experiment instead. (Tables 2
and 6 are the tasks out of domain and the 1.5B base with its demonstrations; which is which we have not seen.) Left
out: what our runs cannot speak of, as clips at 50 and 80%, or code.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from data.make_recipes import LEVELS, PROBLEMS_PER_LEVEL
from evaluation.statistics import interval, paired_difference
from results.ceiling import solved
from results.protocol import EXPERT, REGIMES, Line
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


def difference(first: np.ndarray, second: np.ndarray, trained: tuple[bool, bool] = (True, True)) -> Interval | None:
    """Mean of `first` minus that of `second`, each [runs, the same problems]; None with a single run of either. The
    base is not `trained`: it has no spread over seeds."""
    groups = [runs for runs, has_seeds in zip((first, second), trained) if has_seeds]
    if min(map(len, groups)) < 2:
        return None
    by_problem = first.mean(0) - second.mean(0)
    parts = [(by_problem.var(ddof=1) / len(by_problem), len(by_problem) - 1)]
    parts += [(runs.mean(1).var(ddof=1) / len(runs), len(runs) - 1) for runs in groups]
    return combine(float(by_problem.mean()), parts)


def mean_interval(values: np.ndarray, less: np.ndarray | None = None) -> Interval:
    """The mean of [runs, problems], or what it is above the one model `less`, [problems], with its interval over
    problems (evaluation/statistics.py: never of width 0), which the spread of several runs widens, in quadrature."""
    by_problem, count = values.mean(0), len(values)
    mid, low, high = (float(by_problem.mean()), *interval(by_problem))
    if less is not None:
        mid, low, high = paired_difference(less, by_problem)
    reach = t_quantile(count - 1) * float(values.mean(1).std(ddof=1)) / count**0.5 if count > 1 else 0.0
    ends = mid - math.hypot(mid - low, reach), mid + math.hypot(high - mid, reach)
    return mid, max(ends[0], 0.0 if less is None else -1.0), min(ends[1], 1.0)


def difference_of_runs(first: Sequence[float], second: Sequence[float] | None = None) -> Interval | None:
    """The same of one number a run; without `second` the mean itself."""
    groups = [values for values in (first, second) if values is not None]
    if min(map(len, groups)) < 2:
        return None
    parts = [(float(np.var(values, ddof=1)) / len(values), len(values) - 1) for values in groups]
    return combine(float(np.mean(first) - (np.mean(second) if second is not None else 0)), parts)


# ---- the claims


@dataclass(frozen=True)
class Claim:
    """`more` is said to have more of `what` than `less`: names as runs_of reads them, in the runs of `regime`."""

    source: str
    text: str
    regime: str
    more: str
    less: str = ""  # "": the claim is that `more` has some of it
    what: str = "accuracy"  # a curve of a line, in its last part; "advantage", "narrowing"; "pass@K"
    level: str = "all"
    equal: bool = False  # the claim is that `less` loses at most ENOUGH
    why: str = ""  # it may differ here


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
SELECTED = {
    "prefix-rft-low": "the tokens of high entropy are the right ones, not those of low",
    "prefix-rft-random": "the tokens of high entropy are the right ones, not random ones",
    "prefix-rft-uniform": "the falling schedule is better than uniform lengths",
}
WEAKER = {"short": "steps without their labels", "slips": "slips, noticed and mended", "several": "two kinds in turn"}


def claims() -> list[Claim]:
    """In the order of the table."""
    return [*claims_of_accuracy(), *claims_of_demonstrations(), *claims_of_parts(), *claims_of_the_critics()]


def few_steps(regime: str) -> str:
    return f"{REGIMES[regime].steps} steps here, 500 there"


ONLY_FEW = few_steps("habit")  # scarce has as many


def small(regime: str, method: str = "") -> str:
    """Why accuracies may differ here."""
    why = "0.3 M parameters and a synthetic task: the base lacks a habit, hardly any knowledge; " + few_steps(regime)
    longer = "; after 120 steps, in the earlier study below, `prefix-rft` was above `sft`"
    return why + longer * ((regime, method) == ("habit", "sft"))


def claims_of_accuracy() -> list[Claim]:
    found = []
    for method, value in REPORTED.items():
        for regime in ("habit", "silent") if method != "rft+sft" else ("habit",):
            text = f"Prefix-RFT is above `{method}` (51.8 against {value})"
            found.append(Claim("Table 1", text, regime, "prefix-rft", method, why=small(regime, method)))
    for method in ("sft", "rft", "sft-rft"):
        text = f"Prefix-RFT is above `{method}` outside its training domain too (ARC-c, GPQA-diamond, MMLU-Pro)"
        why = "out of domain here: longer recipes; there: other subjects"
        found.append(Claim("Tables 2, 6", text, "habit", "prefix-rft", method, level="ood", why=why))
    why = "hard and ood recipes, 256 samples here; AIME24 and 25, 2048 samples there"
    text = "With very many samples Prefix-RFT solves problems that the base does not (pass@2048: +6.7)"
    found.append(Claim("pass@2048", text, "ceiling", "prefix-rft", "base", "pass@256", why=why))
    text = "No other method does: `rft` is at most 3 points above the base"
    found.append(Claim("pass@2048", text, "ceiling", "rft", "base", "pass@256", equal=True, why=why))
    return found


def claims_of_demonstrations() -> list[Claim]:
    found = []
    for method, value in (("sft", 31.9), ("rft", 30.0)):
        text = f"Prefix-RFT is above `{method}` on another base too (41.1 against {value})"
        why = "there a base of 1.5B; here the same one from another pretraining seed"
        found.append(Claim("Tables 2, 6", text, "twin", "prefix-rft", method, why=why))
    why = "the 512 problems are the same; " + ONLY_FEW
    for number in (32, 8, 2):
        text = f"{number} demonstrations are enough: at most 3 points below 512 (there 10%: 0.3, 1%: 3.5 of 41.1)"
        pair = {"more": "prefix-rft@512", "less": f"prefix-rft@{number}", "equal": True}
        found.append(Claim("Tables 2, 6", text, "scarce", **pair, why=why))
    text = "With 8 demonstrations Prefix-RFT is still above `rft` (1%: 37.6 against 30.0)"
    found.append(Claim("Tables 2, 6", text, "scarce", "prefix-rft@8", "habit:rft", why=why))
    for expert, how in WEAKER.items():
        text = f"A weaker expert is enough ({how}): at most 3 points lost (there a 1.5B one: 1.3 of 41.1)"
        pair = {"more": "habit:prefix-rft", "less": f"prefix-rft@{expert}", "equal": True}
        found.append(
            Claim("Tables 2, 6", text, "weak", **pair, why="there weaker models; here every wrong step is mended")
        )
    return found


def claims_of_parts() -> list[Claim]:
    found = []
    for method, text in ABLATED.items():
        found.append(Claim("Table 8", f"In Prefix-RFT {text}", "habit", "prefix-rft", method, why=ONLY_FEW))
    text = "Without the entropy clip responses grow much longer"
    why = "a solution here has one right length; " + ONLY_FEW
    found.append(Claim("Table 8", text, "habit", "prefix-rft-all", "prefix-rft", what="length", why=why))
    why = (
        "means of rows, those with a prefix of demonstrated problems alone; shorter prefixes by themselves narrow it"
    )
    for what, text in (
        ("advantage", "Rows with a prefix earn more than the others, over the run"),
        ("narrowing", "and their lead narrows: it is smaller at the end than at the beginning"),
    ):
        found.append(Claim("Figure 4", text, "habit", "prefix-rft", what=what, why=why))
    for method, text in SELECTED.items():
        found.append(Claim("Figure 6", f"In Prefix-RFT {text}", "habit", "prefix-rft", method, why=ONLY_FEW))
    return found


def claims_of_the_critics() -> list[Claim]:
    """Those mixed methods that we know they compared with."""
    found = []
    for regime in ("habit", "silent"):
        for method in ("prefix-rft", "luffy", "relift", "hpt", *["srft"] * (regime == "habit")):
            text = f"A correct SFT→RFT is above `{method}` (57.0; the best mixed method, SRFT: 53.2)"
            found.append(Claim("[2604.23747]", text, regime, "sft-rft", method, why=small(regime)))
        text = "SFT→RFT is above Prefix-RFT with no more tokens, too (55.6 after 50 steps of reinforcement)"
        why = "there: counted in FLOPs; here: sampled and trained tokens"
        found.append(Claim("[2604.23747]", text, regime, "sft-rft-equal", "prefix-rft", why=why))
        text = "A correct SFT alone is above Prefix-RFT (whose own report is 51.8)"
        found.append(Claim("[2604.23747]", text, regime, "sft", "prefix-rft", why=small(regime, "sft")))
    return found


# ---- the verdicts


def runs_of(lines: Sequence[Line], name: str) -> list[Line]:
    """The runs of `method`, or of `method@demonstrations` or `method@expert`."""
    method, _, variant = name.partition("@")

    def fits(settings: dict) -> bool:
        return variant in ("", str(settings.get("demonstrations")), settings.get("expert", EXPERT))

    return [line for line in lines if not line["trial"] and line["method"] == method and fits(line["settings"])]


def group_of(stored: dict[str, list[Line]], regime: str, name: str) -> list[Line]:
    """The same; of another regime where the name begins with `REGIME:`."""
    other, _, rest = name.rpartition(":")
    return runs_of(stored.get(other or regime, []), rest) if name else []


def prefix_advantage(line: Line) -> list[float]:
    """Mean reward of hybrid rows minus that of on-policy ones, over the parts of a run."""
    pairs = zip(line["curve"]["hybrid"], line["curve"]["on_policy"])
    return [hybrid - own for hybrid, own in pairs if hybrid is not None and own is not None]


def measured(claim: Claim, stored: dict[str, list[Line]]) -> dict[str, Interval]:
    """The differences that decide a claim, by what they are of; {} where there are too few runs."""
    more, less = (group_of(stored, claim.regime, name) for name in (claim.more, claim.less))
    if not more or (claim.less and not less):
        return {}
    if claim.what == "accuracy":
        found = {
            title: difference(scores(more, kind, claim.level), scores(less, kind, claim.level))
            for kind, title in KINDS.items()
        }
    elif claim.what.startswith("pass@"):
        tries = int(claim.what.removeprefix("pass@"))
        found = {claim.what: difference(solved(more, tries), solved(less, tries), (True, claim.less != "base"))}
    elif claim.what == "advantage":
        found = {"reward": difference_of_runs([float(np.mean(prefix_advantage(line))) for line in more])}
    elif claim.what == "narrowing":
        parts = [prefix_advantage(line) for line in more]
        found = {"reward": difference_of_runs([values[0] - values[-1] for values in parts])}
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


def evidence(claim: Claim, found: dict[str, Interval], stored: dict[str, list[Line]]) -> str:
    """The differences as text: accuracies in points, others in their units."""
    counts = [len(group_of(stored, claim.regime, name)) for name in (claim.more, claim.less) if name]
    if not found:
        return f"{claim.regime}: " + ("too few seeds for an interval" if all(counts) else "not run yet")
    scale, unit = {"length": (1, " tokens"), "advantage": (1, ""), "narrowing": (1, "")}.get(claim.what, (100, ""))
    digits = 2 if claim.what in ("advantage", "narrowing") else 1
    shown = [
        f"{title} {scale * mid:+.{digits}f}{unit} [{scale * low:+.{digits}f}, {scale * high:+.{digits}f}]"
        for title, (mid, low, high) in found.items()
    ]
    return f"{claim.regime}: {', '.join(shown)} (seeds: {', '.join(map(str, counts))})"


def verdict_rows(stored: dict[str, list[Line]]) -> list[list[str]]:
    """The table of verdicts, its header first."""
    rows = [["source", "claim", "our evidence: difference and 95% interval", "why it may differ", "verdict"]]
    for claim in claims():
        found = measured(claim, stored)
        rows.append([claim.source, claim.text, evidence(claim, found, stored), claim.why, verdict(claim, found)])
    return rows
