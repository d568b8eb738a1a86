"""Figures: the curves of one run or of several laid on one sheet; evaluations side by side.

    python plot.py runs/prefix-rft-001                          -> runs/prefix-rft-001/curves.png
    python plot.py runs/rft-001 runs/prefix-rft-001                -> curves.png: several runs, a colour each
    python plot.py --compare evals/a evals/b [--beside-paper]      -> compare.png, and tables of evaluations

A panel whose metric is 0 or missing in all runs (an SFT run has no reward, RFT no prefixes) is left out; an accuracy
or a reward of 0 is shown. Reads metrics.jsonl and eval.json of runs, results.json of evaluations.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from evaluation.report import cells, compare_tables, label, percent, problem_scores, read_results, shared_cells
from evaluation.statistics import interval, powers_of_two
from support.checkpoint import read_json

PANELS = {  # title: the metrics it shows, as (name, legend) pairs
    "reward (mean of 0 / 1)": (("reward_on_policy", "on-policy rows"), ("reward_hybrid", "hybrid rows")),
    "share of the demonstration given": (("prefix_fraction", ""),),
    "prefix tokens per step": (("prefix_tokens", "all"), ("prefix_tokens_kept", "kept by the entropy clip")),
    "entropy of the policy (nats per token)": (("entropy", ""),),
    "response length (tokens)": (("response_tokens", ""),),
    "cut off or without a readable answer": (("truncated", "cut off"), ("unread", "unread")),
    "groups whose rewards are all equal": (("equal_reward_groups", ""),),
    "gradient norm": (("grad_norm", ""),),
}
STYLES = ("-", "--", ":", "-.")


def read_run(folder: Path) -> dict[str, Any]:
    """{"name", "metrics": rows of metrics.jsonl, "scores": eval.json}; ValueError where one is missing or damaged."""
    log = folder / "metrics.jsonl"
    if not log.exists() or not log.stat().st_size:
        raise ValueError(f"{folder} is not a run folder with steps in it: no metrics.jsonl")
    metrics = []
    for number, line in enumerate(log.read_bytes().splitlines(), 1):
        try:
            row = json.loads(line)
            metrics.append(row | {"step": int(row["step"])})
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{log}:{number}: not valid JSON of a step, found {line[:40]!r}: delete it") from error
    scores = folder / "eval.json"
    return {"name": folder.name, "metrics": metrics, "scores": read_json(scores) if scores.exists() else {}}


def points(run: dict[str, Any], metric: str) -> tuple[list[int], list[float]]:
    """Steps and values of a metric, where it has one; an evaluation of the base stands at step 0. None at all for
    the prefix tokens of a run without prefixes."""
    pairs = [(row["step"], row[metric]) for row in run["metrics"] if row.get(metric) is not None]
    if metric.startswith("prefix_tokens") and not any(value for _, value in pairs):
        pairs = []
    base = run["scores"].get("base", {}).get("validation", {}).get(metric.removeprefix("eval_"))
    if metric.startswith("eval_") and base:
        pairs.insert(0, (0, base["accuracy"]))
    return [step for step, _ in pairs], [value for _, value in pairs]


def smooth(values: list[float], width: int) -> list[float]:
    """Mean of the last `width` values at each place."""
    return [sum(values[max(0, i + 1 - width) : i + 1]) / min(width, i + 1) for i in range(len(values))]


def draw(runs: list[Path], target: Path) -> Path:
    """Write one sheet of curves of all `runs` to `target`: accuracy by level first, then PANELS."""
    loaded = [read_run(folder) for folder in runs]
    levels = dict.fromkeys(
        key
        for run in loaded
        for row in run["metrics"]
        for key in row
        if key.startswith("eval_") and key != "eval_all"
    )
    if len(loaded) == 1:
        panels = {"validation accuracy, greedy": tuple((level, level[5:]) for level in levels) or (("eval_all", ""),)}
    else:  # a panel for each level, or the lines of several runs could not be told apart
        panels = {f"validation accuracy, greedy: {level[5:]}": ((level, ""),) for level in (*levels, "eval_all")}
    panels |= PANELS
    panels = {title: metrics for title, metrics in panels.items() if worth_a_panel(loaded, metrics)}
    rows = -(-len(panels) // 3)
    figure, axes = plt.subplots(rows, 3, figsize=(15, 3.6 * rows), squeeze=False, sharex=True, layout="constrained")
    for axis, (title, metrics) in zip(axes.flat, panels.items()):
        draw_panel(axis, loaded, title, metrics)
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    legend = "thin: each step; thick: mean of 10 steps" + "; dotted: SFT ends" * any(map(sft_end, loaded))
    figure.suptitle(", ".join(run["name"] for run in loaded) + f"   ({legend})")
    return save(figure, target)


def worth_a_panel(runs: list[dict[str, Any]], metrics: tuple[tuple[str, str], ...]) -> bool:
    """Whether a run has one of the metrics, and not as 0 only; an accuracy or a reward may be 0."""
    return any(
        value or metric.startswith(("eval_", "reward"))
        for run in runs
        for metric, _ in metrics
        for value in points(run, metric)[1]
    )


def sft_end(run: dict[str, Any]) -> int | None:
    """The last step of an SFT stage before another stage; None without one. A row of an SFT step has no reward."""
    steps = [row["step"] for row in run["metrics"] if "reward" not in row]
    return steps[-1] if steps and steps[-1] < run["metrics"][-1]["step"] else None


def draw_panel(axis: plt.Axes, runs: list[dict[str, Any]], title: str, metrics: tuple[tuple[str, str], ...]) -> None:
    """A colour for each metric of a single run, or for each of several runs (their metrics differ in style then)."""
    one = len(runs) == 1
    for r, run in enumerate(runs):
        for m, (metric, legend) in enumerate(metrics):
            steps, values = points(run, metric)
            if not steps:
                continue
            colour, style = (f"C{m}", "-") if one else (f"C{r}", STYLES[m % 4])
            name = legend if one else ", ".join(filter(None, (run["name"], legend)))
            if metric.startswith("eval_"):
                axis.plot(steps, values, style, color=colour, label=name, clip_on=False, marker="o", markersize=3)
            else:
                axis.plot(steps, values, style, color=colour, alpha=0.2, linewidth=0.8)
                axis.plot(steps, smooth(values, 10), style, color=colour, label=name, clip_on=False)
        if end := sft_end(run):
            axis.axvline(end, color="grey" if one else f"C{r}", linestyle=":", linewidth=0.8)
    axis.set_ylim(bottom=max(0, axis.get_ylim()[0]))  # none is negative; lines at 0 stay whole: clip_on
    axis.set_title(title, fontsize=10)
    axis.set_xlabel("step")
    axis.tick_params(labelbottom=True)  # shared axes show it in the last row only
    axis.grid(alpha=0.3)
    if any(axis.get_legend_handles_labels()[1]):
        axis.legend(fontsize=7)


# ---- the figure's file


def check_target(target: Path) -> None:
    """ValueError if no figure can be written to `target`."""
    if target.is_dir():
        raise ValueError(f"{target} is a folder: name the figure's file, for example --out {target / 'curves.png'}")
    if target.suffix and target.suffix[1:].lower() not in plt.Figure().canvas.get_supported_filetypes():
        raise ValueError(f"{target}: a figure cannot be written as {target.suffix}: end its name with .png or .pdf")
    above = next(parent for parent in target.absolute().parents if parent.exists())
    if not above.is_dir():
        raise ValueError(f"{target}: {above} is a file, not a folder: choose another --out")


def save(figure: plt.Figure, target: Path) -> Path:
    """Write the figure whole or not at all, and close it; its folder is made where there is none. OSError names
    `target`, not the temporary file."""
    partial = target.with_name(f"{target.stem}.partial{target.suffix or '.png'}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(partial, dpi=110)
        partial.replace(target)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OSError(f"{target} cannot be written: {error.strerror or error}") from error
    finally:
        plt.close(figure)
    return target


# ---- evaluations


def plot_pass_at_k(axis: plt.Axes, evaluations: list[dict[str, Any]], name: str, level: str) -> None:
    """pass@k over k on a log2 axis, a line for each evaluation; the band is the 95% interval over problems."""
    for e, evaluation in enumerate(evaluations):
        samples = evaluation["results"][name][level]["samples"]
        ks = powers_of_two(samples)
        scores = [list(problem_scores(evaluation, name, level, k).values()) for k in ks]
        bands = [interval(values) for values in scores]
        axis.plot(ks, [sum(v) / len(v) for v in scores], "o-", color=f"C{e}", markersize=3, label=evaluation["name"])
        axis.fill_between(ks, [low for low, _ in bands], [high for _, high in bands], color=f"C{e}", alpha=0.15)
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter(lambda k, _: f"{k:g}")
    axis.set_xlabel("k")
    axis.set_ylabel("pass@k")
    axis.set_ylim(0, 1)
    axis.set_title(label(name, level), fontsize=10)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7)


def plot_accuracy(axis: plt.Axes, evaluations: list[dict[str, Any]], shared: list[tuple[str, str]]) -> None:
    """A group of bars for each benchmark or level, a bar for each evaluation, with its 95% interval."""
    width = 0.8 / len(evaluations)
    for e, evaluation in enumerate(evaluations):
        rows = [cells(evaluation)[key] for key in shared]
        places = [g + (e - (len(evaluations) - 1) / 2) * width for g in range(len(shared))]
        heights = [row["accuracy"] for row in rows]
        down = [max(0.0, row["accuracy"] - row["low"]) for row in rows]
        up = [max(0.0, row["high"] - row["accuracy"]) for row in rows]
        axis.bar(places, heights, width, color=f"C{e}", yerr=[down, up], capsize=2, label=evaluation["name"])
        for place, height, row in zip(places, heights, rows):
            text = percent(height)
            axis.annotate(text, (place, row["high"]), ha="center", va="bottom", fontsize=6)
    axis.set_xticks(range(len(shared)), [label(*key) for key in shared], fontsize=7, rotation=20, ha="right")
    axis.set_ylim(0, 1.05)
    axis.set_title("accuracy (avg@k) with 95% intervals", fontsize=10)
    axis.grid(axis="y", alpha=0.3)
    axis.legend(fontsize=7)


def draw_pass_at_k(folders: list[Path], target: Path, with_accuracy: bool = False) -> Path:
    """A panel of pass@k for each benchmark and level with several samples, after one of accuracies if it is asked
    for or there is nothing else to show."""
    evaluations = [read_results(folder) for folder in folders]
    shared = shared_cells(evaluations)
    curves = [(n, l) for n, l in shared if all(e["results"][n][l]["samples"] > 1 for e in evaluations)]
    first = 1 if with_accuracy or not curves else 0
    columns = min(3, first + len(curves))
    lines = -(-(first + len(curves)) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(5 * columns, 3.8 * lines), squeeze=False, layout="constrained"
    )
    if first:
        plot_accuracy(axes.flat[0], evaluations, shared)
    for axis, key in zip(axes.flat[first:], curves):
        plot_pass_at_k(axis, evaluations, *key)
    for axis in axes.flat[first + len(curves) :]:
        axis.remove()
    return save(figure, target)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Draw the curves of runs, or compare evaluations.", allow_abbrev=False
    )
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="run folders; evaluation folders")
    parser.add_argument("--compare", action="store_true", help="the folders are evaluations: set them side by side")
    parser.add_argument("--beside-paper", action="store_true", help="with --compare: add the paper's results")
    parser.add_argument(
        "--out",
        type=Path,
        help="the figure's file (default: curves.png in the run's folder; of several runs curves.png, with --compare "
        "compare.png, in the current folder)",
    )
    args = parser.parse_args()
    runs_target = args.folders[0] / "curves.png" if len(args.folders) == 1 else Path("curves.png")
    target = args.out or (Path("compare.png") if args.compare else runs_target)
    try:
        if args.out:
            check_target(args.out)
        resolved = [folder.resolve() for folder in args.folders]
        if twice := [folder for i, folder in enumerate(args.folders) if resolved[i] in resolved[:i]]:
            raise ValueError(f"{twice[0]} is given twice: name each folder once")
        if args.beside_paper and not args.compare:
            raise ValueError("--beside-paper needs --compare and evaluation folders")
        if args.compare:
            print(compare_tables([read_results(folder) for folder in args.folders], args.beside_paper))
            print(draw_pass_at_k(args.folders, target, with_accuracy=True))
        else:
            print(draw(args.folders, target))
    except (ValueError, OSError) as error:
        print(f"plot.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
