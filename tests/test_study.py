"""These tests compare the intervals, verdicts, contrasts and tables of results/ with hand computation, simulation and
the stored runs."""

import re
import statistics
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from scipy.stats import ttest_1samp

from results import claims, drawing, horizon, records, report
from results.claims import by_ranks, difference, measured, verdict
from results.horizon import OURS, RIVALS, TEMPERATURES


def run_line(method: str, seed: int, share: float, regime: str = "habit", **settings) -> dict:
    """Returns a simulated run: the greedy response to each problem, and each of 4 samples, is right with probability
    `share`."""
    rng = np.random.default_rng([seed, len(method), int(1000 * share)])
    counts = {"greedy": rng.binomial(1, share, 800), "sampled": rng.binomial(4, share, 800)}
    line = {"regime": regime, "method": method, "seed": seed, "trial": False}
    line["settings"] = {"demonstrations": 128, "steps": 60, "lr": 1e-4} | settings
    line["right"] = {name: "".join(map(str, values)) for name, values in counts.items()}
    line["tokens"] = {"sampled": 1000, "trained": 2000, "supervised": 500}
    line["curve"] = {"length": [30, 40, 50], "on_policy": [0.1, 0.4, 0.5], "hybrid": [0.9, 0.7, 0.6]}
    return line


@pytest.fixture(scope="module")
def stored() -> dict[str, list[dict]]:
    shares = {"rft": 0.5, "sft-rft": 0.6, "prefix-rft": 0.6, "sft": 0.4, "prefix-rft-all": 0.6}
    habit = [run_line(method, seed, share) for method, share in shares.items() for seed in range(3)]
    for seed, line in enumerate(records.runs_of(habit, "prefix-rft-all")):
        line["curve"] = {"length": [30, 60, 90 + seed]}
    few = [(512, 0.6), (8, 0.6), (2, 0.3)]
    scarce = [run_line("prefix-rft", i, share, "scarce", demonstrations=n) for n, share in few for i in range(3)]
    weak = [run_line("prefix-rft", seed, 0.4, "weak", expert="slips") for seed in range(3)]
    return {"habit": habit, "scarce": scarce, "weak": weak}


def claim(more: str, less: str = "", regime: str = "habit", what: str = "accuracy", enough: bool = False):
    return SimpleNamespace(more=more, less=less, regime=regime, what=what, level="all", enough=enough)


# ---- intervals


def test_the_interval_of_a_difference_by_hand():
    first, second = np.array([[1.0, 0.0, 1.0], [1.0, 1.0, 1.0]]), np.array([[0.0, 0.0, 1.0], [0.0, 1.0, 0.0]])
    # The mean scores of the two groups of runs differ by 1, 0 and 0.5 on the three problems, so the variance of the
    # mean difference is 0.25 / 3. The runs of the first group have the accuracies 2/3 and 1, those of the second
    # group 1/3 and 1/3.
    parts = [0.25 / 3, (1 / 3) ** 2 / 2 / 2]
    freedom = sum(parts) ** 2 / (parts[0] ** 2 / 2 + parts[1] ** 2 / 1)
    # the 97.5% quantiles of Student's t for 2.5 and 3 degrees of freedom are from a table
    quantile = np.interp(freedom, [2.5, 3], [3.558, 3.182])
    middle, low, high = difference(first, second)
    assert middle == pytest.approx(0.5) and 2.5 < freedom < 3
    assert high - middle == pytest.approx(quantile * sum(parts) ** 0.5, rel=0.01) == middle - low
    assert difference(first[:1], second) is None


def test_the_interval_covers_the_true_difference():
    rng, hits, draws = np.random.default_rng(0), 0, 400
    for _ in range(draws):
        problems = rng.normal(0, 1, 200)  # the random ease of each problem is shared by both methods
        # `liking` is how much easier each problem is for the first method than for the second
        liking = rng.normal(0, 0.5, 200)
        groups = []
        for sign in (1, -1):
            seeds = rng.normal(0, 0.2, (3, 1))
            chance = 1 / (1 + np.exp(-(problems + sign * liking / 2 + seeds)))
            groups.append((rng.random(chance.shape) < chance).astype(float))
        _, low, high = difference(*groups)
        hits += low <= 0 <= high  # the true difference of the methods is 0
    assert hits / draws >= 0.95 - 2.5 * (0.95 * 0.05 / draws) ** 0.5


# ---- verdicts


