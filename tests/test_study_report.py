"""results/: intervals, verdicts and tables of the study, against hand computation, simulation and the stored runs."""

import json
import re
import statistics
from pathlib import Path

import numpy as np
import pytest

from results import ceiling, claims, report
from results.claims import Claim, difference, measured, t_quantile, verdict
from results.drawing import draw_ablations, draw_all, draw_panels, question_panels
from results.protocol import REGIMES
from results.runs import pack_counts

STORE = Path("results/study")
VERDICTS = {"seen", "not seen", "opposite", "cannot be tested"}


def run_line(method: str, seed: int, share: float, regime: str = "habit", demonstrations: int = 128, **curve) -> dict:
    """A run that solves each problem, and each of 4 samples, with chance `share`."""
    rng = np.random.default_rng([seed, len(method), demonstrations, int(1000 * share)])
    right = {"greedy": rng.binomial(1, share, 800).tolist(), "sampled": rng.binomial(4, share, 800).tolist()}
    line = {"regime": regime, "method": method, "seed": seed, "trial": False, "made_of": {}, "probe": []}
    line["settings"] = {"demonstrations": demonstrations, "steps": 60, "lr": 1e-4}
    line["right"] = {name: pack_counts(counts) for name, counts in right.items()}
    line["counts"] = right  # for the tests alone
    line["scores"] = {"validation": {"greedy": share, "sampled": share}}
    line["tokens"] = {"sampled": 1000, "trained": 2000, "supervised": 500}
    line["curve"] = {"step": [10, 20, 30], "validation": [0.3, 0.4, share], "tokens": [1000, 2000, 3500]}
    line["curve"] |= {"length": [30, 40, 50], "entropy": [0.3, 0.2, 0.1]}
    line["curve"] |= {"on_policy": [0.1, 0.4, 0.5], "hybrid": [0.9, 0.7, 0.6]} | curve
    return line


@pytest.fixture(scope="module")
def stored() -> dict[str, list[dict]]:
    shares = {"rft": 0.5, "sft-rft": 0.6, "prefix-rft": 0.6, "sft": 0.4, "prefix-rft-all": 0.6}
    habit = [run_line(method, seed, share) for method, share in shares.items() for seed in range(3)]
    for seed, line in enumerate(line for line in habit if line["method"] == "prefix-rft-all"):
        line["curve"]["length"] = [30, 60, 90 + seed]
    scarce = [
        run_line("prefix-rft", seed, share, "scarce", number)
        for number, share in ((512, 0.6), (8, 0.6), (2, 0.3))
        for seed in range(3)
    ]
    weak = [run_line("prefix-rft", seed, 0.4, "weak") for seed in range(3)]
    for line in weak:
        line["settings"]["expert"] = "slips"
    trial = run_line("rft", 1000, 0.5) | {"trial": True}
    return {"habit": [*habit, trial], "silent": [], "scarce": scarce, "weak": weak}


# ---- intervals


def test_quantiles_of_students_t():
    known = {1: 12.706, 2: 4.3027, 4: 2.7764, 10: 2.2281, 60: 2.0003, 1000: 1.9623}  # any table
    for freedom, value in known.items():
        assert t_quantile(freedom) == pytest.approx(value, abs=2e-3)


def test_the_interval_of_a_difference_by_hand():
    first, second = np.array([[1.0, 0.0, 1.0], [1.0, 1.0, 1.0]]), np.array([[0.0, 0.0, 1.0], [0.0, 1.0, 0.0]])
    # by problem: 1, 0, 0.5 -> variance 0.25 / 3; runs of the first 2/3, 1, of the second 1/3, 1/3
    parts = [0.25 / 3, (1 / 3) ** 2 / 2 / 2]
    freedom = sum(parts) ** 2 / (parts[0] ** 2 / 2 + parts[1] ** 2 / 1)
    middle, low, high = difference(first, second)
    assert middle == pytest.approx(0.5)
    assert high - middle == pytest.approx(t_quantile(freedom) * sum(parts) ** 0.5, rel=1e-3) == middle - low
    assert difference(first[:1], second) is None


def test_the_interval_covers_the_true_difference():
    rng, hits, draws = np.random.default_rng(0), 0, 400
    for _ in range(draws):
        problems = rng.normal(0, 1, 200)  # how hard each is for both
        liking = rng.normal(0, 0.5, 200)  # how much easier it is for the first
        groups = []
        for sign in (1, -1):
            seeds = rng.normal(0, 0.2, (3, 1))
            chance = 1 / (1 + np.exp(-(problems + sign * liking / 2 + seeds)))
            groups.append((rng.random(chance.shape) < chance).astype(float))
        _, low, high = difference(*groups)
        hits += low <= 0 <= high  # the two are alike on average over problems and seeds
    assert hits / draws >= 0.95 - 2.5 * (0.95 * 0.05 / draws) ** 0.5


