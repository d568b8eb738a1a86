"""results/ceiling.py: which models are measured, what is stored of each, what the report says, with few problems."""

import itertools
import json
import statistics
import sys
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from data.make_recipes import make_splits
from evaluation.statistics import interval
from results import ceiling, claims, protocol, report, runs, stored, study
from results.protocol import common
from results.runs import Spec


def run_line(method: str, seed: int = 0, **settings) -> dict:
    """A stored run of habit."""
    line = {"regime": "habit", "method": method, "seed": seed, "trial": False, "scores": {}, "made_of": {"base": "a"}}
    line["right"] = dict.fromkeys(("greedy", "sampled"), runs.pack_counts([0] * 800))
    line["tokens"] = {"sampled": 0, "trained": 0, "supervised": 0}
    line["curve"] = {"step": [1], "validation": [0], "tokens": [0]}
    if method == "base":
        return line | {"settings": {}}
    return line | {"settings": common("habit") | settings, "probe": [[1.0]]}


def ceiling_line(method: str, seed: int, right: list[int]) -> dict:
    return run_line(method, seed) | {"regime": "ceiling", "right": right, "probe": []}


@pytest.fixture
def store(tmp_path, monkeypatch):
    """A folder of results with a base and three runs, where a model is measured at once; .made: which were."""
    monkeypatch.setattr(runs, "made_of", lambda regime: {"base": "a"})
    monkeypatch.setattr(ceiling, "RUNS", tmp_path)
    monkeypatch.setattr(ceiling, "make_problems", lambda: None)
    lines = [run_line("base"), run_line("rft", lr=1e-4), run_line("rft", 1, lr=1e-4), run_line("sft")]
    write(tmp_path / "habit.jsonl", lines)
    for line in lines:
        (tmp_path / runs.spec_of(line).name / "final").mkdir(parents=True)
    made: list[str] = []

    def at_once(function, specs, jobs, unit):
        for spec in specs:
            made.append(f"{spec.method} {spec.seed}")
            line = run_line(spec.method, spec.seed) | {
                "regime": "ceiling",
                "settings": spec.settings,
                "right": [0] * 200,
            }
            yield spec, line | {"scores": {"all": {"pass@1": 0.1, "pass@256": 0.5}}}

    monkeypatch.setattr(study, "in_processes", at_once)
    return tmp_path, made


def write(path, lines: list[dict]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_the_problems_are_hard_and_fresh(tmp_path, monkeypatch):
    monkeypatch.setattr(ceiling, "RUNS", tmp_path)
    (tmp_path / "data").mkdir()
    rows = [json.loads(text) for text in ceiling.make_problems().read_text().splitlines()]
    assert [level for level, _ in itertools.groupby(row["level"] for row in rows)] == ["hard", "ood"]
    assert Counter(row["problem"].count(";") for row in rows) == dict.fromkeys((5, 6, 7, 8), 50)
    assert {row["problem"] for row in rows} <= {row["problem"] for row in protocol.test_rows()}
    assert not {row["problem"] for row in rows} & {
        row["problem"] for split in make_splits().values() for row in split
    }


def test_a_model_is_measured_once_and_again_when_its_run_is_made_anew(store):
    folder, made = store
    study.measure_ceiling(folder, ["base", "rft"], [0], 1)
    study.measure_ceiling(folder, ["base", "rft", "sft"], [0], 1)
    assert made == ["base 0", "rft 0", "sft 0"]
    study.measure_ceiling(folder, ["base", "rft"], [0, 1], 1)
    assert made[3:] == ["rft 1"]

    lines = [run_line("base"), run_line("rft", lr=1e-4) | {"probe": [[2.0]]}, run_line("sft", lr=3.0)]
    write(folder / "habit.jsonl", lines)
    (folder / runs.spec_of(lines[2]).name / "final").mkdir(parents=True)
    study.measure_ceiling(folder, ["base", "rft", "sft"], [0], 1)
    assert made[4:] == ["rft 0", "sft 0"]
    found = stored.check_stored(folder / "ceiling.jsonl", "habit")
    assert sorted(map(ceiling.who, found)) == [("base", 0), ("rft", 0), ("rft", 1), ("sft", 0)]


def test_what_is_missing_is_named_with_the_command_that_makes_it(store):
    folder, made = store
    with pytest.raises(ValueError, match="run --regime habit --methods sft-rft --seeds 2"):
        study.measure_ceiling(folder, ["sft-rft"], [2], 1)
    spec = runs.spec_of(run_line("rft", lr=1e-4))
    (folder / spec.name / "final").rmdir()
    with pytest.raises(ValueError) as error:
        study.measure_ceiling(folder, ["base", "rft"], [0], 1)
    assert "python train.py --data " in str(error.value) and f"--out {folder / spec.name}" in str(error.value)
    assert "--lr 0.0001" in str(error.value) and "\n" not in str(error.value)
    assert made == [] and not (folder / "ceiling.jsonl").exists()
    (folder / spec.name / "final").mkdir()
    study.measure_ceiling(folder, ["rft"], [0], 1)
    (folder / spec.name / "final").rmdir()
    study.measure_ceiling(folder, ["rft"], [0], 1)  # its line is enough
    assert made == ["rft 0"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--methods", "luffy"], "method 'luffy': ceiling is measured of base, sft"),
        (["--regime", "silent"], "leave --regime out"),
        (["--quick"], "--quick chooses"),
    ],
)
def test_bad_words_are_one_line(words, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["study.py", "ceiling", *words])
    monkeypatch.setattr(study, "make_data", lambda regimes: pytest.fail("wrote data"))
    with pytest.raises(SystemExit) as stop:
        study.main()
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and error.count("\n") == 1


