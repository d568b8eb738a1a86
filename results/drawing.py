"""The study's figures: learning curves and test accuracies of six methods (main.png), every method and regime
(details.png), one question a panel (questions.png). A panel whose runs are missing is left out, and so is the
interval of a single run."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from data.make_recipes import LEVELS
from figures.figure import COLOURS, COLUMNS, STYLES, TYPE, in_percent, save, sheet
from results import ceiling
from results.claims import KINDS, difference, mean_interval, prefix_advantage, runs_of, scores, t_quantile
from results.protocol import ABLATIONS, EXPERT, REGIMES, Line

SHOWN = ("rft", "sft-rft", "prefix-rft", "luffy", "sft", "uft")  # a colour each; more curves would hide each other
Panel = Callable[[Axes], None]


def style_of(method: str) -> dict[str, Any]:
    """A method's colour and line, the same in every panel."""
    place = SHOWN.index(method) if method in SHOWN else len(SHOWN)
    return {"color": COLOURS[place], "linestyle": STYLES[place > len(SHOWN) - 1]}


def finish(axis: Axes, title: str, x: str, y: str = "", columns: int = 1, grid: str = "both") -> None:
    axis.set_title(title, loc="left")
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    axis.set_axisbelow(True)
    axis.grid(axis=grid, alpha=0.3)
    if columns:  # of the legend
        axis.legend(ncols=columns, loc="upper center" if columns > 1 else "best")


def means_of(runs: Sequence[Line], kind: str, level: str = "all") -> np.ndarray:
    """[runs] accuracy of each."""
    return scores(runs, kind, level).mean(1)


def reach_of(values: np.ndarray) -> np.ndarray:
    """Half the 95% interval of the mean over runs, the first axis; 0 for a single run."""
    count = len(values)
    return t_quantile(count - 1) * values.std(0, ddof=1) / count**0.5 if count > 1 else np.zeros(values.shape[1:])


def draw_accuracies(axis: Axes, lines: Sequence[Line], methods: Sequence[str], title: str) -> None:
    """A row for each method, sorted: the mean over seeds with its 95% interval, greedy (filled) and at temperature 1
    (open), and a dot for each seed."""
    names = [name for name in methods if runs_of(lines, name)]
    names.sort(key=lambda name: sum(means_of(runs_of(lines, name), kind).mean() for kind in KINDS))
    for place, name in enumerate(names):
        runs, colour = runs_of(lines, name), style_of(name)["color"]
        for kind, shift, face in (("greedy", 0.17, colour), ("sampled", -0.17, "white")):
            values, y = means_of(runs, kind), place + shift
            axis.plot(values, [y] * len(values), ".", color=colour, markersize=2.5, alpha=0.5)
            bar = {"xerr": float(reach_of(values))} if len(values) > 1 else {}
            axis.errorbar(values.mean(), y, **bar, fmt="o", color=colour, mfc=face, markersize=4.5, capsize=2)
    for kind, face in (("greedy", "black"), ("sampled", "white")):
        axis.plot([], [], "o", color="black", mfc=face, markersize=4.5, label=KINDS[kind])
    axis.set_yticks(range(len(names)), names, fontsize=7.5 if len(names) < 13 else 6)
    axis.xaxis.set_major_formatter(in_percent)
    finish(axis, title, "% right, test")


def draw_band(
    axis: Axes, x: Sequence[float], rows: Sequence[Sequence[float | None]], label: str, method: str
) -> None:
    """Mean over runs with its 95% interval; a place where a run has no value is left out."""
    width = min(map(len, rows))
    kept = [i for i in range(width) if all(row[i] is not None for row in rows)]
    values = np.array([[row[i] for i in kept] for row in rows], dtype=float)
    mean, reach, places = values.mean(0), reach_of(values), [x[i] for i in kept]
    axis.plot(places, mean, label=label, marker="o", markersize=2, linewidth=1.2, **style_of(method))
    axis.fill_between(places, mean - reach, mean + reach, color=style_of(method)["color"], alpha=0.15, linewidth=0)


