"""This file tests the claims of the paper [2507.01679] and of its critics [2604.23747] on the first study's stored
runs.

Each row of claims.csv is one claim: among the runs of `regime`, the group `more` is above the group `less` in the
quantity `what`, on test problems of `level`. records.name_of explains the names of groups; a group of another regime
is named `REGIME:GROUP`. If `less` is empty, the claim is that the quantity of `more` is above 0. `what` is the
accuracy, pass@K, the length of responses, the lead in reward of hybrid rows over on-policy rows, or how far this lead
narrows during a run. If `enough` is true, the claim is that `less` loses at most ENOUGH points against `more`.

The claims cite tables and figures of the paper's third version. PROTOCOL.md has the rules of intervals and verdicts.
Left out are claims that the stored runs cannot test: entropy clips at 50 and 80%, and code generation.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import mannwhitneyu, t, ttest_1samp, ttest_ind

from results.records import KINDS, Line, Stored, accuracies, prefix_lead, runs_of, scores, solved

Interval = tuple[float, float, float]  # estimate of a difference, low and high end of its 95% interval
CLAIMS = Path("results/claims.csv")
ENOUGH = 0.03  # a loss of accuracy up to this share counts as no loss
# factor, unit and decimals with which quantities other than accuracy are printed
UNITS = {"length": (1, " tokens", 1), "lead": (1, "", 2), "narrowing": (1, "", 2)}

# ---- intervals


def difference(first: np.ndarray, second: np.ndarray, trained: tuple[bool, bool] = (True, True)) -> Interval | None:
    """Returns the mean accuracy of `first` minus that of `second`, with its 95% interval by Welch and Satterthwaite;
    None if either group has a single run.

    Each group is an array of scores [runs, problems], and both groups have the same problems. `trained` says of each
    group whether it was trained; the accuracy of the base model, which was not, has no spread over seeds."""
    groups = [runs.mean(1) for runs, has_seeds in zip((first, second), trained) if has_seeds]
    if min(map(len, groups)) < 2:
        return None
    by_problem = first.mean(0) - second.mean(0)
    variances = np.array([values.var(ddof=1) / len(values) for values in (by_problem, *groups)])
    freedoms = np.array([len(values) - 1 for values in (by_problem, *groups)])
    middle, total = float(by_problem.mean()), float(variances.sum())
    freedom = total**2 / max((variances**2 / freedoms).sum(), 1e-300)  # if no value varies, the interval has width 0
    reach = float(t.ppf(0.975, max(freedom, 1))) * math.sqrt(total)
    return middle, middle - reach, middle + reach


def difference_of_runs(first: Sequence[float], second: Sequence[float] | None = None) -> Interval:
    """Returns the mean of `first` minus the mean of `second`, with its 95% interval. Each group has one number per
    run. Without `second` the function returns the mean of `first` and its interval."""
    test = ttest_1samp(first, 0) if second is None else ttest_ind(first, second, equal_var=False)
    low, high = map(float, test.confidence_interval(0.95))
    return (low + high) / 2, low, high


# ---- the verdicts


def read_claims() -> list[Any]:
    """Returns the claims of claims.csv as tuples with a named field for each column."""
    return list(pd.read_csv(CLAIMS, keep_default_na=False, converters={"enough": bool}).itertuples(index=False))


def group_of(stored: Stored, regime: str, name: str) -> list[Line]:
    """Returns the runs of the group that a claim calls `name`."""
    other, _, rest = name.rpartition(":")
    return runs_of(stored[other or regime], rest) if name else []


def measured(claim: Any, stored: Stored) -> dict[str, Interval]:
    """Returns the differences that decide a claim, by measure ("greedy" and "T = 1" for accuracy); {} if there are
    too few runs."""
    more, less = (group_of(stored, claim.regime, name) for name in (claim.more, claim.less))
    if not more or (claim.less and not less):
        return {}
    if claim.what == "accuracy":
        pairs = {title: [scores(runs, kind, claim.level) for runs in (more, less)] for kind, title in KINDS.items()}
        differences = {title: difference(*pair) for title, pair in pairs.items()}
    elif claim.what.startswith("pass@"):
        pair = [solved(runs, int(claim.what.removeprefix("pass@"))) for runs in (more, less)]
        differences = {claim.what: difference(*pair, (True, claim.less != "base"))}
    elif claim.what == "length":
        lengths = [[line["curve"]["length"][-1] for line in runs] for runs in (more, less)]
        differences = {"length": difference_of_runs(*lengths)}
    else:
        leads = [prefix_lead(line) for line in more]
        values = [float(np.mean(lead)) if claim.what == "lead" else lead[0] - lead[-1] for lead in leads]
        differences = {"reward": difference_of_runs(values)}
    return {title: values for title, values in differences.items() if values}


def verdict(differences: dict[str, Interval], enough: bool = False) -> str:
    """Returns the verdict on a claim: "seen", "opposite", "split", "not seen" or "cannot be tested" (PROTOCOL.md)."""
    if not differences:
        return "cannot be tested"
    if enough:
        if all(high <= ENOUGH for _, _, high in differences.values()):
            return "seen"
        return "opposite" if any(low > ENOUGH for _, low, _ in differences.values()) else "not seen"
    above = any(low > 0 for _, low, _ in differences.values())
    below = any(high < 0 for _, _, high in differences.values())
    return {(True, True): "split", (True, False): "seen", (False, True): "opposite"}.get((above, below), "not seen")


def by_ranks(claim: Any, differences: dict[str, Interval], stored: Stored) -> str:
    """Returns a remark if a t interval contains 0 although every run of one group is above every run of the other,
    else "".

    One run far from the rest widens a t interval, but does not change ranks. The rank test ignores the spread over
    problems."""
    groups, text = [group_of(stored, claim.regime, name) for name in (claim.more, claim.less)], ""
    for kind, title in KINDS.items() if differences and claim.what == "accuracy" and not claim.enough else ():
        more, less = (accuracies(runs, kind, claim.level) for runs in groups)
        p = mannwhitneyu(more, less, method="exact").pvalue
        above = claim.more if more.min() > less.max() else claim.less if less.min() > more.max() else ""
        if above and p < 0.05 and differences[title][1] <= 0 <= differences[title][2]:
            text += f"; by ranks every run of {above} is above, {title}, p = {p:.2g}"
    return text


def evidence(claim: Any, differences: dict[str, Interval], stored: Stored) -> str:
    """Returns a claim's differences as text: accuracies in points, other quantities in the units of UNITS."""
    counts = [len(group_of(stored, claim.regime, name)) for name in (claim.more, claim.less) if name]
    if not differences:
        return f"{claim.regime}: " + ("too few seeds for an interval" if all(counts) else "not run yet")
    scale, unit, digits = UNITS.get(claim.what, (100, "", 1))
    texts = [
        f"{title} {scale * mid:+.{digits}f}{unit} [{scale * low:+.{digits}f}, {scale * high:+.{digits}f}]"
        for title, (mid, low, high) in differences.items()
    ]
    seeds, ranks = ", ".join(map(str, counts)), by_ranks(claim, differences, stored)
    return f"{claim.regime}: {', '.join(texts)} (seeds: {seeds}){ranks}"