@pytest.mark.parametrize(
    ("actual", "enough", "want"),
    [
        ({}, False, "cannot be tested"),
        ({"greedy": (2, 1, 3), "T = 1": (1, -1, 3)}, False, "seen"),
        ({"greedy": (-2, -3, -1), "T = 1": (1, -1, 3)}, False, "opposite"),
        ({"greedy": (-2, -3, -1), "T = 1": (2, 1, 3)}, False, "split"),
        ({"greedy": (0, -1, 1), "T = 1": (1, -1, 3)}, False, "not seen"),
        ({"greedy": (0, -0.01, 0.02), "T = 1": (0, -0.01, 0.01)}, True, "seen"),
        ({"greedy": (0, -0.01, 0.02), "T = 1": (0.03, 0.0, 0.06)}, True, "not seen"),
        ({"greedy": (0, -0.01, 0.02), "T = 1": (0.1, 0.05, 0.15)}, True, "opposite"),
    ],
)
def test_verdicts(actual, enough, want):
    assert verdict(actual, enough) == want


def test_what_is_measured_for_a_claim(stored):
    def judge(*args, **kwargs):
        actual = measured(claim(*args, **kwargs), stored)
        return verdict(actual, kwargs.get("enough", False)), actual

    assert judge("prefix-rft", "rft")[0] == "seen" and judge("sft", "prefix-rft")[0] == "opposite"
    assert judge("prefix-rft", "luffy")[0] == "cannot be tested"
    result, actual = judge("prefix-rft-all", "prefix-rft", what="length")
    assert result == "seen" and actual["length"][0] == 91 - 50
    result, actual = judge("prefix-rft", what="lead")
    assert result == "seen" and actual["reward"][0] == pytest.approx((0.8 + 0.3 + 0.1) / 3)
    assert judge("prefix-rft", what="narrowing")[1]["reward"][0] == pytest.approx(0.8 - 0.1)
    assert judge("prefix-rft@512", "prefix-rft@2", "scarce", enough=True)[0] == "opposite"
    actual = judge("habit:prefix-rft", "prefix-rft@slips", "weak")[1]
    assert actual["greedy"][0] == pytest.approx(0.2, abs=0.05)


def test_ranks_are_told_where_one_failed_run_widens_the_interval():
    ours = [run_line("prefix-rft", seed, 0.7) for seed in range(5)]
    others = [run_line("rft", seed, 0.6 if seed else 0.1) for seed in range(5)]
    asked, stored = claim("prefix-rft", "rft"), {"habit": [*ours, *others]}
    actual = measured(asked, stored)
    assert actual["greedy"][1] < 0 < actual["greedy"][2]
    assert f"every run of prefix-rft is above, greedy, p = {2 / 252:.2g}" in by_ranks(asked, actual, stored)
    # a rank test of three runs against three cannot give p below 0.1, so by_ranks returns no sentence
    assert by_ranks(asked, actual, {"habit": [*ours[:3], *others[:3]]}) == ""


# ---- the second study


def horizon_line(method: str, base: int, accuracies: dict[str, float]) -> dict:
    scores = {name: {"all": value} for name, value in accuracies.items()}
    scores |= {"sampled": 1000, "trained": 2000, "supervised": 0, "seconds": 7}
    return {"cell": "habit-512", "method": method, "base": base, "trial": 0, "budgets": {"480": scores}}


def second_study(bases: int) -> dict[str, dict]:
    rng = np.random.default_rng(0)
    values = {
        (m, b): dict(zip(TEMPERATURES, rng.uniform(0.5, 0.6, 3))) for m in (OURS, *RIVALS[:2]) for b in range(bases)
    }
    return {f"{method}-{base}": horizon_line(method, base, actual) for (method, base), actual in values.items()}


def test_contrasts_are_those_of_students_t_over_bases():
    runs = horizon.run_frame(second_study(6))
    actual = horizon.contrast_frame(runs).loc[horizon.PRIMARY]
    at = runs[runs.temperature == "T = 0.6"].pivot(index="base", columns="method", values="accuracy")
    each = (at["prefix-rft"] - at["sft-rft"]).tolist()
    reach = 2.5706 * statistics.stdev(each) / 6**0.5
    mean, ends = statistics.mean(each), [actual[name] for name in ("mean", "low", "high")]
    assert actual["bases"] == 6 and ends == pytest.approx([mean, mean - reach, mean + reach], abs=1e-5)
    assert actual["p"] == pytest.approx(ttest_1samp(each, 0).pvalue)
    assert pd.isna(actual["holm"])  # Holm's correction covers only the contrasts that are not primary
    one = horizon.contrast_frame(horizon.run_frame(second_study(1))).loc[horizon.PRIMARY]
    assert pd.isna(one["low"]) and horizon.cell_of(one) == f"{100 * one['mean']:+.1f}"


