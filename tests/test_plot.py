"""These tests check that the figures of plot.py show the right numbers, and that plot.py refuses to draw runs or
evaluations of different problems together.

The figure of a group of rollouts is tested in test_group.py."""

import json
import sys
from pathlib import Path

import pytest
from matplotlib.axes import Axes

import plot
from eval import report
from evaluation.report import PUBLISHED, SIX, markdown_table, problem_scores, read_results
from evaluation.statistics import Answers, natural_order, paired_difference, summarize
from figures import curves
from sample import prefix_fraction, prefix_range, torch_generator
from support.config import Config

SETTINGS = {"model": "m", "temperature": 0.6}


def evaluation(folder: Path, right: dict[str, dict[str, int]], samples: int = 4, **settings) -> Path:
    """Makes the folder of a finished evaluation. Problem i of benchmark b has right[b][i] right samples. A problem's
    id decides its level: p, r and x are easy, q and s are hard."""
    folder.mkdir()
    answers = {
        name: [Answers(i, ("easy", "hard")[ord(i) % 2], samples, c, c, 10) for i, c in counts.items()]
        for name, counts in right.items()
    }
    report(folder, SETTINGS | settings, answers)
    return folder


@pytest.fixture
def two(tmp_path) -> list[Path]:
    a = evaluation(tmp_path / "a", {"aime24": {"p": 1, "q": 0, "r": 2, "s": 4}, "math500": {"x": 4, "y": 2}})
    b = evaluation(tmp_path / "b", {"aime24": {"s": 4, "r": 4, "q": 2, "p": 2}, "amc23": {"x": 1}}, temperature=1.0)
    return [a, b]


def run_folder(folder: Path, rows: list[dict]) -> Path:
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


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


def test_partial_rewards_are_kept_and_paired(two, tmp_path, monkeypatch, capsys):
    """Accuracies and differences come from mean rewards, but pass@k comes from counts of right samples, even when the
    results are read back from their folder."""
    levels = {"p": "easy", "q": "hard", "r": "easy", "s": "hard"}
    # `rewards` has the sum over each problem's four samples, and `right` the number of samples with reward 1
    rewards = {"p": 1.5, "q": 0.75, "r": 2.0, "s": 4.0}
    right = {"p": 1, "q": 0, "r": 2, "s": 4}
    answers = [Answers(i, levels[i], 4, right[i], rewards[i], 10) for i in rewards]
    (tmp_path / "partial").mkdir()
    other = [Answers("x", "easy", 4, 0, 1.0, 10)]
    report(tmp_path / "partial", SETTINGS, {"aime24": answers, "minerva": other})
    results = read_results(tmp_path / "partial")
    assert results["rewards"]["aime24"] == {"easy": {"p": 1.5, "r": 2.0}, "hard": {"q": 0.75, "s": 4.0}}
    assert results["average"]["accuracy"] == (8.25 / 16 + 0.25) / 2
    assert "rewards" not in read_results(two[0])  # results.json has no "rewards" if every reward is 0 or 1
    assert problem_scores(results, "aime24", "all") == {"p": 0.375, "q": 0.1875, "r": 0.5, "s": 1}
    assert problem_scores(results, "aime24", "all", 1) == problem_scores(read_results(two[0]), "aime24", "all")
    capsys.readouterr()
    assert run(monkeypatch, "--compare", two[0], tmp_path / "partial", "--out", tmp_path / "c.png") == 0
    middle, low, high = paired_difference([0.25, 0, 0.5, 1], [0.375, 0.1875, 0.5, 1])
    expected = f"{100 * middle:+.1f} [{100 * low:.1f}, {100 * high:.1f}]"
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("| aime24  "))
    line = " ".join(line.split())
    assert "| 43.8 [" in line and "| 51.6 [" in line and expected in line and expected.startswith("+7.8")


