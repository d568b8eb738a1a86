"""This file reads and compares the stored runs of the second study, which varies the number of steps (the horizon)
and the demonstrations, over six base models.

It computes the accuracy of Prefix-RFT minus that of each other method, for every cell, number of steps and
temperature, over base models. A cell is a set of training problems with their demonstrations. PROTOCOL.md has the
rules, and report.py writes the tables of this file into horizon/report.md.

Each file horizon/NAME.json is a tuning trial (`trial` 1 to 4), a run (`trial` 0) or a base model (`method` "base").
The file's field `budgets` has, for each number of steps, the accuracy at each temperature and the tokens and CPU
seconds used.

Left out is the code that makes the runs: results/horizon.py of commit c5e0165 (PROTOCOL.md).
"""

import json
from pathlib import Path
from typing import Any

import pandas as pd
from scipy.stats import t

from evaluation.report import in_points, markdown_table, percent

STORE = Path("results/horizon")
# a cell is named by its set of training problems, the number of demonstrations, and the expert if it is a weak one
CELLS = ("habit-512", "silent-128", "habit-32", "habit-512-short", "silent-8")
BUDGETS = (60, 120, 240, 480)  # numbers of steps after which runs are evaluated
TEMPERATURES = ("greedy", "T = 0.6", "T = 1")
OURS, RIVALS = "prefix-rft", ("sft-rft", "luffy", "rft")
# the one primary contrast: its cell, number of steps, temperature and rival
PRIMARY = ("habit-512", 480, "T = 0.6", "sft-rft")
KEYS = ["cell", "budget", "temperature"]
Stored = dict[str, dict[str, Any]]  # the contents of the files horizon/NAME.json, by NAME


def read_stored(store: Path = STORE) -> Stored:
    return {path.stem: json.loads(path.read_bytes()) for path in sorted(store.glob("*.json"))}


def trial_score(line: dict[str, Any]) -> float:
    """Returns the score that chooses among trials: the mean validation accuracy over the temperatures; 0 if the trial
    diverged."""
    (last,) = line["budgets"].values()
    return 0.0 if "diverged" in last else sum(last[name]["all"] for name in TEMPERATURES) / len(TEMPERATURES)


def run_frame(stored: Stored) -> pd.DataFrame:
    """Returns a row for each run, number of steps and temperature: the accuracy (0 if the run diverged), the tokens
    and the CPU seconds used."""
    costs, rows = ["sampled", "trained", "supervised", "seconds"], []
    for line in (line for line in stored.values() if line["method"] != "base" and not line["trial"]):
        for budget, scores in line["budgets"].items():
            for name in TEMPERATURES:
                keys = [line["cell"], int(budget), name, line["base"], line["method"]]
                rows.append([*keys, scores.get(name, {"all": 0.0})["all"], *map(scores.get, costs)])
    return pd.DataFrame(rows, columns=[*KEYS, "base", "method", "accuracy", *costs])


def difference_frame(runs: pd.DataFrame) -> pd.DataFrame:
    """Returns a row for each rival and base model: the accuracy of Prefix-RFT minus that of the rival."""
    wide = runs.pivot(index=[*KEYS, "base"], columns="method", values="accuracy").reindex(columns=[OURS, *RIVALS])
    differences = wide[list(RIVALS)].rsub(wide[OURS], axis=0)
    return differences.melt(ignore_index=False, var_name="rival", value_name="difference").dropna().reset_index()


def contrast_frame(runs: pd.DataFrame) -> pd.DataFrame:
    """Returns a row for each contrast (Prefix-RFT minus a rival): the mean difference over base models, its 95%
    interval and its p-value by Student's t (none for one base model). The column `holm` says which secondary
    contrasts Holm's correction leaves significant."""
    table = difference_frame(runs).groupby([*KEYS, "rival"])["difference"].agg(bases="count", mean="mean", std="std")
    error, freedom = table["std"] / table["bases"] ** 0.5, table["bases"] - 1
    reach = t.ppf(0.975, freedom) * error
    table["low"], table["high"] = table["mean"] - reach, table["mean"] + reach
    table["p"] = 2 * t.sf((table["mean"] / error).abs(), freedom)
    table["holm"] = holm(table["p"].drop(PRIMARY, errors="ignore").dropna())
    return table


def holm(p: pd.Series) -> pd.Series:
    """Returns which p-values are significant at 5% after Holm's correction.

    From the smallest on, each p-value is compared with 0.05 / (number of p-values not yet compared). The first
    p-value above its bound and all larger p-values are not significant."""
    ordered = p.sort_values()
    return (ordered <= 0.05 / (len(p) - pd.Series(range(len(p)), index=ordered.index))).cummin()