# ---- verdicts


@pytest.mark.parametrize(
    ("found", "equal", "want"),
    [
        ({}, False, "cannot be tested"),
        ({"greedy": (2, 1, 3), "T = 1": (1, -1, 3)}, False, "seen"),
        ({"greedy": (-2, -3, -1), "T = 1": (1, -1, 3)}, False, "opposite"),
        ({"greedy": (-2, -3, -1), "T = 1": (2, 1, 3)}, False, "not seen"),
        ({"greedy": (0, -1, 1), "T = 1": (1, -1, 3)}, False, "not seen"),
        ({"greedy": (0, -0.01, 0.02), "T = 1": (0, -0.01, 0.01)}, True, "seen"),
        ({"greedy": (0, -0.01, 0.02), "T = 1": (0.03, 0.0, 0.06)}, True, "not seen"),
        ({"greedy": (0, -0.01, 0.02), "T = 1": (0.1, 0.05, 0.15)}, True, "opposite"),
    ],
)
def test_verdicts(found, equal, want):
    assert verdict(Claim("", "", "habit", "rft", equal=equal), found) == want


def test_what_is_measured_for_a_claim(stored):
    def judge(**kwargs):
        claim = Claim("", "", **kwargs)
        found = measured(claim, stored)
        return verdict(claim, found), found

    habit = stored["habit"]
    assert judge(regime="habit", more="prefix-rft", less="rft")[0] == "seen"
    assert judge(regime="habit", more="sft", less="prefix-rft")[0] == "opposite"
    assert judge(regime="habit", more="prefix-rft", less="luffy")[0] == "cannot be tested"
    result, found = judge(regime="habit", more="prefix-rft-all", less="prefix-rft", what="length")
    assert result == "seen" and found["length"][0] == 91 - 50
    result, found = judge(regime="habit", more="prefix-rft", what="advantage")
    assert result == "seen" and found["reward"][0] == pytest.approx((0.8 + 0.3 + 0.1) / 3)
    result, found = judge(regime="habit", more="prefix-rft", what="narrowing")
    assert result == "seen" and found["reward"][0] == pytest.approx(0.8 - 0.1)
    assert judge(regime="scarce", more="prefix-rft@512", less="prefix-rft@2", equal=True)[0] == "opposite"
    assert judge(regime="scarce", more="prefix-rft@8", less="habit:rft")[0] == "seen"
    weaker = {"regime": "weak", "more": "habit:prefix-rft", "equal": True}
    assert judge(**weaker, less="prefix-rft@slips")[0] == "opposite"
    assert judge(**weaker, less="prefix-rft@short")[0] == "cannot be tested"
    result, found = judge(regime="habit", more="prefix-rft", less="rft", level="ood")
    counts = {
        m: [line["counts"]["greedy"][600:] for line in habit[:9] if line["method"] == m]
        for m in ("rft", "prefix-rft")
    }
    assert found["greedy"][0] == pytest.approx(np.mean(counts["prefix-rft"]) - np.mean(counts["rft"]))


def test_every_claim_has_a_source_a_regime_and_methods_of_it():
    sources = {claim.source for claim in claims.claims()}
    assert {"Table 1", "Tables 2, 6", "Table 8", "Figure 4", "Figure 6", "pass@2048", "[2604.23747]"} == sources
    known = {regime: chosen.methods for regime, chosen in REGIMES.items()} | {"ceiling": ceiling.METHODS}
    for claim in claims.claims():
        assert claim.why and claim.regime in known
        for name in filter(None, (claim.more, claim.less)):
            regime, _, rest = name.rpartition(":")
            assert rest.partition("@")[0] in known[regime or claim.regime], name


# ---- tables


def cells_of(table: str, name: str) -> list[str]:
    row = next(line for line in table.splitlines() if re.match(rf"\| {re.escape(name)} +\|", line))
    return [cell.strip() for cell in row.split("|")[2:-1]]