def draw_curves(axis: Axes, lines: Sequence[Line], against: str, title: str) -> None:
    """Validation accuracy over the steps or over all tokens so far."""
    for name in SHOWN:
        if runs := runs_of(lines, name):
            x = np.mean([line["curve"][against] for line in runs], axis=0) / (1000 if against == "tokens" else 1)
            rows = column(runs, "validation")
            for base in runs_of(lines, "base"):  # where all of them begin
                x, rows = [0.0, *x], [[base["scores"]["validation"]["greedy"], *row] for row in rows]
            draw_band(axis, x, rows, name, name)
    axis.set_ylim(0, None)
    axis.yaxis.set_major_formatter(in_percent)
    unit = {"step": "step, supervised ones too", "tokens": "thousands of tokens, sampled and trained"}[against]
    finish(axis, title, unit, "% right, validation, greedy")


def column(runs: Sequence[Line], name: str) -> list[list[float | None]]:
    return [line["curve"][name] for line in runs]


def draw_levels(axis: Axes, lines: Sequence[Line], regime: str) -> None:
    """Accuracy at temperature 1 by level, a line for each method."""
    for name in ("base", *SHOWN):
        if runs := runs_of(lines, name):
            rows = np.array([means_of(runs, "sampled", level) for level in LEVELS]).T
            draw_band(axis, range(len(LEVELS)), rows.tolist(), name, name)
    axis.set_xticks(range(len(LEVELS)), [f"{level}\nk = {min(k)}, {max(k)}" for level, k in LEVELS.items()])
    axis.set_ylim(0, 1.3)  # with room for the legend
    axis.set_yticks(np.linspace(0, 1, 6))
    axis.yaxis.set_major_formatter(in_percent)
    finish(axis, f"{regime}: by level, T = 1", "", "% right, test", columns=3, grid="y")


def draw_demonstrations(axis: Axes, lines: Sequence[Line], kind: str) -> None:
    """Accuracy against the number of demonstrations."""
    methods = REGIMES["scarce"].methods
    for name, shift in zip(methods, beside(len(methods))):
        numbers = [n for n in REGIMES["scarce"].demonstrations if runs_of(lines, f"{name}@{n}")]
        groups = [means_of(runs_of(lines, f"{name}@{n}"), kind) for n in numbers]
        if numbers:
            draw_points(axis, [n * 2**shift for n in numbers], groups, name)
    axis.set_xscale("log", base=2)
    axis.set_xticks(REGIMES["scarce"].demonstrations)
    axis.xaxis.set_major_formatter(lambda n, _: f"{n:g}")
    axis.yaxis.set_major_formatter(in_percent)
    axis.margins(y=0.35)  # for the legend
    title = f"few demonstrations, {KINDS[kind]}"
    finish(axis, title, "demonstrations, of 512 problems", "% right, test", columns=2)


def beside(count: int) -> np.ndarray:
    """Shifts that keep the intervals of `count` methods at one place apart."""
    return 0.12 * (np.arange(count) - (count - 1) / 2)


def draw_points(axis: Axes, x: Sequence[float], groups: Sequence[np.ndarray], name: str) -> None:
    """Means over runs with 95% intervals, and a dot for each run."""
    for place, values in zip(x, groups):
        axis.plot([place] * len(values), values, ".", markersize=2.5, alpha=0.5, color=style_of(name)["color"])
    reaches = [float(reach_of(values)) for values in groups]
    means = [float(values.mean()) for values in groups]
    axis.errorbar(x, means, yerr=reaches, capsize=2, marker="o", markersize=3, label=name, **style_of(name))