def test_published_rows_are_marked_as_published(two, tmp_path, monkeypatch, capsys):
    capsys.readouterr()
    assert run(monkeypatch, "--compare", two[0], "--beside-paper", "--out", tmp_path / "c.png") == 0
    lines = capsys.readouterr().out.splitlines()
    published = [line for line in lines if line.startswith("| published, not ours: ")]
    assert len(published) == len(PUBLISHED)
    row = next(line for line in published if "ours: Prefix-RFT" in line).replace(" ", "").split("|")
    assert row[2:-1] == ["31.8", "26.4", "68.2", "88.4", "40.3", "55.7", "84.0", "39.1", "52.1", "51.8"]
    ours = next(line for line in lines if line.startswith("| a  ")).replace(" ", "").split("|")
    assert ours[2:-1] == ["43.8", "", "", "75.0", "", "", "", "", "", ""]
    averages = [line.replace(" ", "").split("|")[-2] for line in published]
    assert averages == ["19.0", "44.1", "45.5", "48.2", "40.1", "44.2", "47.8", "50.1", "51.8"]


def test_the_published_averages_are_those_of_the_accuracies():
    """Each published average is the mean of the published accuracies, up to rounding. For UFT the paper gives only an
    average."""
    assert [len(result) for result, _ in PUBLISHED.values()] == [6, 6, 6, 6, 6, 0, 6, 6, 9]
    for method, (result, average) in PUBLISHED.items():
        assert not result or sum(result[: len(SIX)]) / 6 == pytest.approx(average, abs=0.06), method


def test_results_have_an_average_over_benchmarks(two):
    average = read_results(two[0])["average"]
    assert average["accuracy"] == pytest.approx((0.4375 + 0.75) / 2)
    assert average["low"] < average["accuracy"] < average["high"]


def test_unlike_evaluations_are_refused_in_one_line(two, tmp_path, monkeypatch, capsys):
    other = evaluation(tmp_path / "other", {"minerva": {"x": 1, "y": 1}})
    fewer = evaluation(tmp_path / "fewer", {"aime24": {"p": 1, "q": 0, "r": 2}})
    (tmp_path / "empty").mkdir()
    for folders, message in (
        ([two[0], other], "no benchmark in common (a: aime24, math500; other: minerva)"),
        ([two[0], fewer], "a and fewer used different problems of aime24"),
        ([tmp_path / "empty"], "empty is not a finished evaluation: no results.json"),
    ):
        capsys.readouterr()
        assert run(monkeypatch, "--compare", *folders, "--out", tmp_path / "c.png") == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    assert run(monkeypatch, two[0], "--beside-paper") == 2
    assert run(monkeypatch, tmp_path / "empty") == 2
    assert "not a run folder with steps" in capsys.readouterr().err
    assert not (tmp_path / "c.png").exists()


def test_other_numbers_of_samples_are_told(two, tmp_path, monkeypatch, capsys):
    changed = json.loads((two[1] / "results.json").read_bytes())
    changed["settings"]["benchmarks"] = {"aime24": {"sha256": "0123456789"}}
    (two[1] / "results.json").write_text(json.dumps(changed))
    assert run(monkeypatch, "--compare", *two, "--out", tmp_path / "c.png") == 0
    assert "Not alike: file of aime24 (a , b 01234567)" in capsys.readouterr().out
    half = evaluation(tmp_path / "half", {"aime24": {"p": 1, "q": 0, "r": 2, "s": 2}}, samples=2)
    capsys.readouterr()
    assert run(monkeypatch, "--compare", two[0], half, "--out", tmp_path / "c.png") == 0
    note = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Not alike")]
    assert note == ["Not alike: samples of aime24 (a 4, half 2)"]


def test_a_folder_given_twice_is_refused(tmp_path, monkeypatch, capsys):
    (tmp_path / "b").mkdir()
    assert run(monkeypatch, "--compare", tmp_path / "a", tmp_path / "b" / ".." / "a") == 2
    error = capsys.readouterr().err
    assert "a is given twice" in error and error.count("\n") == 1