def test_tables_agree_with_the_runs(stored):
    lines = stored["habit"]
    for kind, samples in (("greedy", 1), ("sampled", 4)):
        each = [100 * sum(line["counts"][kind]) / 800 / samples for line in lines[:3]]
        easy = statistics.mean(100 * sum(line["counts"][kind][:200]) / 200 / samples for line in lines[:3])
        seeds, spread, first_level = cells_of(report.accuracy_table(lines, "habit", kind), "rft")[:3]
        told = [float(number) for number in re.findall(r"[\d.]+", spread)]
        assert seeds == "3" and told == pytest.approx(
            [statistics.mean(each), statistics.stdev(each), *each], abs=0.051
        )
        assert float(first_level) == pytest.approx(easy, abs=0.051)
    differences = cells_of(report.difference_table(lines, "habit"), "sft")
    means = {
        m: np.mean([line["counts"]["greedy"] for line in lines[:-1] if line["method"] == m])
        for m in ("sft", "sft-rft")
    }
    assert float(differences[2].split()[0]) == pytest.approx(100 * (means["sft"] - means["sft-rft"]), abs=0.051)
    assert cells_of(report.cost_table(lines, "habit"), "rft")[1:] == ["1", "2", "0", "4"]
    assert cells_of(report.accuracy_table(stored["scarce"], "scarce", "greedy"), "prefix-rft@8")[0] == "3"
    assert "rft" in report.trial_table(lines) and "1000" not in report.accuracy_table(lines, "habit", "greedy")


def test_the_report_is_written_and_the_rest_of_the_readme_stays(tmp_path, stored):
    for regime, lines in stored.items():
        (tmp_path / f"{regime}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{report.BEGIN}\nEARLIER\n{report.END}\nafter\n")
    written = report.write_report(tmp_path, readme)
    assert {path.name for path in written} == {"report.md", "main.png", "details.png", "questions.png", "README.md"}
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith(f"{report.END}\nafter\n") and "EARLIER" not in text
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")][1:]
    assert len(rows) == len(claims.claims()) and {row[-1].removesuffix(" |") for row in rows} <= VERDICTS
    assert report.with_verdicts(text, stored) == text
    readme.write_text("no place")
    with pytest.raises(ValueError, match="found no single pair"):
        report.write_report(tmp_path, readme)


def test_an_empty_store_has_no_report(tmp_path):
    with pytest.raises(ValueError, match="holds no runs"):
        report.write_report(tmp_path, None)


def test_figures_of_trials_alone_are_left_out(tmp_path, stored):
    assert draw_all({"habit": stored["habit"][-1:], "silent": [], "scarce": []}, tmp_path) == []


def test_an_ablation_with_a_single_run_has_no_bar(stored):
    """Its interval needs two; without any such ablation, or with one run of prefix-rft, there is no panel."""

    def panels(*groups: list[dict]) -> list:
        lines = [line for group in groups for line in group]
        return [p for p in question_panels({"habit": lines, "silent": [], "scarce": []}) if p.func is draw_ablations]

    one = [run_line("prefix-rft-low", 0, 0.5)]
    habit = stored["habit"]  # three runs of prefix-rft and of prefix-rft-all
    whole, clipless = (
        [line for line in habit if line["method"] == name] for name in ("prefix-rft", "prefix-rft-all")
    )
    assert not panels(whole, one) and not panels(whole[:1], clipless) and not panels(whole)
    found = panels(whole, clipless, one)
    assert len(found) == 2
    for panel in found:
        (axis,) = draw_panels([panel]).axes
        assert [text.get_text() for text in axis.get_xticklabels()] == ["all"] and len(axis.patches) == 1


# ---- what this repository holds


def test_the_stored_runs_their_scores_and_their_reports():
    held = report.read_store(STORE)
    for path in STORE.glob("*.jsonl"):
        assert all(len(line) <= 4096 for line in path.read_bytes().splitlines())
    for regime, lines in held.items():
        for line in lines:
            for kind in ("greedy", "sampled") if not line["trial"] and regime != ceiling.NAME else ():
                for level, value in line["scores"][kind].items():
                    assert claims.scores([line], kind, level).mean() == pytest.approx(value, abs=1e-4)
    for line in held[ceiling.NAME]:
        for level, values in line["scores"].items():
            for name, value in values.items():
                tries = int(name.removeprefix("pass@"))
                assert ceiling.solved([line], tries, level).mean() == pytest.approx(value, abs=1e-4)
    readme = report.README.read_text(encoding="utf-8")
    assert report.with_verdicts(readme, held) == readme, "run: python results/study.py report"
    if any(held.values()):
        assert (STORE / "report.md").read_text(encoding="utf-8") == report.report_text(held)
