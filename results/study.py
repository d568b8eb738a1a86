"""The small study of the README: every method tuned on validation, then three seeds on the test set.

    python results/study.py tune       one seed, a grid of learning rates per method, validation problems only
    python results/study.py final      seeds 0, 1, 2 of each method at its best setting, test problems
    python results/study.py report     study.json, study.md and study.png from the runs that are there

Runs go to runs/study/; a finished one is kept, so a stopped study goes on where it was. The best setting is the one
with the highest validation accuracy, greedy and at temperature 1 averaged, over all levels.
"""

import json
import statistics
import subprocess
import sys
from pathlib import Path

RUNS = Path("runs/study")
RATES = {
    "sft": [{"sft_lr": lr} for lr in (2.5e-4, 5e-4, 1e-3)],
    "rft": [{"lr": lr} for lr in (1e-4, 2e-4, 4e-4)],
    "prefix-rft": [{"lr": lr} for lr in (1e-4, 2e-4, 4e-4)],
    "sft-rft": [{"lr": lr} for lr in (1e-4, 2e-4, 4e-4)],  # its sft stage is the tuned sft
}
SEEDS = (0, 1, 2)
VALIDATION = {"test_data": "data/recipes/validation.jsonl", "eval_every": 0, "save_every": 0, "eval_samples": 2}


def run(name: str, settings: dict) -> dict:
    """Train unless it is done -> the run's eval.json."""
    folder = RUNS / name
    words = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    scores = folder / "eval.json"
    if not scores.exists() or "trained" not in json.loads(scores.read_text()):
        print(name, *words, flush=True)
        command = [sys.executable, "train.py", *words, "--out", str(folder), "--resume", "auto"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return json.loads(scores.read_text())


def tuning_score(scores: dict) -> float:
    return statistics.mean(scores["trained"][kind]["all"]["accuracy"] for kind in ("test", "test_sampled"))


def tune() -> dict[str, dict]:
    """-> the best setting of every method; the table of all tried goes to results/tuning.json."""
    best: dict[str, dict] = {}
    table = []
    for method, grid in RATES.items():
        tried = []
        for setting in grid:
            setting = setting | ({"sft_lr": best["sft"]["sft_lr"]} if method == "sft-rft" else {})
            label = "-".join(f"{key}{value:g}" for key, value in setting.items())
            score = tuning_score(run(f"tune-{method}-{label}", {"method": method} | setting | VALIDATION))
            tried.append((score, setting))
            table.append({"method": method, "setting": setting, "validation": score})
        best[method] = max(tried, key=lambda pair: pair[0])[1]
    Path("results/tuning.json").write_text(json.dumps({"tried": table, "best": best}, indent=1) + "\n")
    return best


def final() -> None:
    best = json.loads(Path("results/tuning.json").read_text())["best"]
    for seed in SEEDS:
        for method in RATES:
            run(f"{method}-seed{seed}", {"method": method, "seed": seed} | best[method])


def report() -> None:
    """Every seed, mean and standard deviation, by level; a figure of the curves of seed 0."""
    tuning = json.loads(Path("results/tuning.json").read_text())
    rows, lines = [], []
    for kind, title in (("test", "greedy"), ("test_sampled", "temperature 1")):
        lines += [f"\nTest accuracy in %, {title}: mean ± standard deviation of seeds {SEEDS} (each seed)\n"]
        lines += ["| method | setting | easy | medium | hard | ood | all |", "|---|---|---|---|---|---|---|"]
        for method in ("base", *RATES):
            cells = []
            for level in ("easy", "medium", "hard", "ood", "all"):
                who = "base" if method == "base" else "trained"
                files = [RUNS / f"{'rft' if method == 'base' else method}-seed{seed}" / "eval.json" for seed in SEEDS]
                values = [100 * json.loads(f.read_text())[who][kind][level]["accuracy"] for f in files]
                rows.append({"method": method, "kind": kind, "level": level, "seeds": values})
                each = " ".join(f"{value:.1f}" for value in values)
                spread = f" ± {statistics.stdev(values):.1f} ({each})" if len(set(values)) > 1 else ""
                cells.append(f"{statistics.mean(values):.1f}{spread}")
            setting = ", ".join(f"{key} {value:g}" for key, value in tuning["best"].get(method, {}).items())
            lines.append(f"| {method} | {setting} | " + " | ".join(cells) + " |")
    Path("results/study.json").write_text(json.dumps({"tuning": tuning, "rows": rows}, indent=1) + "\n")
    Path("results/study.md").write_text("\n".join(lines).lstrip() + "\n")
    folders = [str(RUNS / f"{method}-seed0") for method in ("rft", "sft-rft", "prefix-rft")]
    subprocess.run([sys.executable, "plot.py", *folders, "--out", "results/study.png"], check=True)


if __name__ == "__main__":
    steps = {"tune": tune, "final": final, "report": report}
    if len(sys.argv) != 2 or sys.argv[1] not in steps:
        sys.exit(f"usage: python results/study.py {'|'.join(steps)}")
    steps[sys.argv[1]]()
