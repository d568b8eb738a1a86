"""This file draws the figures of results/: one function for each kind of panel, and `draw_all`, which writes the
files.

Bands and bars are 95% intervals over seeds (in horizon/contrasts.png over base models), and small dots are single
runs. A group of one run has no interval.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.stats import t

from figures.figure import COLOURS, COLUMNS, STYLES, TYPE, in_percent, save, sheet
from results import horizon, records
from results.claims import difference, group_of
from results.records import KINDS, Line, Stored, accuracies, runs_of, scores

# methods with a colour of their own; curves of more methods would hide each other
SHOWN = ("rft", "sft-rft", "prefix-rft", "luffy", "sft", "uft")
OURS = "prefix-rft"
Panel = Callable[[Axes], None]


def style_of(method: str) -> dict[str, Any]:
    """Returns the colour and line style of a method, equal in every panel."""
    place = SHOWN.index(method) if method in SHOWN else len(SHOWN)
    return {"color": COLOURS[place], "linestyle": STYLES[place > len(SHOWN) - 1]}


def finish(axis: Axes, title: str, x: str, y: str = "", columns: int = 1, grid: str = "both") -> None:
    """Sets a panel's title, labels, grid and a legend of `columns` columns (0: no legend). An axis whose label has
    "%" or "points" shows shares in %."""
    axis.set_title(title, loc="left")
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    for label, side in ((x, axis.xaxis), (y, axis.yaxis)):
        if "%" in label or "points" in label:
            side.set_major_formatter(in_percent)
    axis.set_axisbelow(True)
    axis.grid(axis=grid, alpha=0.3)
    if columns:
        axis.legend(ncols=columns, loc="upper center" if columns > 1 else "best")


def reach_of(values: np.ndarray) -> float:
    """Returns half the width of the 95% interval of the mean over runs; 0 for a single run."""
    count = len(values)
    return float(t.ppf(0.975, count - 1) * values.std(ddof=1) / count**0.5) if count > 1 else 0.0


def draw_band(axis: Axes, x: Sequence[float], groups: Sequence[np.ndarray], name: str) -> None:
    """Draws the mean of each group of runs over x, with the 95% intervals as a band."""
    means, reaches = np.array([[values.mean(), reach_of(values)] for values in groups]).T
    axis.plot(x, means, label=name, marker="o", markersize=2, linewidth=1.2, **style_of(name))
    axis.fill_between(x, means - reaches, means + reaches, color=style_of(name)["color"], alpha=0.15, linewidth=0)


def draw_points(axis: Axes, x: Sequence[float], groups: Sequence[np.ndarray], name: str, label: str = "") -> None:
    """Draws the mean of each group of runs over x with a bar for its 95% interval, and a dot for each run. The
    legend has `label`, or without a label the method's name."""
    for place, values in zip(x, groups):
        axis.plot([place] * len(values), values, ".", markersize=6, alpha=0.3, color=style_of(name)["color"])
    means, reaches = zip(*((float(values.mean()), reach_of(values)) for values in groups))
    axis.errorbar(x, means, yerr=reaches, capsize=2, marker="o", markersize=3, label=label or name, **style_of(name))


# ---- the second study


def draw_contrast(axis: Axes, runs: pd.DataFrame, cell: str) -> None:
    """Draws Prefix-RFT minus each rival over the number of steps, at the temperature of the primary contrast. Bars
    are 95% intervals over base models, and dots are single base models."""
    each = horizon.difference_frame(runs)
    each = each[(each.cell == cell) & (each.temperature == horizon.PRIMARY[2])]
    for place, rival in enumerate(horizon.RIVALS):
        rows = each[each.rival == rival]
        groups = [(budget * 1.04 ** (place - 1), group) for budget, group in rows.groupby("budget")]
        if groups:
            values = [group.difference.to_numpy() for _, group in groups]
            draw_points(axis, [x for x, _ in groups], values, rival, f"− {rival}")
    axis.axhline(0, color="black", linewidth=0.8)
    axis.set_xscale("log", base=2)
    axis.set_xticks(horizon.BUDGETS, map(str, horizon.BUDGETS))
    axis.set_xlim(0.8 * horizon.BUDGETS[0], 1.25 * horizon.BUDGETS[-1])
    finish(axis, f"{cell}: {OURS} − another method, {horizon.PRIMARY[2]}", "steps", "difference of accuracy, points")


# ---- the first study


def draw_forest(axis: Axes, stored: Stored, kind: str, pairs: Sequence[tuple[str, str]], title: str) -> None:
    """Draws Prefix-RFT minus another method for each pair (regime, method), with the interval of the protocol."""
    for place, (regime, name) in enumerate(pairs):
        mid, low, high = difference(*(scores(runs_of(stored[regime], method), kind) for method in (OURS, name)))
        error, colour = [[mid - low], [high - mid]], style_of(name)["color"]
        axis.errorbar(mid, -place, xerr=error, fmt="o", color=colour, markersize=4.5, capsize=2)
    several = len({regime for regime, _ in pairs}) > 1
    labels = [f"{regime}: − {name}" if several else name.removeprefix(f"{OURS}-") for regime, name in pairs]
    axis.set_yticks(-np.arange(len(pairs)), labels)
    axis.axvline(0, color="black", linewidth=0.8)
    finish(axis, f"{title}, {KINDS[kind]}", "difference, points", columns=0, grid="x")


