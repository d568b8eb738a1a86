"""The figures of results/: a function a panel; `draw_all` writes the files. Bands and bars are 95% intervals over
seeds (over bases in horizon/contrasts.png), small dots the runs; a single run has no interval."""

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
from results import contrasts, records
from results.claims import difference, mean_interval
from results.horizon import BUDGETS, CELLS
from results.records import KINDS, Line, Stored, accuracies, runs_of, scores

SHOWN = ("rft", "sft-rft", "prefix-rft", "luffy", "sft", "uft")  # a colour each; more curves would hide each other
OURS = "prefix-rft"
Panel = Callable[[Axes], None]


def style_of(method: str) -> dict[str, Any]:
    """A method's colour and line, the same in every panel."""
    place = SHOWN.index(method) if method in SHOWN else len(SHOWN)
    return {"color": COLOURS[place], "linestyle": STYLES[place > len(SHOWN) - 1]}


def finish(axis: Axes, title: str, x: str, y: str = "", columns: int = 1, grid: str = "both") -> None:
    """Title, labels, grid and a legend of so many columns (0: none); shares in % where the label says so."""
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
    """Half the 95% interval of the mean over runs; 0 for a single run."""
    count = len(values)
    return float(t.ppf(0.975, count - 1) * values.std(ddof=1) / count**0.5) if count > 1 else 0.0


def draw_band(axis: Axes, x: Sequence[float], groups: Sequence[np.ndarray], name: str) -> None:
    """Means over runs with their intervals as a band; a group of runs for each place."""
    means, reaches = np.array([[values.mean(), reach_of(values)] for values in groups]).T
    axis.plot(x, means, label=name, marker="o", markersize=2, linewidth=1.2, **style_of(name))
    axis.fill_between(x, means - reaches, means + reaches, color=style_of(name)["color"], alpha=0.15, linewidth=0)


def draw_points(axis: Axes, x: Sequence[float], groups: Sequence[np.ndarray], name: str) -> None:
    """Means over runs with their intervals, and a dot for each run."""
    for place, values in zip(x, groups):
        axis.plot([place] * len(values), values, ".", markersize=2.5, alpha=0.5, color=style_of(name)["color"])
    means, reaches = zip(*((float(values.mean()), reach_of(values)) for values in groups))
    axis.errorbar(x, means, yerr=reaches, capsize=2, marker="o", markersize=3, label=name, **style_of(name))


def beside(count: int) -> np.ndarray:
    """Shifts that keep the intervals of `count` methods at one place apart."""
    return 0.12 * (np.arange(count) - (count - 1) / 2)


# ---- the second study


def draw_contrast(axis: Axes, runs: pd.DataFrame, cell: str) -> None:
    """Prefix-RFT minus the others over the budget, at the primary contrast's temperature; a dot for each base."""
    each = contrasts.difference_frame(runs)
    each = each[(each.cell == cell) & (each.temperature == contrasts.PRIMARY[2])]
    for rival, rows in each.groupby("rival"):
        x, values = zip(*((budget, group.difference.to_numpy()) for budget, group in rows.groupby("budget")))
        draw_band(axis, x, values, rival)
        axis.plot(rows.budget, rows.difference, ".", markersize=2.5, alpha=0.5, color=style_of(rival)["color"])
    axis.axhline(0, color="black", linewidth=0.8)
    axis.set_xscale("log", base=2)
    axis.set_xticks(BUDGETS, map(str, BUDGETS))
    finish(axis, f"{cell}, {contrasts.PRIMARY[2]}", "steps", "Prefix-RFT minus another, points")


# ---- the first study


def draw_forest(axis: Axes, stored: Stored, kind: str) -> None:
    """Prefix-RFT minus each other method, by regime, with the protocol's interval."""
    pairs = [(regime, name) for regime in ("habit", "silent", "twin") for name in ("rft", "sft-rft", "sft", "luffy")]
    pairs = [pair for pair in pairs if runs_of(stored[pair[0]], pair[1])]
    for place, (regime, name) in enumerate(pairs):
        mid, low, high = difference(*(scores(runs_of(stored[regime], method), kind) for method in (OURS, name)))
        error, colour = [[mid - low], [high - mid]], style_of(name)["color"]
        axis.errorbar(mid, -place, xerr=error, fmt="o", color=colour, markersize=4.5, capsize=2)
    axis.set_yticks(-np.arange(len(pairs)), [f"{regime}: − {name}" for regime, name in pairs])
    axis.axvline(0, color="black", linewidth=0.8)
    finish(axis, f"Prefix-RFT minus another, {KINDS[kind]}", "difference, points", columns=0, grid="x")


def draw_curves(
    axis: Axes, lines: Sequence[Line], curve: str, label: str, title: str, methods: Sequence[str]
) -> None:
    """A curve of the runs over all tokens so far: the mean over seeds with its interval."""
    for name in (name for name in methods if runs_of(lines, name)):
        curves = [line["curve"] for line in runs_of(lines, name)]
        tokens = np.mean([values["tokens"] for values in curves], axis=0) / 1000
        draw_band(axis, tokens, np.array([values[curve] for values in curves], dtype=float).T, name)
    axis.set_ylim(0, None)
    finish(axis, title, "thousands of tokens, sampled and trained", label)