def cell_of(row: pd.Series) -> str:
    """Returns a contrast as text in points, in bold if Holm's correction leaves it significant."""
    if pd.isna(row["low"]):
        return f"{100 * row['mean']:+.1f}"
    text = in_points(row["mean"], row["low"], row["high"])
    return f"**{text}**" if row["holm"] == 1 else text


def contrast_table(contrasts: pd.DataFrame, cell: str) -> str:
    rows = [[f"{OURS} minus", "", "bases", *(f"{budget} steps" for budget in BUDGETS)]]
    for rival in RIVALS:
        for temperature in TEMPERATURES:
            keys = [(cell, budget, temperature, rival) for budget in BUDGETS]
            cells = [cell_of(contrasts.loc[key]) if key in contrasts.index else "–" for key in keys]
            counts = {f"{contrasts.loc[key]['bases']:.0f}" for key in keys if key in contrasts.index}
            if counts:
                rows.append([rival, temperature, " to ".join(sorted(counts)), *cells])
    return markdown_table(rows) if len(rows) > 1 else "No contrast yet.\n"


def run_table(runs: pd.DataFrame, cell: str) -> str:
    """Returns a table of the methods in a cell: the mean accuracy and the accuracy on each base model, and the mean
    cost of a run."""
    rows = [["method", "steps", *TEMPERATURES, "sampled", "trained", "supervised, in 1000 tokens", "CPU seconds"]]
    for (method, budget), group in runs[runs["cell"] == cell].groupby(["method", "budget"]):
        by_temperature = group.sort_values("base").groupby("temperature")["accuracy"]
        groups = [by_temperature.get_group(name) for name in TEMPERATURES]
        accuracies = [f"{percent(values.mean())} ({', '.join(map(percent, values))})" for values in groups]
        tokens = [f"{group[name].mean() / 1000:.0f}" for name in ("sampled", "trained", "supervised")]
        rows.append([method, str(budget), *accuracies, *tokens, f"{group['seconds'].mean():.0f}"])
    return markdown_table(rows)


def trial_rows(stored: Stored, cell: str) -> list[list[str]]:
    rows = []
    for name, line in stored.items():
        if line["trial"] and line["cell"] == cell:
            (scores,) = line["budgets"].values()
            settings = ", ".join(f"{key} {value:g}" for key, value in line["settings"].items())
            each = [percent(scores[name]["all"]) if name in scores else "diverged" for name in TEMPERATURES]
            rows.append([name.removeprefix(f"{cell}-"), settings, percent(trial_score(line)), *each])
    return rows


def report_text(stored: Stored) -> str:
    """Returns the text of horizon/report.md."""
    runs = run_frame(stored)
    contrasts = contrast_frame(runs)
    primary = contrasts.loc[PRIMARY] if PRIMARY in contrasts.index else None
    contrast = "no base yet" if primary is None else f"{cell_of(primary)}, {primary['bases']:.0f} of 6 bases"
    kinds = [
        "base model" if line["method"] == "base" else "trial" if line["trial"] else "run" for line in stored.values()
    ]
    parts = [
        "# Horizon × demonstrations, over base models\n\nWritten by `python results/report.py` from the files beside "
        f"it: {kinds.count('trial')} trials, {kinds.count('base model')} base models, {kinds.count('run')} runs.\n",
        f"**Primary contrast** (Prefix-RFT − SFT→RFT, {PRIMARY[0]}, {PRIMARY[1]} steps, {PRIMARY[2]}): {contrast}\n",
        "Differences in points with 95% intervals over bases; bold: significant at 5% by Holm's correction over the "
        f"{contrasts['holm'].count()} secondary contrasts stored so far.\n",
        "The runs come from machines of different speeds: compare tokens rather than CPU seconds.\n",
    ]
    for cell in CELLS:
        trials = trial_rows(stored, cell)
        if (runs["cell"] == cell).any():
            parts += [f"## {cell}\n", contrast_table(contrasts, cell)]
            parts += ["Accuracy in %: the mean (and the accuracy on each base model)\n", run_table(runs, cell)]
        if trials:
            header = ["trial", "settings", "validation: mean", *TEMPERATURES]
            parts += [f"## {cell}: trials, on validation problems\n", markdown_table([header, *trials])]
    return "\n".join(parts)
