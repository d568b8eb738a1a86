"""The study's figures: accuracies and learning curves of every regime (main.png), the questions behind them
(details.png). A panel whose runs are missing is left out."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from data.make_recipes import LEVELS
from figures.figure import COLOURS, STYLES, TYPE, in_percent, save, sheet
from results.claims import KINDS, prefix_advantage, runs_of, scores, t_quantile
from results.protocol import ABLATIONS, REGIMES, Line

SHOWN = ("rft", "sft-rft", "prefix-rft", "luffy", "sft", "uft")  # a colour each; more curves would hide each other
Panel = Callable[[Axes], None]


def style_of(method: str) -> dict[str, Any]:
    """A method's colour and line, the same in every panel."""
    place = SHOWN.index(method) if method in SHOWN else len(SHOWN)
    return {"color": COLOURS[place], "linestyle": STYLES[place > len(SHOWN) - 1]}


def means_of(runs: Sequence[Line], kind: str, level: str = "all") -> np.ndarray:
    """[runs] accuracy of each."""
    return scores(runs, kind, level).mean(1)


def reach_of(values: np.ndarray) -> np.ndarray:
    """Half the 95% interval of the mean over runs, the first axis; 0 for a single run."""
    count = len(values)
    return t_quantile(count - 1) * values.std(0, ddof=1) / count**0.5 if count > 1 else np.zeros(values.shape[1:])


def draw_accuracies(axis: Axes, lines: Sequence[Line], regime: str, kind: str) -> None:
    """A row for each method: a point for each seed, a bar for their mean."""
    names = [name for name in ("base", *REGIMES[regime].methods) if runs_of(lines, name)]
    for place, name in enumerate(names):
        values, colour = means_of(runs_of(lines, name), kind), style_of(name)["color"]
        axis.plot(values, [place] * len(values), "o", color=colour, markersize=3, alpha=0.5, linewidth=0)
        axis.plot([values.mean()], [place], "|", color=colour, markersize=11, markeredgewidth=2)
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    axis.xaxis.set_major_formatter(in_percent)
    axis.set_xlabel("% right, test")
    axis.set_title(f"{regime}, {KINDS[kind]}: seeds, mean", loc="left")
    axis.grid(axis="x", alpha=0.3)


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


def draw_curves(axis: Axes, lines: Sequence[Line], regime: str, against: str) -> None:
    """Validation accuracy over the steps or over all tokens so far."""
    for name in SHOWN:
        if runs := runs_of(lines, name):
            x = np.mean([line["curve"][against] for line in runs], axis=0)
            draw_band(axis, x / (1000 if against == "tokens" else 1), column(runs, "validation"), name, name)
    axis.set_ylim(0, None)
    axis.yaxis.set_major_formatter(in_percent)
    axis.set_ylabel("% right, greedy")
    axis.set_xlabel("step, supervised ones too" if against == "step" else "thousands of tokens, sampled and trained")
    axis.set_title(f"{regime}: validation", loc="left")
    axis.legend()
    axis.grid(alpha=0.3)


def column(runs: Sequence[Line], name: str) -> list[list[float | None]]:
    return [line["curve"][name] for line in runs]


def draw_levels(axis: Axes, lines: Sequence[Line], regime: str) -> None:
    """Accuracy at temperature 1 by level, a line for each method."""
    for name in ("base", *SHOWN):
        if runs := runs_of(lines, name):
            rows = np.array([means_of(runs, "sampled", level) for level in LEVELS]).T
            draw_band(axis, range(len(LEVELS)), rows.tolist(), name, name)
    axis.set_xticks(range(len(LEVELS)), LEVELS)
    axis.set_ylim(0, 1)
    axis.yaxis.set_major_formatter(in_percent)
    axis.set_ylabel("% right, test, T = 1")
    axis.set_title(f"{regime}: by level", loc="left")
    axis.legend()
    axis.grid(alpha=0.3)


def draw_demonstrations(axis: Axes, lines: Sequence[Line], kind: str) -> None:
    """Accuracy against the number of demonstrations."""
    for name in REGIMES["scarce"].methods:
        numbers = [n for n in REGIMES["scarce"].demonstrations if runs_of(lines, f"{name}@{n}")]
        for place, n in enumerate(numbers):
            values = means_of(runs_of(lines, f"{name}@{n}"), kind)
            axis.plot([n] * len(values), values, "o", markersize=2.5, alpha=0.5, color=style_of(name)["color"])
            numbers[place] = (n, values.mean())
        if numbers:
            axis.plot(*zip(*numbers), label=name, **style_of(name))
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter(lambda n, _: f"{n:g}")
    axis.set_xlabel("demonstrations, of 512 problems")
    axis.yaxis.set_major_formatter(in_percent)
    axis.set_ylabel("% right, test")
    axis.set_title(f"scarce, {KINDS[kind]}", loc="left")
    axis.legend()
    axis.grid(alpha=0.3)