def test_damaged_files_are_named_in_one_line(tmp_path, monkeypatch, capsys):
    log = run_folder(tmp_path / "x", [{"step": 1, "entropy": 1.0}]) / "metrics.jsonl"
    results, scores = tmp_path / "a" / "results.json", tmp_path / "x" / "eval.json"
    config = tmp_path / "x" / "config.json"
    results.parent.mkdir()
    for file, text, message in (
        (results, '{"settings": {', f"{results}: not valid JSON"),
        (results, "{}", f"{results}: found {{}}, expected a JSON object with results, right, settings"),
        (scores, '{"base": {', f"{scores}: not valid JSON"),
        (scores, '{"base": {"validation": {"all": {}}}}', f"{scores}: base validation all: found {{}}, expected"),
        (config, "[1]", f"{config}: found [1], expected a JSON object"),
        (log, '{"entropy": 1.0}\n', f'{log}:1: found {{"entropy": 1.0}}, expected a JSON object with step'),
        (log, log.read_text() + '{"step": 2, "ent\n', f"{log}:2: not valid JSON"),
        (log, "3\n", f"{log}:1: found 3, expected a JSON object"),
        (log, '{"step": 1, "los', f"{tmp_path / 'x'} is not a run folder with steps in it: metrics.jsonl has no"),
        (log, '{"step": 1}\n', f"{tmp_path / 'x'}: metrics.jsonl has steps, but no metrics to draw"),
    ):
        for other in (scores, config):
            other.unlink(missing_ok=True)
        file.write_text(text)
        capsys.readouterr()
        words = ["--compare", results.parent] if file == results else [tmp_path / "x"]
        assert run(monkeypatch, *words, "--out", tmp_path / "c.png") == 2
        error = capsys.readouterr().err
        assert error.startswith(f"plot.py: {message}") and error.count("\n") == 1
    assert not (tmp_path / "c.png").exists()


def test_a_run_with_skipped_updates_and_nothing_to_average_is_drawn(tmp_path, monkeypatch):
    """If all updates of a step are skipped, metrics.jsonl has 0 for their loss and null for a mean over no values."""
    rows = [{"step": 1, "loss": 0.1, "grad_norm": 1.0, "entropy": 0.5, "reward_hybrid": 1.0, "eval_all": None}]
    rows += [{"step": 2, "loss": 0.0, "grad_norm": 0.0, "entropy": None, "reward_hybrid": None, "skipped_updates": 2}]
    folder = run_folder(tmp_path / "x", rows)
    (folder / "eval.json").write_text(json.dumps({"base": {"validation": {}, "test": {}, "test_sampled": {}}}))
    assert run(monkeypatch, folder) == 0 and (folder / "curves.png").stat().st_size > 5_000


def test_a_target_that_cannot_be_written_is_named_and_nothing_is_left(tmp_path, monkeypatch, capsys):
    folder = run_folder(tmp_path / "x", [{"step": 1, "entropy": 1.0}])
    (tmp_path / "file").write_text("")
    (tmp_path / "data").mkdir()
    before = sorted(tmp_path.rglob("*"))
    with monkeypatch.context() as patch:
        patch.setattr(plot, "draw", None)  # a wrong --out is refused before anything is drawn
        for out, message in (
            ("data", "is a folder"),
            ("file/c.png", "is a file"),
            ("c.foo", "as .foo"),
            ("c.pgf", "as .pgf"),
        ):
            assert run(patch, folder, "--out", tmp_path / out) == 2
            error = capsys.readouterr().err
            assert error.startswith(f"plot.py: {tmp_path / out}") and message in error and error.count("\n") == 1
    (folder / "curves.png").mkdir()
    assert run(monkeypatch, folder) == 1
    assert f"writing to {folder / 'curves.png'} failed (Is a directory)" in capsys.readouterr().err
    (folder / "curves.png").rmdir()
    assert sorted(tmp_path.rglob("*")) == before
    # plot.py makes the figure's folder if it does not exist
    assert run(monkeypatch, folder, "--out", tmp_path / "new" / "c.png") == 0


def test_a_dollar_in_a_name_is_a_dollar(tmp_path, monkeypatch):
    name = "$^$"  # matplotlib cannot read $^$ as a formula
    log = [{"step": step, f"eval_{name}": 0.5, "eval_all": 0.5} for step in (1, 2)]
    runs = [with_base(run_folder(tmp_path / (name + i), log), **{name: 2, "all": 2}) for i in "ab"]
    for samples in (1, 4):
        result = evaluation(tmp_path / f"{name}{samples}", {name: {"x": 1, "y": 0}}, samples=samples)
        assert run(monkeypatch, "--compare", result, "--out", tmp_path / "c.png") == 0
    assert run(monkeypatch, runs[0]) == run(monkeypatch, *runs, "--out", tmp_path / "c.png") == 0


