"""This file draws figures of evaluations: pass@k over k, and bars of accuracies with intervals."""

import itertools
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes

from evaluation.report import cells, label, percent, problem_scores, read_results, shared_cells
from evaluation.statistics import interval, mean, powers_of_two
from figures.figure import COLOURS, TYPE, in_percent, save, sheet


def plot_pass_at_k(axis: Axes, evaluations: list[dict[str, Any]], name: str, level: str) -> None:
    """Draws pass@k over k on a log2 axis: for each evaluation a line, with the 95% interval over problems as a
    band."""
    for colour, evaluation in zip(itertools.cycle(COLOURS), evaluations):
        ks = powers_of_two(evaluation["results"][name][level]["samples"])
        scores = [list(problem_scores(evaluation, name, level, k).values()) for k in ks]
        axis.plot(ks, list(map(mean, scores)), "o-", color=colour, markersize=3, label=evaluation["name"])
        axis.fill_between(ks, *zip(*map(interval, scores)), color=colour, alpha=0.15)
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter(lambda k, _: f"{k:g}")
    axis.set_xlabel("k (samples)")
    axis.set_ylabel("pass@k, % of problems")
    axis.set_ylim(0, 1)
    axis.yaxis.set_major_formatter(in_percent)
    axis.set_title(label(name, level), loc="left")
    axis.grid(alpha=0.3)
    axis.legend()


def plot_accuracy(axis: Axes, evaluations: list[dict[str, Any]], shared: list[tuple[str, str]]) -> None:
    """Draws a group of bars for each benchmark or level: for each evaluation a bar with its 95% interval."""
    width = 0.8 / len(evaluations)
    for e, evaluation in enumerate(evaluations):
        rows = [cells(evaluation)[key] for key in shared]
        places = [g + (e - (len(evaluations) - 1) / 2) * width for g in range(len(shared))]
        heights = [row["accuracy"] for row in rows]
        axis.bar(places, heights, width, color=COLOURS[e % len(COLOURS)], label=evaluation["name"])
        axis.vlines(places, [row["low"] for row in rows], [row["high"] for row in rows], color="black", linewidth=1)
        for place, row in zip(places, rows):
            axis.text(place, row["high"], percent(row["accuracy"]), ha="center", va="bottom", fontsize=6.5)
    axis.set_xticks(range(len(shared)), [label(*key) for key in shared], fontsize=7.5, rotation=20, ha="right")
    axis.set_ylim(0, 1.05)
    axis.set_ylabel("% right")
    axis.yaxis.set_major_formatter(in_percent)
    axis.set_title("accuracy (avg@k) with 95% intervals", loc="left")
    axis.grid(axis="y", alpha=0.3)
    axis.legend(loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False).set_in_layout(False)


def draw_pass_at_k(folders: list[Path], target: Path, with_accuracy: bool = False) -> Path:
    """Draws a panel of pass@k for each benchmark and level that has several samples per problem.

    A panel of accuracies comes first if `with_accuracy`, or if there is no panel of pass@k.
    """
    evaluations = [read_results(folder) for folder in folders]
    shared = shared_cells(evaluations)
    curves = [(n, l) for n, l in shared if all(e["results"][n][l]["samples"] > 1 for e in evaluations)]
    first = 1 if with_accuracy or not curves else 0
    with matplotlib.rc_context(TYPE):
        figure, axes = sheet(first + len(curves), 2.8, wide_first=bool(first))
        if first:
            plot_accuracy(axes[0], evaluations, shared)
        for axis, key in zip(axes[first:], curves):
            plot_pass_at_k(axis, evaluations, *key)
    return save(figure, target)
