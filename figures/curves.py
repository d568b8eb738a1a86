"""This file draws and compares the curves of runs from metrics.jsonl, eval.json and config.json in their run folders.

The figure of one run has a panel for each quantity and a colour for each metric. The figure of several runs has fewer
panels, a colour for each run and one legend. Its horizontal axis counts tokens instead of steps if only some of the
steps are supervised updates. Runs that were evaluated on different problems are refused. Each vertical axis starts at
0 and reaches at least Panel.top, so that small noise looks small. A panel is left out if its metrics are missing or
always 0 in all runs.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from evaluation.report import markdown_table, not_alike, percent
from evaluation.statistics import natural_order
from figures.figure import COLOURS, MARKERS, STYLES, TYPE, in_percent, save, sheet
from support.errors import InputError
from support.files import check_object, read_json, read_log

Run = dict[str, Any]  # keys: "name", "metrics" (rows of metrics.jsonl), "scores" (eval.json), "config" (config.json)

SMOOTH = 10  # number of steps over which a thick curve averages
REACHED = 0.6  # accuracy for the table column "steps to 60%"
MOST_LEVELS = 6  # a panel with more levels is hard to read, so it shows only "all"
NOTE = f"thin: each step, thick: mean of the last {SMOOTH} steps; band: 95% interval; dotted: SFT ends, {REACHED:.0%}"


@dataclass(frozen=True)
class Panel:
    """One panel of a figure of curves."""

    title: str
    unit: str  # label of the vertical axis
    metrics: tuple[tuple[str, str], ...]  # (name of the metric, its label in the legend)
    top: float = 0.0  # the vertical axis reaches at least this value
    share: bool = True  # whether the axis shows the values in percent


REWARD = Panel("reward", "mean reward", (("reward_on_policy", "on-policy"), ("reward_hybrid", "hybrid")), 1, False)
FRACTION = Panel("demonstration given", "% of its tokens", (("prefix_fraction", "hybrid"),), 1)
ENTROPY = Panel("entropy of the policy", "nats per own token", (("entropy", ""),), 0.5, False)
LENGTH = Panel("response length", "tokens", (("response_tokens", ""),), 20, False)
PANELS = (
    REWARD,
    FRACTION,
    Panel("prefix tokens", "tokens per step", (("prefix_tokens", "all"), ("prefix_tokens_kept", "kept")), 10, False),
    ENTROPY,
    LENGTH,
    Panel("lost responses", "% of sampled rows", (("truncated", "cut off"), ("unread", "no readable answer")), 0.1),
    Panel("groups with equal rewards", "% of groups", (("equal_reward_groups", ""),), 1),
    Panel("stopped by PPO's clip", "% of weighted tokens", (("clip_fraction", ""),), 0.05),
    Panel("gradient norm", "L2 norm before clipping", (("grad_norm", ""),), 0.1, False),
)
COMPACT = (  # panels for a figure of several runs
    Panel("reward of on-policy rows", "mean reward", REWARD.metrics[:1], 1, False),
    FRACTION,
    ENTROPY,
    LENGTH,
)


# ---- reading


def read_run(folder: Path) -> Run:
    """Returns the logs of a run folder. Raises InputError if the logs are missing or damaged."""
    log = folder / "metrics.jsonl"
    run: Run = {"name": folder.name, "metrics": read_log(log, "step") if log.exists() else []}
    if not run["metrics"]:
        raise InputError(f"{folder} is not a run folder with steps in it: metrics.jsonl has no complete line")
    for name, file in (("scores", "eval.json"), ("config", "config.json")):
        run[name] = read_json(folder / file) if (folder / file).exists() else {}
    for level, row in base_scores(run).items():
        check_object(row, f"{folder / 'eval.json'}: base validation {level}", ("accuracy", "problems"))
    return run


def base_scores(run: Run) -> dict[str, dict[str, float]]:
    """Returns {level or "all": validation scores} of the base model, or {} without such scores."""
    return (run["scores"].get("base") or {}).get("validation") or {}


def levels(runs: list[Run]) -> list[str]:
    """Returns the levels on which the runs were evaluated, in natural order, with "all" last."""
    names = [level for run in runs for level in base_scores(run)]
    for row in (row for run in runs for row in run["metrics"]):
        for key in (key for key in row if key.startswith("eval_")):
            stem, _, end = key.rpartition("_")
            # eval_LEVEL_low and eval_LEVEL_high are ends of an interval, not levels
            if not (end in ("low", "high") and stem in row):
                names.append(key.removeprefix("eval_"))
    return [*natural_order(name for name in names if name != "all"), *(["all"] if "all" in names else [])]


def evaluations(run: Run, level: str) -> list[tuple[int, float, float | None, float | None]]:
    """Returns (step, accuracy, low, high) for each validation of a level. Step 0 is the base model; low and high are
    None if the log has no interval."""
    base = base_scores(run).get(level)
    points = [(0, base["accuracy"], base.get("low"), base.get("high"))] if base else []
    name = f"eval_{level}"
    for row in run["metrics"]:
        if row.get(name) is not None:
            points.append((row["step"], row[name], row.get(f"{name}_low"), row.get(f"{name}_high")))
    return points


def steps_to(run: Run, share: float) -> int | None:
    """Returns the first evaluated step with a validation accuracy (all levels) of at least `share`, or None."""
    return next((step for step, accuracy, *_ in evaluations(run, "all") if accuracy >= share), None)


def add_places(runs: list[Run]) -> str:
    """Adds to each run the key "places": {step: its place on the horizontal axis}. Returns the axis' label.

    A supervised update costs less than a step of reinforcement. So if the figure of several runs has both, a step's
    place is the number of tokens that the run has sampled and trained by then. Otherwise it is the step itself."""
    by_tokens = len(runs) > 1 and len({"reward" in row for run in runs for row in run["metrics"]}) == 2
    for run in runs:
        run["places"], tokens = {0: 0}, 0
        for row in run["metrics"]:
            tokens += sum(row.get(name, 0) for name in ("sampled_tokens", "trained_tokens", "relift_tokens"))
            run["places"][row["step"]] = tokens / 1000 if by_tokens else row["step"]
    return "tokens sampled and trained, in 1000" if by_tokens else "step"


def points(run: Run, metric: str) -> tuple[list[int], list[float]]:
    """Returns the steps at which a metric was logged, and its values there."""
    rows = [row for row in run["metrics"] if row.get(metric) is not None]
    return [row["step"] for row in rows], [row[metric] for row in rows]


def sft_end(run: Run) -> int | None:
    """Returns the last step of an SFT stage that another stage follows, or None. A step belongs to an SFT stage if
    its row in metrics.jsonl has no reward."""
    steps = [row["step"] for row in run["metrics"] if "reward" not in row]
    return steps[-1] if steps and steps[-1] < run["metrics"][-1]["step"] else None


# ---- comparing


def check_alike(runs: list[Run]) -> str:
    """Returns a line for each setting, other than the method, in which the runs differ. The validation problems
    differ if the hashes of their files do.

    Raises InputError for runs that were evaluated on different numbers of problems.
    """
    sizes = []
    for run in runs:
        if scores := base_scores(run):
            sizes.append((run["name"], ", ".join(f"{level}: {row['problems']}" for level, row in scores.items())))
    if len({size for _, size in sizes}) > 1:
        names, numbers = " and ".join(name for name, _ in sizes), "; ".join(f"{name}: {size}" for name, size in sizes)
        raise InputError(f"{names} were evaluated on different problems ({numbers}): draw each alone")
    names = ("data", "eval_data", "model", "reward", "eval_response_tokens")
    settings = {name: [run["config"].get(name) for run in runs] for name in names}
    hashes = [(run["config"].get("made_of") or {}).get("validation", "")[:8] for run in runs]
    if all(hashes):
        settings["file of validation problems"] = hashes
    return not_alike([run["name"] for run in runs], settings)


def compare_runs(folders: list[Path]) -> str:
    """Returns a table of several runs: validation accuracy at the start and at the end, and the number of steps until
    the accuracy REACHED."""
    runs = [read_run(folder) for folder in folders]
    rows = [
        ["validation, greedy, all levels", "base %", "last %", "95% interval", "at step", f"steps to {REACHED:.0%}"]
    ]
    for run in runs:
        points = evaluations(run, "all")
        if not points:
            rows.append([run["name"], *["–"] * 5])
            continue
        step, accuracy, low, high = points[-1]
        base = percent(points[0][1]) if points[0][0] == 0 else "–"
        reached = steps_to(run, REACHED)
        bounds = "–" if low is None or high is None else percent(low, high)
        rows.append(
            [run["name"], base, percent(accuracy), bounds, str(step), "–" if reached is None else str(reached)]
        )
    return markdown_table(rows) + check_alike(runs)


# ---- drawing


def accuracy_panels(runs: list[Run]) -> list[Panel]:
    """Returns the panels of validation accuracy: for one run a single panel with a line per level, for several runs
    one panel per level."""
    shown = levels(runs)
    if len(shown) == 2 or len(shown) > MOST_LEVELS + 1:  # the curve of a single level equals that of "all"
        shown = shown[-1:]
    if len(runs) > 1:
        return [Panel(f"validation accuracy: {level}", "% right", ((f"eval_{level}", ""),), 1) for level in shown]
    reached = steps_to(runs[0], REACHED)
    title = "validation accuracy, greedy" + ("" if reached is None else f" ({REACHED:.0%} of all at step {reached})")
    return [Panel(title, "% right", tuple((f"eval_{level}", level) for level in shown), 1)] if shown else []


def draw(folders: list[Path], target: Path) -> Path:
    """Writes one figure with the curves of all runs to `target`: the panels of accuracy first, then PANELS, or
    COMPACT for several runs."""
    runs = [read_run(folder) for folder in folders]
    unlike = check_alike(runs)
    one = len(runs) == 1
    accuracy = accuracy_panels(runs)
    panels = [panel for panel in (*accuracy, *(PANELS if one else COMPACT)) if worth_a_panel(runs, panel)]
    if not panels:
        raise InputError(f"{' and '.join(map(str, folders))}: metrics.jsonl has steps, but no metrics to draw")
    label = add_places(runs)
    last = max(place for run in runs for place in run["places"].values())
    with matplotlib.rc_context(TYPE):
        figure, axes = sheet(len(panels), 2.2, wide_first=one and bool(accuracy), xlim=(0, last))
        for axis, panel in zip(axes, panels):
            draw_panel(axis, runs, panel)
            axis.set_xlabel(label)
        if one:
            figure.suptitle(runs[0]["name"], x=0.01, ha="left", fontsize=10, weight="bold")
            if accuracy:
                legend = axes[0].legend(loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False)
                legend.set_in_layout(False)  # the grid's third column has room for the legend, so panels stay
        else:
            lines, words = run_handles(axes[0], runs)
            figure.legend(lines, words, loc="outside upper left", ncols=min(4, len(runs)), frameon=False)
        figure.supxlabel(f"{NOTE}\n{unlike}".strip(), x=0.01, ha="left", fontsize=7.5)
    return save(figure, target)


def run_handles(axis: Axes, runs: list[Run]) -> tuple[list[Any], list[str]]:
    """Returns the entries of the legend for several runs: one line and one label per run."""
    lines, words = [], []
    for r, run in enumerate(runs):
        reached = steps_to(run, REACHED)
        lines += axis.plot([], [], STYLES[r // len(COLOURS) % 4], color=COLOURS[r % len(COLOURS)])
        words.append(run["name"] + ("" if reached is None else f" ({REACHED:.0%} at step {reached})"))
    return lines, words


def worth_a_panel(runs: list[Run], panel: Panel) -> bool:
    """Returns whether any run has a metric of `panel` with a value other than 0. A panel of accuracy or reward is
    worth drawing even if all its values are 0."""
    for run in runs:
        for metric, _ in panel.metrics:
            if metric.startswith("eval_"):
                if evaluations(run, metric.removeprefix("eval_")):
                    return True
            elif any(value or metric.startswith("reward") for value in points(run, metric)[1]):
                return True
    return False


def draw_panel(axis: Axes, runs: list[Run], panel: Panel) -> None:
    """Draws one panel. With a single run each metric has a colour; with several runs each run has a colour, and a
    panel has one metric."""
    highest = panel.top
    for r, run in enumerate(runs):
        for m, (metric, legend) in enumerate(panel.metrics):
            place = m if len(runs) == 1 else r
            colour, style = COLOURS[place % len(COLOURS)], STYLES[place // len(COLOURS) % 4]
            name = legend if len(runs) == 1 else ""
            if metric.startswith("eval_"):
                style += MARKERS[place % len(MARKERS)]
                values = draw_accuracy(axis, run, metric.removeprefix("eval_"), colour, style, name)
            else:
                values = draw_metric(axis, run, metric, colour, style, name)
            highest = max([highest, *values])
        if end := sft_end(run):
            axis.axvline(run["places"][end], color="grey", linestyle=":", linewidth=0.8)
    # no drawn value is negative, so the axis begins at 0
    axis.set_ylim(0, highest * (1 if panel.top == 1 and highest <= 1 else 1.05))
    if panel.share:
        axis.yaxis.set_major_formatter(in_percent)
    named = bool(axis.get_legend_handles_labels()[1]) and not panel.metrics[0][0].startswith("eval_")
    if named:  # the legend stands above the panel, where it hides no curve
        axis.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False, borderpad=0.2, columnspacing=1)
    axis.set_title(panel.title, loc="left", pad=18 if named else None)
    axis.set_ylabel(panel.unit)
    axis.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    axis.grid(alpha=0.3)
    if len(runs) > 1 and panel.metrics[0][0] == "eval_all":
        axis.axhline(REACHED, color="grey", linestyle=":", linewidth=0.8)


def draw_accuracy(axis: Axes, run: Run, level: str, colour: str, style: str, name: str) -> list[float]:
    """Draws the validation accuracy of a level as points, with a band of 95% intervals. Returns the drawn
    accuracies."""
    points = evaluations(run, level)
    problems = base_scores(run).get(level, {}).get("problems")
    label = f"{name}, {problems} problems" if name and problems else name
    places, values = [run["places"][step] for step, *_ in points], [accuracy for _, accuracy, *_ in points]
    axis.plot(places, values, style, color=colour, label=label, clip_on=False, markersize=3.5, linewidth=1.2)
    band = [(run["places"][step], low, high) for step, _, low, high in points if low is not None and high is not None]
    if len(band) > 1:
        axis.fill_between(*zip(*band), color=colour, alpha=0.12, linewidth=0)
    return values


def draw_metric(axis: Axes, run: Run, metric: str, colour: str, style: str, name: str) -> list[float]:
    """Draws a metric as a thin line, and its mean over the last SMOOTH steps as a thick line. Returns the values of
    the thin line."""
    steps, values = points(run, metric)
    if not steps:
        return []
    places = [run["places"][step] for step in steps]
    axis.plot(places, values, style, color=colour, alpha=0.3, linewidth=0.7)
    axis.plot(places, smooth(values, SMOOTH), style, color=colour, label=name, clip_on=False, linewidth=1.4)
    return values


def smooth(values: list[float], width: int) -> list[float]:
    """Returns the moving average of `values`: the mean of the last `width` values at each position."""
    return [sum(values[max(0, i + 1 - width) : i + 1]) / min(width, i + 1) for i in range(len(values))]