def test_several_runs_and_comparisons_have_files_of_their_own(two, tmp_path, monkeypatch, capsys):
    runs = [run_folder(tmp_path / name, [{"step": 1, "entropy": 1.0}]) for name in "xy"]
    monkeypatch.chdir(tmp_path)
    for words, file in (
        (runs, "curves.png"),
        (["--compare", *two], "compare.png"),
        (runs[:1], runs[0] / "curves.png"),
    ):
        assert run(monkeypatch, *words) == 0
        assert capsys.readouterr().out.splitlines()[-1] == str(file) and (tmp_path / file).exists()


def test_one_sample_a_problem_is_drawn_as_bars(tmp_path):
    folder = evaluation(tmp_path / "one", {"math500": {"x": 1, "y": 0}}, samples=1)
    assert (folder / "passk.png").stat().st_size > 5_000


# ---- curves of runs

LOGGED = [
    {"step": s, "reward_on_policy": 0.1 * s, "entropy": 1.0, "eval_hard": 0.2, "eval_all": 0.25 * s}
    for s in (1, 2, 3)
]


def with_base(folder: Path, **problems: int) -> Path:
    """Writes an eval.json in which the base model's validation accuracy is 10% in every level of difficulty."""
    table = {level: {"accuracy": 0.1, "low": 0.05, "high": 0.2, "problems": n} for level, n in problems.items()}
    (folder / "eval.json").write_text(json.dumps({"base": {"validation": table}}))
    return folder


def panels_of(monkeypatch, *folders: Path) -> dict[str, Axes]:
    """Returns the panels of the figure that plot.draw makes, by title."""
    figures = []
    monkeypatch.setattr(curves, "save", lambda figure, target: figures.append(figure))
    plot.draw(list(folders), Path("sheet.png"))
    return {axis.get_title("left"): axis for axis in figures[0].axes}


def lines_of(axis: Axes) -> dict[str, tuple[list, list]]:
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axis.lines}


def bands_of(axis: Axes) -> list[set[tuple[float, float]]]:
    """Returns the corners of each shaded band."""
    return [{tuple(xy.round(6).tolist()) for xy in band.get_paths()[0].vertices} for band in axis.collections]


def test_the_base_stands_at_step_0_and_steps_to_a_share_counts_it(tmp_path):
    folder = with_base(run_folder(tmp_path / "x", LOGGED), hard=50, all=100)
    loaded = curves.read_run(folder)
    assert [(step, value) for step, value, *_ in curves.evaluations(loaded, "hard")] == [
        (0, 0.1),
        (1, 0.2),
        (2, 0.2),
        (3, 0.2),
    ]
    reached = {share: curves.steps_to(loaded, share) for share in (0.1, 0.26, 0.5, 0.75, 0.76)}
    assert reached == {0.1: 0, 0.26: 2, 0.5: 2, 0.75: 3, 0.76: None}
    assert curves.smooth([1.0, 3.0, 5.0], 2) == [1.0, 2.0, 4.0]


def test_accuracy_has_its_interval_and_its_number_of_problems(tmp_path, monkeypatch):
    rows = [
        {"step": 5, "eval_hard": 0.5, "eval_hard_low": 0.4, "eval_hard_high": 0.7, "eval_low": 0.3, "eval_all": 0.4}
    ]
    folder = with_base(run_folder(tmp_path / "x", rows), hard=50, low=10, all=60)
    # a level of difficulty can be named "low", although eval_hard_low is an interval's lower end
    assert curves.levels([curves.read_run(folder)]) == ["hard", "low", "all"]
    panel = panels_of(monkeypatch, folder)["validation accuracy, greedy"]
    assert lines_of(panel)["hard, 50 problems"] == ([0, 5], [0.1, 0.5])
    assert bands_of(panel) == [{(0, 0.05), (0, 0.2), (5, 0.4), (5, 0.7)}]
    assert panel.get_ylim() == (0, 1) and panel.get_ylabel() == "% right"