def verdict_rows(stored: Stored) -> list[list[str]]:
    """Returns the table of all claims and verdicts, with its header first."""
    rows = [["source", "claim", "our evidence: difference and 95% interval", "why it may differ", "verdict"]]
    for claim in read_claims():
        differences = measured(claim, stored)
        numbers, conclusion = evidence(claim, differences, stored), verdict(differences, claim.enough)
        rows.append([claim.source, claim.claim, numbers, claim.why, conclusion])
    return rows


def question_rows(stored: Stored) -> list[list[str]]:
    """Returns the table of questions for README.md: the claims of each question with their estimates and verdicts.

    A contrast that two sources claim in opposite directions is listed once."""
    rows: dict[str, dict[frozenset, str]] = {}
    for claim in read_claims():
        differences, (scale, _, digits) = measured(claim, stored), UNITS.get(claim.what, (100, "", 1))
        numbers = ", ".join(f"{scale * mid:+.{digits}f}" for mid, *_ in differences.values())
        pair = claim.what if claim.what in UNITS else f"{claim.more} − {claim.less}"
        conclusion, ranks = verdict(differences, claim.enough), by_ranks(claim, differences, stored)
        contrast = frozenset((claim.regime, claim.more, claim.less, claim.what, claim.level))
        rows.setdefault(claim.question, {}).setdefault(
            contrast, f"{claim.regime}: `{pair}` {numbers} **{conclusion}**{ranks}"
        )
    return [
        ["question", "what was found"],
        *([question, "<br>".join(answers.values())] for question, answers in rows.items()),
    ]