def test_holm_stops_at_the_first_that_is_not_significant():
    actual = horizon.holm(pd.Series({"a": 0.04, "b": 0.001, "c": 0.03, "d": 0.012}))
    # Holm compares the p-values, from the smallest on, with 0.05 divided by 4, 3, 2 and 1
    assert actual.to_dict() == {"b": True, "d": True, "c": False, "a": False}


def test_the_report_and_the_figure_of_the_second_study_before_and_after_its_runs():
    text = horizon.report_text({})
    assert "0 runs" in text and "no base yet" in text
    stored = second_study(3)
    assert "3 of 6 bases" in horizon.report_text(stored)
    runs, axis = horizon.run_frame(stored), Figure().subplots()
    drawing.draw_contrast(axis, runs, "habit-512")
    (bars,) = (bars for bars in axis.containers if bars.get_label() == "− sft-rft")
    (bar,) = bars.lines[2][0].get_segments()
    drawn, contrast = [bars.lines[0].get_ydata()[0], *bar[:, 1]], horizon.contrast_frame(runs).loc[horizon.PRIMARY]
    assert drawn == pytest.approx([contrast[name] for name in ("mean", "low", "high")])


def test_runs_have_the_settings_of_the_best_trial_and_all_jobs_are_of_the_protocols_commit():
    stored = horizon.read_stored()
    for name, line in stored.items():
        assert line["commit"] == "c5e0165ecce8", name
        if line["method"] == "base" or line["trial"]:
            continue
        tuned_in = "silent-128" if line["cell"].startswith("silent") else "habit-512"
        trials = [stored[f"{tuned_in}-{line['method']}-trial{number}"] for number in (1, 2, 3, 4)]
        means = [statistics.mean(trial["budgets"]["480"][at]["all"] for at in TEMPERATURES) for trial in trials]
        assert line["settings"] == trials[means.index(max(means))]["settings"], name


# ---- tables, and what this repository holds


def test_tables_agree_with_the_runs(stored):
    def cells_of(table: str, name: str) -> list[str]:
        row = next(line for line in table.splitlines() if re.match(rf"\| {re.escape(name)} +\|", line))
        return [cell.strip() for cell in row.split("|")[2:-1]]

    lines = stored["habit"]
    for kind, samples in (("greedy", 1), ("sampled", 4)):
        counts = [list(map(int, line["right"][kind])) for line in records.runs_of(lines, "rft")]
        each = [100 * sum(right) / 800 / samples for right in counts]
        seeds, spread, easy = cells_of(report.accuracy_table(lines, kind), "rft")[:3]
        note = [float(number) for number in re.findall(r"[\d.]+", spread)]
        want = [statistics.mean(each), statistics.stdev(each), *each]
        assert seeds == "3" and note == pytest.approx(want, abs=0.051)
        assert float(easy) == pytest.approx(sum(sum(right[:200]) for right in counts) / 6 / samples, abs=0.051)
    assert cells_of(report.cost_table(lines), "rft")[1:] == ["1", "2", "0", "4"]
    assert cells_of(report.accuracy_table(stored["scarce"], "greedy"), "prefix-rft@8")[0] == "3"


def test_every_claim_names_runs_or_says_that_there_are_none():
    held, missing = records.read_store(), []
    for asked in claims.read_claims():
        for name in filter(None, (asked.more, asked.less)):
            missing += [name] * (not claims.group_of(held, asked.regime, name))
    assert missing == []
    assert len(claims.question_rows(held)) == 1 + 12


def test_the_stored_runs_their_scores_and_their_reports():
    held = records.read_store()
    for lines in held.values():
        for line in (line for line in lines if not line["trial"] and line["regime"] != records.CEILING):
            for kind in records.KINDS:
                for level, value in line["scores"][kind].items():
                    assert records.accuracies([line], kind, level) == pytest.approx(value, abs=1e-4)
    for line in held[records.CEILING]:
        for level, values in line["scores"].items():
            for name, value in values.items():
                tries = int(name.removeprefix("pass@"))
                assert records.solved([line], tries, level).mean() == pytest.approx(value, abs=1e-4)
    renew = "run: python results/report.py"
    readme = report.README.read_text(encoding="utf-8")
    assert report.with_questions(readme, held) == readme, renew
    assert (records.STUDY / "report.md").read_text(encoding="utf-8") == report.report_text(held), renew
    second = horizon.read_stored()
    assert (horizon.STORE / "report.md").read_text(encoding="utf-8") == horizon.report_text(second), renew
    with pytest.raises(ValueError, match="found no single pair"):
        report.with_questions("no place", held)
