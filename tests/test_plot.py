"""plot.py: figures of runs and evaluations are written; comparisons show the right numbers and refuse unlike ones."""

import json
import sys
from pathlib import Path

import pytest

import plot
from report import PUBLISHED, SIX, markdown_table, read_results, report
from stats import Answers, paired_difference

SETTINGS = {"model": "m", "temperature": 0.6}


def evaluation(folder: Path, right: dict[str, dict[str, int]], samples: int = 4, **settings) -> Path:
    """A finished evaluation in which problem i of benchmark b had right[b][i] right samples; p, r, x are easy."""
    folder.mkdir()
    answers = {
        name: [Answers(i, ("easy", "hard")[ord(i) % 2], samples, c, 10) for i, c in counts.items()]
        for name, counts in right.items()
    }
    report(folder, SETTINGS | settings, answers)
    return folder


@pytest.fixture
def two(tmp_path) -> list[Path]:
    a = evaluation(tmp_path / "a", {"aime24": {"p": 1, "q": 0, "r": 2, "s": 4}, "math500": {"x": 4, "y": 2}})
    b = evaluation(tmp_path / "b", {"aime24": {"s": 4, "r": 4, "q": 2, "p": 2}, "amc23": {"x": 1}}, temperature=1.0)
    return [a, b]


def run(monkeypatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["plot.py", *map(str, words)])
    try:
        plot.main()
    except SystemExit as stop:
        return stop.code
    return 0


def test_comparison_pairs_the_problems_by_id(two, tmp_path, monkeypatch, capsys):
    capsys.readouterr()
    assert run(monkeypatch, "--compare", *two, "--out", tmp_path / "c.png") == 0
    out = capsys.readouterr().out
    line = " ".join(next(line for line in out.splitlines() if line.startswith("| aime24 ")).split())
    first, second = [0.25, 0, 0.5, 1], [0.5, 0.5, 1, 1]
    middle, low, high = paired_difference(first, second)
    assert middle == pytest.approx(0.3125)
    assert (
        "| 43.8 [" in line
        and "| 75.0 [" in line
        and f"{100 * middle:+.1f} [{100 * low:.1f}, {100 * high:.1f}]" in line
    )
    assert "| aime24: easy " in out and "math500" not in out
    assert "Not alike: temperature (a 0.6, b 1.0)" in out
    assert (tmp_path / "c.png").stat().st_size > 20_000


def test_published_rows_are_marked_as_published(two, tmp_path, monkeypatch, capsys):
    capsys.readouterr()
    assert run(monkeypatch, "--compare", two[0], "--beside-paper", "--out", tmp_path / "c.png") == 0
    lines = capsys.readouterr().out.splitlines()
    published = [line for line in lines if line.startswith("| published, not ours: ")]
    assert len(published) == len(PUBLISHED)
    row = next(line for line in published if "ours: Prefix-RFT" in line).replace(" ", "").split("|")
    assert row[2:-1] == ["31.8", "26.4", "68.2", "88.4", "40.3", "55.7", "39.1", "52.1", "51.8"]
    ours = next(line for line in lines if line.startswith("| a  ")).replace(" ", "").split("|")
    assert ours[2:-1] == ["43.8", "", "", "75.0", "", "", "", "", ""]
    averages = [line.replace(" ", "").split("|")[-2] for line in published]
    assert averages == ["19.0", "44.1", "45.5", "48.2", "40.1", "44.2", "47.8", "50.1", "51.8"]


def test_the_published_averages_are_those_of_the_accuracies():
    """To the paper's rounding; UFT has an average only."""
    assert [len(found) for found, _ in PUBLISHED.values()] == [6, 6, 6, 6, 6, 0, 6, 6, 8]
    for method, (found, average) in PUBLISHED.items():
        assert not found or sum(found[: len(SIX)]) / 6 == pytest.approx(average, abs=0.06), method


def test_results_have_an_average_over_benchmarks(two):
    average = read_results(two[0])["average"]
    assert average["accuracy"] == pytest.approx((0.4375 + 0.75) / 2)
    assert average["low"] < average["accuracy"] < average["high"]


def test_unlike_evaluations_are_refused_in_one_line(two, tmp_path, monkeypatch, capsys):
    other = evaluation(tmp_path / "other", {"minerva": {"x": 1, "y": 1}})
    fewer = evaluation(tmp_path / "fewer", {"aime24": {"p": 1, "q": 0, "r": 2}})
    (tmp_path / "empty").mkdir()
    for folders, said in (
        ([two[0], other], "no benchmark in common (a: aime24, math500; other: minerva)"),
        ([two[0], fewer], "a and fewer were evaluated on other problems of aime24"),
        ([tmp_path / "empty"], "empty is not a finished evaluation: no results.json"),
    ):
        capsys.readouterr()
        assert run(monkeypatch, "--compare", *folders, "--out", tmp_path / "c.png") == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1
    assert run(monkeypatch, two[0], "--beside-paper") == 2
    assert run(monkeypatch, tmp_path / "empty") == 2
    assert "not a run folder with steps" in capsys.readouterr().err
    assert not (tmp_path / "c.png").exists()


def test_one_sample_a_problem_is_drawn_as_bars(tmp_path):
    folder = evaluation(tmp_path / "one", {"math500": {"x": 1, "y": 0}}, samples=1)
    assert (folder / "passk.png").stat().st_size > 5_000


def test_curves_of_runs(tmp_path):
    folders = [tmp_path / "x", tmp_path / "y"]
    for folder in folders:
        folder.mkdir()
        rows = [{"step": s, "reward_on_policy": 0.1 * s, "entropy": 1.0, "eval_hard": 0.2} for s in (1, 2, 3)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folders[0] / "eval.json").write_text(json.dumps({"base": {"validation": {"hard": {"accuracy": 0.1}}}}))
    assert plot.draw(folders[:1], tmp_path / "one.png").stat().st_size > 10_000
    assert plot.draw(folders, tmp_path / "both.png").stat().st_size > 10_000
    assert plot.points(plot.read_run(folders[0]), "eval_hard") == ([0, 1, 2, 3], [0.1, 0.2, 0.2, 0.2])
    assert plot.smooth([1.0, 3.0, 5.0], 2) == [1.0, 2.0, 4.0]


def test_markdown_tables_are_aligned():
    assert markdown_table([["a", "b"], ["long", "1"]]) == "| a    | b |\n|------|--:|\n| long | 1 |\n"