def test_the_axis_counts_tokens_only_if_runs_with_and_without_supervised_steps_are_compared(tmp_path, monkeypatch):
    sft = [{"step": s, "trained_tokens": 400, "eval_all": 0.1 * s} for s in (1, 2)]
    rft = [{"step": 3, "reward": 0.5, "sampled_tokens": 900, "trained_tokens": 200, "eval_all": 0.4}]
    rft[0]["relift_tokens"] = 100  # ReLIFT's supervised update within the step
    both, alone = run_folder(tmp_path / "both", sft + rft), run_folder(tmp_path / "alone", rft)
    panel = panels_of(monkeypatch, both, alone)["validation accuracy: all"]
    curves_drawn = [list(line.get_xdata()) for line in panel.lines[:3]]
    # the first run's accuracies, the dotted line at the end of its SFT stage, the second run's accuracy
    assert curves_drawn == [[0.4, 0.8, 2.0], [0.8, 0.8], [1.2]] and panel.get_xlim() == (0, 2)
    assert panel.get_xlabel() == "tokens sampled and trained, in 1000"
    for folders in ([both], [alone, alone]):
        panel = next(iter(panels_of(monkeypatch, *folders).values()))
        assert panel.get_xlabel() == "step" and panel.get_xlim() == (0, 3)


def test_levels_stand_in_their_natural_order():
    assert natural_order(["10 terms", "2 terms", "3 terms", "2 terms"]) == ["2 terms", "3 terms", "10 terms"]
    assert natural_order(["ood", "hard", "easy", "medium"]) == ["easy", "medium", "hard", "ood"]
    assert natural_order(["Physics", "Algebra"]) == ["Physics", "Algebra"]
    table = summarize([Answers(str(i), f"level {i}", 1, 1, 1) for i in (10, 9, 1)])
    assert list(table) == ["level 1", "level 9", "level 10", "all"]


@pytest.mark.parametrize("schedule", ["cosine", "uniform", "constant", "uft"])
@pytest.mark.parametrize("step", [0, 20, 50, 99])
def test_the_range_of_the_schedule_holds_what_is_drawn_and_no_more(schedule, step):
    low, high = prefix_range(step, 100, schedule)
    generator = torch_generator("range", schedule, step)
    drawn = [prefix_fraction(step, 100, schedule, generator) for _ in range(1000)]
    assert low <= min(drawn) and max(drawn) <= high
    # the chance that none of 1000 uniform draws is in the first fiftieth of the range is (1 - 1/50)^1000 = 2e-9
    if schedule != "uft":
        assert min(drawn) - low <= (high - low) / 50 and high - max(drawn) <= (high - low) / 50


def test_noise_does_not_fill_a_panel(tmp_path, monkeypatch):
    rows = [
        {"step": s, "reward": 0, "truncated": 0.01 * (s % 2), "clip_fraction": 1e-4 * s, "entropy": 0.2}
        for s in (1, 2)
    ]
    panels = panels_of(monkeypatch, run_folder(tmp_path / "x", rows))
    tops = {title: axis.get_ylim()[1] for title, axis in panels.items()}
    assert (
        tops["lost responses"] > 0.09 and tops["stopped by PPO's clip"] > 0.04 and tops["entropy of the policy"] > 0.4
    )
    assert all(axis.get_ylim()[0] == 0 and axis.get_ylabel() and axis.get_xlabel() for axis in panels.values())


def test_panels_of_an_sft_stage_before_reinforcement(tmp_path, monkeypatch):
    """The figure has no panel of prefixes, because SFT→RFT uses none. All panels have the same range of steps and a
    vertical line where SFT ends. The panel of rewards is drawn although every reward is 0."""
    rl = {"reward": 0.0, "reward_on_policy": 0.0, "prefix_tokens": 0, "prefix_tokens_kept": 0}
    rows = [{"step": s, "grad_norm": 1.0} for s in (1, 2, 3, 4)]
    rows += [{"step": s, "grad_norm": 1.0, "truncated": 0.0, "unread": 0.1 * (s % 2)} | rl for s in (5, 6)]
    panels = panels_of(monkeypatch, run_folder(tmp_path / "sft-rft", rows))
    assert list(panels) == ["reward", "lost responses", "gradient norm"]
    assert len({axis.get_xlim() for axis in panels.values()}) == 1
    assert all(any(list(line.get_xdata()) == [4, 4] for line in axis.lines) for axis in panels.values())