def draw_experts(axis: Axes, stored: dict[str, list[Line]], kind: str) -> None:
    """Accuracy by kind of expert; the first is habit's."""
    experts = (EXPERT, *REGIMES["weak"].experts)
    methods = REGIMES["weak"].methods
    for name, shift in zip(methods, beside(len(methods))):
        runs = [runs_of(stored["habit" if e == EXPERT else "weak"], f"{name}@{e}") for e in experts]
        places = [place for place, found in enumerate(runs) if found]
        if any(runs[1:]):  # habit's alone are no comparison
            draw_points(axis, [p + shift for p in places], [means_of(runs[p], kind) for p in places], name)
    axis.set_xticks(range(len(experts)), experts)
    axis.margins(y=0.45)  # for the legend
    axis.set_ylim(max(0, axis.get_ylim()[0]), None)
    axis.yaxis.set_major_formatter(in_percent)
    finish(axis, f"weaker experts, {KINDS[kind]}", "demonstrations by", "% right, test", columns=2)


def draw_ablations(axis: Axes, lines: Sequence[Line], kind: str) -> None:
    """Each ablation minus prefix-rft, with the protocol's interval."""
    names = [name for name in ABLATIONS if len(runs_of(lines, name)) > 1]
    whole = scores(runs_of(lines, "prefix-rft"), kind)
    for place, name in enumerate(names):
        mid, low, high = difference(scores(runs_of(lines, name), kind), whole)
        axis.bar(place, mid, yerr=[[mid - low], [high - mid]], capsize=2, color=COLOURS[-1], alpha=0.5)
    axis.axhline(0, **style_of("prefix-rft"), linewidth=1.2)
    axis.set_xticks(range(len(names)), [name.removeprefix("prefix-rft-") for name in names], rotation=30, ha="right")
    axis.yaxis.set_major_formatter(in_percent)
    finish(axis, f"ablation minus Prefix-RFT, {KINDS[kind]}", "", "difference, points", columns=0, grid="y")


def draw_with_and_without_clip(axis: Axes, lines: Sequence[Line], name: str, title: str, unit: str) -> None:
    """A curve of Prefix-RFT and of the same without the entropy clip."""
    for method, label in (("prefix-rft", "with the clip"), ("prefix-rft-all", "without"), ("rft", "rft")):
        if runs := runs_of(lines, method):
            draw_band(axis, runs[0]["curve"]["step"], column(runs, name), label, method)
    axis.set_ylim(0, None)
    axis.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    finish(axis, f"entropy clip: {title}", "step", unit)


def draw_advantage(axis: Axes, stored: dict[str, list[Line]]) -> None:
    """Reward of hybrid rows minus that of on-policy ones, over the share of the run."""
    for regime, style in zip(("habit", "silent"), STYLES):
        if runs := runs_of(stored[regime], "prefix-rft"):
            rows = np.array([prefix_advantage(line) for line in runs])
            steps = runs[0]["curve"]["step"]
            places = [step / steps[-1] for step in steps[: rows.shape[1]]]
            axis.plot(places, rows.mean(0), style, color=style_of("prefix-rft")["color"], label=regime)
            low, high = rows.mean(0) - reach_of(rows), rows.mean(0) + reach_of(rows)
            axis.fill_between(places, low, high, color=style_of("prefix-rft")["color"], alpha=0.15, linewidth=0)
    axis.axhline(0, color="grey", linewidth=0.8)
    axis.xaxis.set_major_formatter(in_percent)
    finish(axis, "lead of rows with a prefix", "% of the run", "hybrid minus on-policy reward")


def draw_ceiling(axis: Axes, lines: Sequence[Line], level: str) -> None:
    """pass@k over k; bands: 95% over problems and, with several, seeds."""
    for name in ceiling.METHODS:
        if runs := runs_of(lines, name):
            found = np.array([mean_interval(ceiling.solved(runs, k, level)) for k in ceiling.TRIES])
            axis.plot(
                ceiling.TRIES, found[:, 0], label=name, marker="o", markersize=2, linewidth=1.2, **style_of(name)
            )
            axis.fill_between(
                ceiling.TRIES, found[:, 1], found[:, 2], color=style_of(name)["color"], alpha=0.1, linewidth=0
            )
    axis.set_xscale("log", base=2)
    axis.set_xticks(ceiling.TRIES[::2])
    axis.xaxis.set_major_formatter(lambda k, _: f"{k:g}")
    axis.set_ylim(0, 1)
    axis.yaxis.set_major_formatter(in_percent)
    finish(axis, f"the ceiling: {level} problems", "k samples at T = 1", "pass@k, % of problems")