def draw_ablations(axis: Axes, lines: Sequence[Line], kind: str) -> None:
    """A bar for Prefix-RFT and each of its ablations, with the interval over seeds."""
    names = [name for name in ("prefix-rft", *ABLATIONS) if runs_of(lines, name)]
    values = [means_of(runs_of(lines, name), kind) for name in names]
    heights, reaches = [found.mean() for found in values], [float(reach_of(found)) for found in values]
    axis.bar(range(len(names)), heights, yerr=reaches, capsize=2, color=[style_of(name)["color"] for name in names])
    axis.set_xticks(range(len(names)), [name.removeprefix("prefix-rft-") for name in names], rotation=30, ha="right")
    axis.set_ylim(0, None)
    axis.yaxis.set_major_formatter(in_percent)
    axis.set_ylabel("% right, test")
    axis.set_title(f"ablations, habit, {KINDS[kind]}", loc="left")
    axis.set_axisbelow(True)
    axis.grid(axis="y", alpha=0.3)


def draw_with_and_without_clip(axis: Axes, lines: Sequence[Line], name: str, title: str, unit: str) -> None:
    """A curve of Prefix-RFT and of the same without the entropy clip."""
    for method, label in (("prefix-rft", "with the clip"), ("prefix-rft-all", "without"), ("rft", "rft")):
        if runs := runs_of(lines, method):
            draw_band(axis, runs[0]["curve"]["step"], column(runs, name), label, method)
    axis.set_ylim(0, None)
    axis.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    axis.set_xlabel("step")
    axis.set_ylabel(unit)
    axis.set_title(title, loc="left")
    axis.legend()
    axis.grid(alpha=0.3)


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
    axis.set_xlabel("% of the run")
    axis.set_ylabel("hybrid minus on-policy reward")
    axis.set_title("the prefix's advantage", loc="left")
    axis.legend()
    axis.grid(alpha=0.3)


def main_panels(stored: dict[str, list[Line]]) -> list[Panel]:
    """Three a regime: accuracies of either kind, and curves."""
    panels: list[Panel] = []
    for regime in ("habit", "silent"):
        lines = [line for line in stored[regime] if not line["trial"]]
        if lines:
            panels += [partial(draw_accuracies, lines=lines, regime=regime, kind=kind) for kind in KINDS]
            panels += [partial(draw_curves, lines=lines, regime=regime, against="step")]
    return panels


def detail_panels(stored: dict[str, list[Line]]) -> list[Panel]:
    habit, scarce = (stored[regime] for regime in ("habit", "scarce"))
    panels: list[Panel] = []
    for regime in ("habit", "silent"):
        if any(runs_of(stored[regime], name) for name in SHOWN):
            panels += [partial(draw_curves, lines=stored[regime], regime=regime, against="tokens")]
            panels += [partial(draw_levels, lines=stored[regime], regime=regime)]
    if any(not line["trial"] for line in scarce):
        panels += [partial(draw_demonstrations, lines=scarce, kind=kind) for kind in KINDS]
    if any(runs_of(habit, name) for name in ABLATIONS):
        panels += [partial(draw_ablations, lines=habit, kind=kind) for kind in KINDS]
    if runs_of(habit, "prefix-rft"):
        told = {"length": ("response length", "tokens"), "entropy": ("entropy of the policy", "nats per own token")}
        for name, (title, unit) in told.items():
            panels += [partial(draw_with_and_without_clip, lines=habit, name=name, title=title, unit=unit)]
        panels += [partial(draw_advantage, stored=stored)]
    return panels


def draw_all(stored: dict[str, list[Line]], folder: Path) -> list[Path]:
    """Write the figures that there are runs for."""
    written = []
    for name, panels in (("main.png", main_panels(stored)), ("details.png", detail_panels(stored))):
        if panels:
            with matplotlib.rc_context(TYPE):
                figure, axes = sheet(len(panels), 2.7)
                for panel, axis in zip(panels, axes):
                    panel(axis)
                written.append(save(figure, folder / name))
    return written