def draw_curves(
    axis: Axes, lines: Sequence[Line], curve: str, label: str, title: str, methods: Sequence[str]
) -> None:
    """Draws the field `curve` of the methods' runs over the tokens sampled and trained so far: means over seeds with
    95% intervals."""
    for name in (name for name in methods if runs_of(lines, name)):
        curves = [line["curve"] for line in runs_of(lines, name)]
        tokens = np.mean([values["tokens"] for values in curves], axis=0) / 1000
        draw_band(axis, tokens, np.array([values[curve] for values in curves], dtype=float).T, name)
    axis.set_ylim(0, None)
    finish(axis, title, "thousands of tokens, sampled and trained", label)


def draw_groups(axis: Axes, labels: Sequence[str], groups: dict[str, list[np.ndarray]], title: str, x: str) -> None:
    """Draws the accuracies of several methods beside each other at each label of the x-axis."""
    for place, (name, values) in enumerate(groups.items()):
        draw_points(axis, np.arange(len(labels)) + 0.12 * (place - (len(groups) - 1) / 2), values, name)
    axis.set_xticks(range(len(labels)), labels)
    axis.margins(y=0.4)  # the legend needs room above the points
    axis.set_ylim(max(0, axis.get_ylim()[0]), None)
    finish(axis, title, x, "% right, test", columns=3)


def draw_ceiling(axis: Axes, lines: Sequence[Line], level: str) -> None:
    """Draws pass@k over k on the problems of `level`: for each method the mean over seeds."""
    tries = [2**i for i in range(9)]
    for name in records.names_of(lines):
        shares = [records.solved(runs_of(lines, name), k, level).mean() for k in tries]
        axis.plot(tries, shares, label=name, marker="o", markersize=2, **style_of(name))
    axis.set_xscale("log", base=2)
    axis.set_xticks(tries[::2], map(str, tries[::2]))
    axis.set_ylim(0, 1)
    finish(axis, f"the ceiling: {level} problems", "k samples at T = 1", "pass@k, % of problems")


def question_panels(stored: Stored) -> list[Panel]:
    """Returns two panels for each of four questions: few demonstrations, weaker experts, variants of Prefix-RFT, and
    pass@k. RFT uses no demonstrations, so all its points are the runs of the regime habit."""

    def runs(names: dict[str, list[str]], kind: str) -> dict[str, list[np.ndarray]]:
        return {
            method: [accuracies(group_of(stored, "weak", group), kind) for group in groups]
            for method, groups in names.items()
        }

    numbers, experts = ("2", "8", "32", "128", "512"), ("short", "slips", "several")
    few = {m: [f"scarce:{m}@{number}" for number in numbers] for m in ("sft-rft", OURS, "luffy", "uft")}
    weak = {m: [f"habit:{m}", *(f"{m}@{expert}" for expert in experts)] for m in ("sft", "sft-rft", OURS, "luffy")}
    few, weak = ({"rft": ["habit:rft"] * count} | names for count, names in ((5, few), (4, weak)))
    variants = [name for name in records.names_of(stored["habit"]) if name.startswith("prefix-rft-")]
    variants += ["rft-entropy-clip", "dr-po"]
    parts = {"pairs": [("habit", name) for name in variants], "title": "Prefix-RFT minus a variant"}
    panels = []
    for kind, title in KINDS.items():
        x = {"labels": numbers, "title": f"few demonstrations, {title}", "x": "demonstrations, of 512 problems"}
        panels.append(partial(draw_groups, **x, groups=runs(few, kind)))
    for kind, title in KINDS.items():
        x = {"labels": ("expert", *experts), "title": f"weaker experts, {title}", "x": "demonstrations by"}
        panels.append(partial(draw_groups, **x, groups=runs(weak, kind)))
    panels += [partial(draw_forest, stored=stored, kind=kind, **parts) for kind in KINDS]
    return panels + [partial(draw_ceiling, lines=stored["ceiling"], level=level) for level in records.CEILING_LEVELS]


def draw_panels(panels: Sequence[Panel], panel_height: float = 2.9, most: int = COLUMNS) -> Figure:
    """Draws the panels, at most `most` in a row. `panel_height` is in inches. The caller applies figure.TYPE."""
    figure, axes = sheet(len(panels), panel_height, most=most)
    for panel, axis in zip(panels, axes):
        panel(axis)
    return figure


def draw_all(stored: Stored, runs: pd.DataFrame, folder: Path) -> list[Path]:
    """Writes the figures of the first study (study/) and of the second (horizon/), and first-hour.png, which the
    front page shows. Returns the paths of all figures."""
    questions = question_panels(stored)
    figures = {"study/demonstrations": questions[:4], "study/parts": questions[4:6], "study/ceiling": questions[6:]}
    pairs = [(regime, name) for regime in ("habit", "silent", "twin") for name in ("rft", "sft-rft", "sft", "luffy")]
    rivals = {"pairs": pairs[:-1], "title": "Prefix-RFT minus another"}  # LUFFY was not run in the regime twin
    figures["study/forest"] = [partial(draw_forest, stored=stored, kind=kind, **rivals) for kind in KINDS]
    habit = {"lines": stored["habit"], "methods": ("rft", OURS)}
    figures["first-hour"] = [
        partial(draw_curves, title="validation accuracy", curve="validation", label="% right, greedy", **habit),
        partial(draw_curves, title="reward of on-policy rows", curve="on_policy", label="mean reward", **habit),
    ]
    contrasts = horizon.contrast_frame(runs).dropna(subset="low")  # a cell with one base model has no interval yet
    cells = set(contrasts.index.get_level_values("cell"))
    figures["horizon/contrasts"] = [
        partial(draw_contrast, runs=runs, cell=cell) for cell in horizon.CELLS if cell in cells
    ]
    drawn = {folder / f"{name}.png": panels for name, panels in figures.items() if panels}
    with matplotlib.rc_context(TYPE):
        return [save(draw_panels(panels, most=2), path) for path, panels in drawn.items()]