def main_panels(stored: dict[str, list[Line]]) -> list[Panel]:
    """Two a regime: validation accuracy over the steps, test accuracies at the end."""
    panels: list[Panel] = []
    for regime, where in (("habit", "reward from the start"), ("silent", "hardly any reward at first")):
        if any(runs_of(stored[regime], name) for name in SHOWN):
            lines, title = stored[regime], f"{regime}: at the end, test"
            panels += [partial(draw_curves, lines=lines, against="step", title=f"{regime}: {where}")]
            panels += [partial(draw_accuracies, lines=lines, methods=("base", *SHOWN), title=title)]
    return panels


def detail_panels(stored: dict[str, list[Line]]) -> list[Panel]:
    """Three a regime."""
    panels: list[Panel] = []
    for regime in ("habit", "silent", "twin"):
        lines = stored.get(regime, [])
        if any(runs_of(lines, name) for name in SHOWN):
            methods = [name for name in ("base", *REGIMES[regime].methods) if name not in ABLATIONS]
            panels += [partial(draw_accuracies, lines=lines, methods=methods, title=f"{regime}: every method")]
            panels += [partial(draw_curves, lines=lines, against="tokens", title=f"{regime}: by tokens")]
            panels += [partial(draw_levels, lines=lines, regime=regime)]
    return panels


def question_panels(stored: dict[str, list[Line]]) -> list[Panel]:
    """Few and weaker demonstrations, ablations, the entropy clip, the prefix's lead, the ceiling."""
    habit, scarce, panels = stored["habit"], stored["scarce"], []
    if any(not line["trial"] for line in scarce):
        panels += [partial(draw_demonstrations, lines=scarce, kind=kind) for kind in KINDS]
    if any(line["method"] != "base" for line in stored.get("weak", [])):
        panels += [partial(draw_experts, stored=stored, kind=kind) for kind in KINDS]
    if min(len(runs_of(habit, "prefix-rft")), max(len(runs_of(habit, name)) for name in ABLATIONS)) > 1:
        panels += [partial(draw_ablations, lines=habit, kind=kind) for kind in KINDS]
    if runs_of(habit, "prefix-rft"):
        told = {"length": ("response length", "tokens"), "entropy": ("the policy's entropy", "nats per own token")}
        for name, (title, unit) in told.items():
            panels += [partial(draw_with_and_without_clip, lines=habit, name=name, title=title, unit=unit)]
        panels += [partial(draw_advantage, stored=stored)]
    if lines := stored.get(ceiling.NAME):
        panels += [partial(draw_ceiling, lines=lines, level=level) for level in ceiling.LEVELS]
    return panels


def draw_panels(panels: Sequence[Panel], panel_height: float = 2.9, most: int = COLUMNS) -> Figure:
    """The panels, at most `most` beside each other, `panel_height` in inches. The caller sets figure.TYPE."""
    figure, axes = sheet(len(panels), panel_height, most=most)
    for panel, axis in zip(panels, axes):
        panel(axis)
    return figure


def draw_all(stored: dict[str, list[Line]], folder: Path) -> list[Path]:
    """Write the figures that there are runs for."""
    written = []
    found = (("main", main_panels, 2), ("details", detail_panels, COLUMNS), ("questions", question_panels, COLUMNS))
    for name, find, most in found:
        if panels := find(stored):
            with matplotlib.rc_context(TYPE):
                written.append(save(draw_panels(panels, most=most), folder / f"{name}.png"))
    return written