def test_the_line_of_a_model(tmp_path, monkeypatch):
    """Of the base, 8 samples of two hard problems and two ood ones."""
    monkeypatch.setattr(ceiling, "RUNS", tmp_path)
    monkeypatch.setattr(ceiling, "made_of", lambda regime: {"base": "a"})
    monkeypatch.setattr(ceiling, "PROBLEMS", 2)
    monkeypatch.setattr(ceiling, "SAMPLES", 8)
    monkeypatch.setattr(ceiling, "TRIES", (1, 8))
    (tmp_path / "data").mkdir()
    ceiling.make_problems()
    line = ceiling.ceiling_line(Spec("habit", "base", 0, {}))
    assert line["regime"] == "ceiling" and len(line["right"]) == 4 and set(line["right"]) <= set(range(9))
    assert line["scores"]["hard"]["pass@1"] == pytest.approx(sum(line["right"][:2]) / 16, abs=1e-4)
    assert line["scores"]["all"]["pass@8"] == sum(count > 0 for count in line["right"]) / 4
    scores = {level: {f"pass@{2**i}": 0.1234 for i in range(9)} for level in ("hard", "ood", "all")}
    longest = line | {"right": [256] * 200, "scores": scores}
    assert len(json.dumps(longest)) < 3000  # with the run's settings and probe below 4 KB


# ---- the report


def test_pass_at_k_of_stored_counts():
    right = [0, 1, 128, 256] * 50  # 0 to 99 are hard, the others ood
    found = ceiling.solved([ceiling_line("rft", 0, right)], 2)
    both_wrong = [1, 255 / 256 * 254 / 255, 128 / 256 * 127 / 255, 0]
    np.testing.assert_allclose(found[0], [1 - p for p in both_wrong] * 50)
    assert ceiling.solved([ceiling_line("rft", 0, [256] * 100 + [0] * 100)], 1, "ood").sum() == 0


def test_the_table_and_the_claim():
    base = [ceiling_line("base", 0, [0] * 150 + [3] * 50)]
    better = [ceiling_line("prefix-rft", seed, [0] * (60 + seed) + [9] * (140 - seed)) for seed in range(3)]
    worse = [ceiling_line("rft", seed, [0] * (170 + seed) + [200] * (30 - seed)) for seed in range(3)]
    table = report.ceiling_table([*base, *better, *worse])
    rows = {
        row.split("|")[1].strip(): [cell.strip() for cell in row.split("|")[2:-1]] for row in table.splitlines()[2:]
    }
    assert list(rows) == ["base", "rft", "prefix-rft"] and rows["base"][-1] == "–"
    assert rows["prefix-rft"][0] == "3" and rows["prefix-rft"][-1].startswith("+44.5 [")  # (140 + 139 + 138) / 6 - 25
    assert rows["base"][5].startswith("25.0 [") and rows["base"][7].startswith("50.0 [")
    assert rows["base"][6].startswith("0.0 [0.0, ") and rows["base"][6] != "0.0 [0.0, 0.0]"

    claim = next(c for c in claims.claims() if c.what == "pass@256" and c.less == "base")
    found = claims.measured(claim, {"ceiling": [*base, *better]})
    assert claims.verdict(claim, found) == "seen" and found["pass@256"][0] == pytest.approx(0.445)
    one = {"ceiling": [*base, better[0]]}
    assert claims.measured(claim, one) == {} and "too few seeds" in claims.evidence(claim, {}, one)
    other = replace(claim, more="rft")
    assert claims.verdict(other, claims.measured(other, {"ceiling": [*base, *worse]})) == "opposite"


def test_intervals_of_a_mean_hold_problems_and_seeds():
    rng = np.random.default_rng(0)
    problems = (rng.random(200) < 0.4).astype(float)
    one = claims.mean_interval(problems[None])
    assert one == pytest.approx((problems.mean(), *interval(problems)))
    same = claims.mean_interval(np.stack([problems] * 3))
    assert same == pytest.approx(one)  # seeds that are all alike add nothing
    runs = np.stack([problems, problems, np.minimum(problems + 0.3, 1)])
    mid, low, high = claims.mean_interval(runs)
    seeds = 4.303 * statistics.stdev(runs.mean(1)) / 3**0.5
    near, far = interval(runs.mean(0))
    assert high - mid == pytest.approx(((far - mid) ** 2 + seeds**2) ** 0.5, rel=1e-3)
    assert mid - low == pytest.approx(((mid - near) ** 2 + seeds**2) ** 0.5, rel=1e-3)