def draw_demonstrations(axis: Axes, lines: Sequence[Line], kind: str) -> None:
    """Accuracy against the number of demonstrations."""
    methods = list(dict.fromkeys(line["method"] for line in lines if line["method"] != "base"))
    numbers = (512, 128, 32, 8, 2)
    for name, shift in zip(methods, beside(len(methods))):
        groups = [accuracies(runs_of(lines, f"{name}@{number}"), kind) for number in numbers]
        draw_points(axis, np.array(numbers) * 2**shift, groups, name)
    axis.set_xscale("log", base=2)
    axis.set_xticks(numbers, map(str, numbers))
    axis.margins(y=0.35)  # for the legend
    finish(axis, f"few demonstrations, {KINDS[kind]}", "demonstrations, of 512 problems", "% right, test", columns=2)


def draw_experts(axis: Axes, stored: Stored, kind: str) -> None:
    """Accuracy by kind of expert; the first is habit's. RFT, which sees no demonstration, is a line."""
    experts, methods = ("short", "slips", "several"), ("sft", "sft-rft", OURS, "luffy")
    for name, shift in zip(methods, beside(len(methods))):
        runs = [runs_of(stored["habit"], name), *(runs_of(stored["weak"], f"{name}@{e}") for e in experts)]
        draw_points(axis, np.arange(4) + shift, [accuracies(group, kind) for group in runs], name)
    axis.axhline(accuracies(runs_of(stored["habit"], "rft"), kind).mean(), label="rft", **style_of("rft"))
    axis.set_xticks(range(4), ["expert", *experts])
    axis.margins(y=0.45)  # for the legend
    axis.set_ylim(max(0, axis.get_ylim()[0]), None)
    finish(axis, f"weaker experts, {KINDS[kind]}", "demonstrations by", "% right, test", columns=3)


def draw_ablations(axis: Axes, lines: Sequence[Line], kind: str) -> None:
    """Each ablation minus prefix-rft, with the protocol's interval."""
    names = [name for name in records.names_of(lines) if name.startswith(f"{OURS}-") and name != "prefix-rft-trust"]
    for place, name in enumerate(names):
        mid, low, high = difference(*(scores(runs_of(lines, method), kind) for method in (name, OURS)))
        axis.bar(place, mid, yerr=[[mid - low], [high - mid]], capsize=2, color=COLOURS[-1], alpha=0.5)
    axis.axhline(0, **style_of(OURS), linewidth=1.2)
    axis.set_xticks(range(len(names)), [name.removeprefix("prefix-rft-") for name in names], rotation=30, ha="right")
    finish(axis, f"ablation minus Prefix-RFT, {KINDS[kind]}", "", "difference, points", columns=0, grid="y")


def draw_ceiling(axis: Axes, lines: Sequence[Line], level: str) -> None:
    """pass@k over k; bands: 95% over problems and seeds."""
    tries = [2**i for i in range(9)]
    for name in records.names_of(lines):
        mid, low, high = np.array([mean_interval(records.solved(runs_of(lines, name), k, level)) for k in tries]).T
        axis.plot(tries, mid, label=name, marker="o", markersize=2, linewidth=1.2, **style_of(name))
        axis.fill_between(tries, low, high, color=style_of(name)["color"], alpha=0.1, linewidth=0)
    axis.set_xscale("log", base=2)
    axis.set_xticks(tries[::2], map(str, tries[::2]))
    axis.set_ylim(0, 1)
    finish(axis, f"the ceiling: {level} problems", "k samples at T = 1", "pass@k, % of problems")


def question_panels(stored: Stored) -> list[Panel]:
    """Few and weaker demonstrations; the parts of Prefix-RFT; many samples. Two panels each."""
    panels = [partial(draw_demonstrations, lines=stored["scarce"], kind=kind) for kind in KINDS]
    panels += [partial(draw_experts, stored=stored, kind=kind) for kind in KINDS]
    panels += [partial(draw_ablations, lines=stored["habit"], kind=kind) for kind in KINDS]
    return panels + [
        partial(draw_ceiling, lines=stored[records.CEILING], level=level) for level in records.CEILING_LEVELS
    ]


def draw_panels(panels: Sequence[Panel], panel_height: float = 2.9, most: int = COLUMNS) -> Figure:
    """The panels, at most `most` beside each other, `panel_height` in inches. The caller sets figure.TYPE."""
    figure, axes = sheet(len(panels), panel_height, most=most)
    for panel, axis in zip(panels, axes):
        panel(axis)
    return figure


def draw_all(stored: Stored, runs: pd.DataFrame, folder: Path) -> list[Path]:
    """Write the figures of both studies, and that of the first hour."""
    questions, greedy = question_panels(stored), {"curve": "validation", "label": "% right, validation, greedy"}
    figures = {"study/demonstrations": questions[:4], "study/parts": questions[4:6], "study/ceiling": questions[6:]}
    figures["study/forest"] = [partial(draw_forest, stored=stored, kind=kind) for kind in KINDS]
    titles = {"habit": "habit: reward from the start", "silent": "silent: hardly any reward at first"}
    figures["study/curves"] = [
        partial(draw_curves, lines=stored[name], title=title, methods=SHOWN, **greedy)
        for name, title in titles.items()
    ]
    told = {"lines": stored["habit"], "methods": ("rft", OURS)}
    figures["first-hour"] = [
        partial(draw_curves, title="accuracy, ten seeds of each", **greedy, **told),
        partial(draw_curves, title="reward of own rows", curve="on_policy", label="mean reward", **told),
    ]
    cells = set(contrasts.difference_frame(runs)["cell"])
    figures["horizon/contrasts"] = [partial(draw_contrast, runs=runs, cell=cell) for cell in CELLS if cell in cells]
    drawn = {folder / f"{name}.png": panels for name, panels in figures.items() if panels}
    with matplotlib.rc_context(TYPE):
        return [save(draw_panels(panels, most=2), path) for path, panels in drawn.items()]