def test_legends_stand_outside_of_the_panels(tmp_path, monkeypatch):
    """Inside a panel a legend would hide a curve. With several runs, one legend stands above all panels."""
    folders = [with_base(run_folder(tmp_path / name, LOGGED), hard=50, medium=50, all=100) for name in ("x", "y")]
    for shown in (folders[:1], folders):
        panels = panels_of(monkeypatch, *shown).values()
        figure = next(iter(panels)).figure
        figure.draw_without_rendering()  # this call makes matplotlib place every text
        areas = [axis.get_tightbbox() if figure.legends else axis.get_window_extent() for axis in panels]
        legends = figure.legends or [axis.get_legend() for axis in panels if axis.get_legend()]
        assert legends
        for legend in legends:
            assert not any(legend.get_window_extent().shrunk(0.99, 0.99).overlaps(area) for area in areas)


def test_several_runs_have_fewer_panels_and_one_table(tmp_path, monkeypatch, capsys):
    folders = [
        with_base(run_folder(tmp_path / name, LOGGED[:n]), hard=50, all=100) for name, n in (("x", 3), ("y", 1))
    ]
    capsys.readouterr()
    assert run(monkeypatch, *folders, "--out", tmp_path / "both.png") == 0
    lines = [line.replace(" ", "").split("|")[1:-1] for line in capsys.readouterr().out.splitlines()]
    assert lines[0][-1] == "stepsto60%"
    assert lines[2:4] == [["x", "10.0", "75.0", "–", "3", "3"], ["y", "10.0", "25.0", "–", "1", "–"]]
    assert (tmp_path / "both.png").stat().st_size > 20_000
    panels = panels_of(monkeypatch, *folders)
    assert list(panels) == ["validation accuracy: all", "reward of on-policy rows", "entropy of the policy"]
    assert not any(axis.get_legend() for axis in panels.values())


def test_runs_on_different_problems_are_refused_or_told_apart(tmp_path, monkeypatch, capsys):
    first, other = (
        with_base(run_folder(tmp_path / name, LOGGED), hard=n, all=n) for name, n in (("x", 50), ("y", 40))
    )
    capsys.readouterr()
    assert run(monkeypatch, first, other, "--out", tmp_path / "c.png") == 2
    error = capsys.readouterr().err
    assert "x and y were evaluated on different problems (x: hard: 50" in error and error.count("\n") == 1
    assert not (tmp_path / "c.png").exists()
    with_base(other, hard=50, all=50)
    for folder, data in ((first, Config.data), (other, "mine.jsonl")):
        (folder / "config.json").write_text(json.dumps({"data": data, "model": "m"}))
    assert run(monkeypatch, first, other, "--out", tmp_path / "c.png") == 0
    note = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Not alike")]
    assert note == [
        f"Not alike: data (x {Config.data}, y mine.jsonl)",
    ]
    for folder, file in ((first, "0123456789"), (other, "abcdefghij")):
        (folder / "config.json").write_text(json.dumps({"data": "same", "made_of": {"validation": file}}))
    assert run(monkeypatch, first, other, "--out", tmp_path / "c.png") == 0
    assert "Not alike: file of validation problems (x 01234567, y abcdefgh)" in capsys.readouterr().out
    (tmp_path / "deep").mkdir()
    namesake = with_base(run_folder(tmp_path / "deep" / "x", LOGGED), hard=40, all=40)
    assert run(monkeypatch, first, namesake, "--out", tmp_path / "c.png") == 2
    assert "x and x were evaluated on different problems (x: hard: 50" in capsys.readouterr().err


def test_markdown_tables_are_aligned():
    assert markdown_table([["a", "b"], ["long", "1"]]) == "| a    | b |\n|------|--:|\n| long | 1 |\n"
