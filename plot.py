"""Figures: the curves of one run, or of several laid on one sheet.

    python plot.py runs/prefix-rft-001                          -> runs/prefix-rft-001/curves.png
    python plot.py runs/rft-001 runs/prefix-rft-001 --out a.png    several runs, a colour each

A panel whose metric no run has (an SFT run has no reward) is left out. Reads metrics.jsonl and eval.json only.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

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
    """{"name", "metrics": rows of metrics.jsonl, "scores": eval.json}; ValueError for a folder without them."""
    log = folder / "metrics.jsonl"
    if not log.exists() or not log.stat().st_size:
        raise ValueError(f"{folder} is not a run folder with steps in it: no metrics.jsonl")
    metrics = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    scores = folder / "eval.json"
    loaded = json.loads(scores.read_text(encoding="utf-8")) if scores.exists() else {}
    return {"name": folder.name, "metrics": metrics, "scores": loaded}


def points(run: dict[str, Any], metric: str) -> tuple[list[int], list[float]]:
    """Steps and values of a metric, where it has one; an evaluation of the base stands at step 0."""
    pairs = [(row["step"], row[metric]) for row in run["metrics"] if row.get(metric) is not None]
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
    panels = {"validation accuracy, greedy": tuple((level, level[5:]) for level in levels) or (("eval_all", ""),)}
    panels |= PANELS
    panels = {title: ms for title, ms in panels.items() if any(points(run, m)[0] for run in loaded for m, _ in ms)}
    rows = -(-len(panels) // 3)
    figure, axes = plt.subplots(rows, 3, figsize=(15, 3.6 * rows), squeeze=False, layout="constrained")
    for axis, (title, metrics) in zip(axes.flat, panels.items()):
        for r, run in enumerate(loaded):
            for m, (metric, legend) in enumerate(metrics):
                steps, values = points(run, metric)
                if not steps:
                    continue
                one = len(loaded) == 1
                colour = f"C{m}" if one else f"C{r}"
                label = legend if one else ", ".join(filter(None, (run["name"], legend)))
                style, marker = ("-" if one else STYLES[m % 4]), "o" if metric.startswith("eval_") else None
                if metric.startswith("eval_"):
                    axis.plot(steps, values, style, color=colour, label=label, marker=marker, markersize=3)
                else:
                    axis.plot(steps, values, style, color=colour, alpha=0.2, linewidth=0.8)
                    axis.plot(steps, smooth(values, 10), style, color=colour, label=label)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[1] and any(axis.get_legend_handles_labels()[1]):
            axis.legend(fontsize=7)
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    figure.suptitle(", ".join(run["name"] for run in loaded) + "   (thin: each step; thick: mean of 10 steps)")
    partial = target.with_name(f"{target.stem}.partial{target.suffix or '.png'}")
    figure.savefig(partial, dpi=110)
    plt.close(figure)
    partial.replace(target)
    return target


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the curves of one or several runs.", allow_abbrev=False)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders")
    parser.add_argument("--out", type=Path, help="the figure's file (default: curves.png in the run, or compare.png)")
    args = parser.parse_args()
    target = args.out or (args.runs[0] / "curves.png" if len(args.runs) == 1 else Path("compare.png"))
    try:
        print(draw(args.runs, target))
    except (ValueError, OSError) as error:
        print(f"plot.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
