"""This file writes the report of an evaluation (results.json, results.md, tables on the terminal) and compares
several evaluations.

results.json has the following keys. "settings" is the content of settings.json. "results" is {benchmark: {level or
"all": a row of statistics.summarize}}, and "average" is the mean over the benchmarks. "right" is {benchmark: {level:
{problem id: number of right samples}}}. "rewards" is like "right" with the sum of rewards in place of the number;
"rewards" is present only if a reward lies between 0 and 1. figures/comparison.py draws the figures.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evaluation.statistics import (
    Answers,
    average_interval,
    mean,
    paired_difference,
    pass_at_k,
    powers_of_two,
    summarize,
)
from support.checkpoint import write_text
from support.errors import InputError
from support.files import read_json

Results = dict[str, Any]  # content of results.json of one evaluation

# the column "avg" of the paper's Table 1 is the mean over these six benchmarks
SIX = ("aime24", "aime25", "amc23", "math500", "minerva", "olympiad")
COLUMNS = (*SIX, "arc_c", "gpqa_diamond", "mmlu_pro")
# for each method: accuracies of Qwen2.5-Math-7B in % in the order of COLUMNS, and their average over SIX [paper,
# Table 1]
PUBLISHED = {
    "base": ([11.5, 4.9, 31.3, 43.6, 7.4, 15.6], 19.0),
    "SFT": ([22.2, 22.3, 52.8, 82.6, 40.8, 43.7], 44.1),
    "RFT": ([25.1, 15.3, 62.0, 84.4, 39.3, 46.8], 45.5),
    "SFT→RFT": ([25.8, 23.1, 62.7, 87.2, 39.7, 50.4], 48.2),
    "RFT + SFT": ([19.5, 16.4, 49.7, 80.4, 34.9, 39.4], 40.1),
    "UFT": ([], 44.2),
    "ReLIFT": ([28.2, 20.1, 64.9, 87.4, 33.8, 52.5], 47.8),
    "LUFFY": ([29.4, 23.1, 65.6, 87.6, 37.5, 57.2], 50.1),
    "Prefix-RFT": ([31.8, 26.4, 68.2, 88.4, 40.3, 55.7, 84.0, 39.1, 52.1], 51.8),
}


# ---- tables


def percent(low: float, high: float | None = None) -> str:
    """Returns a share in percent as text: 0.3125 gives "31.2". Two shares give an interval, "[20.1, 44.0]"."""
    return f"{100 * low:.1f}" if high is None else f"[{100 * low:.1f}, {100 * high:.1f}]"


def in_points(middle: float, low: float, high: float) -> str:
    """Returns a difference of shares with its interval in percentage points as text: "+1.2 [-0.3, 2.7]"."""
    return f"{100 * middle:+.1f} {percent(low, high)}"


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """Returns a Markdown table with aligned columns, which reads well in a terminal too. rows[0] is the header."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = [
        "| " + " | ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths))) + " |"
        for row in rows
    ]
    rule = "|" + "|".join("-" * (w + 2) if i == 0 else "-" * (w + 1) + ":" for i, w in enumerate(widths)) + "|"
    return "\n".join([lines[0], rule, *lines[1:]]) + "\n"


def cells(results: Results) -> dict[tuple[str, str], dict[str, float]]:
    """Returns {(benchmark, level): row of results}, with the level "all" last. If a benchmark has a single level,
    only "all" is kept, because the single level has the same results."""
    return {
        (name, level): row
        for name, table in results["results"].items()
        for level, row in table.items()
        if level == "all" or len(table) > 2
    }


def label(name: str, level: str) -> str:
    return name if level == "all" else f"{name}: {level}"


def results_tables(results: Results) -> str:
    """Returns a Markdown table of the accuracy by benchmark and level, and a table of pass@k if there are several
    samples per problem."""
    rows = [["benchmark", "problems", "k", "accuracy", "95% interval", "tokens", "cut off %", "unread %"]]
    curves = []
    for key, row in cells(results).items():
        line = [label(*key), str(row["problems"]), str(row["samples"]), percent(row["accuracy"])]
        line += [percent(row["low"], row["high"]), f"{row['response_tokens']:.1f}"]
        rows.append([*line, percent(row["truncated"]), percent(row["unread"])])
        curves.append([label(*key), {k: percent(row[f"pass@{k}"]) for k in powers_of_two(row["samples"])}])
    if average := results.get("average"):
        line = [f"average of {len(results['results'])}", "", "", percent(average["accuracy"])]
        rows.append([*line, percent(average["low"], average["high"]), "", "", ""])
    text = markdown_table(rows)
    ks = sorted({k for _, curve in curves for k in curve})
    if len(ks) > 1:
        body = [[name, *(curve.get(k, "") for k in ks)] for name, curve in curves]
        text += "\n" + markdown_table([["pass@k in %", *map(str, ks)], *body])
    return text


# ---- one evaluation


def write_report(folder: Path, settings: dict[str, Any], answers: dict[str, list[Answers]]) -> None:
    """Writes the report on `answers` (by benchmark) into `folder`, and prints its tables."""
    results: Results = {"settings": settings, "results": {n: summarize(a) for n, a in answers.items()}}
    if len(answers) > 1:
        scores = [[a.accuracy for a in counted] for counted in answers.values()]
        low, high = average_interval(scores)
        results["average"] = {"accuracy": mean([mean(s) for s in scores]), "low": low, "high": high}
    results["right"] = by_problem(answers, "right")
    if (rewards := by_problem(answers, "rewards")) != results["right"]:
        results["rewards"] = rewards
    write_text(folder / "results.json", json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    tables = results_tables(results)
    listed = "".join(f"- {k}: `{json.dumps(v, ensure_ascii=False)}`\n" for k, v in settings.items())
    title = (
        f"# {settings['model']}\n\nAccuracy is avg@k in %: the mean over problems of the mean reward of k samples."
    )
    write_text(folder / "results.md", f"{title}\n\n{tables}\n## Settings\n\n{listed}")
    print(f"\n{tables}")
    for name, table in results["results"].items():
        lost = table["all"]["truncated"] + table["all"]["unread"]
        if lost > 0.5:
            print(f"{name}: {percent(lost)}% of the responses were cut off or had no readable boxed answer")


def by_problem(answers: dict[str, list[Answers]], count: str) -> dict[str, dict[str, dict[str, float]]]:
    """Returns {benchmark: {level: {problem id: count}}}, where `count` names a field of statistics.Answers."""
    table: dict[str, dict[str, dict[str, float]]] = {}
    for name, counted in answers.items():
        levels = dict.fromkeys(a.level for a in counted)
        table[name] = {level: {a.id: getattr(a, count) for a in counted if a.level == level} for level in levels}
    return table


# ---- several evaluations


def read_results(folder: Path) -> Results:
    """Returns the content of results.json, and the name of the folder as "name". Raises InputError if the file is
    missing or damaged."""
    file = folder / "results.json"
    if not file.exists():
        raise InputError(f"{folder} is not a finished evaluation: no results.json (eval.py writes it last)")
    return read_json(file, "results", "right", "settings") | {"name": folder.name}


def problem_scores(results: Results, name: str, level: str, k: int | None = None) -> dict[str, float]:
    """Returns {problem id: mean reward} of one level of a benchmark. If k is given, the values are pass@k instead of
    the mean reward. Level "all" means all levels."""
    samples = results["results"][name]["all"]["samples"]
    table = results["right"] if k else results.get("rewards", results["right"])
    levels = [counts for own, counts in table[name].items() if level in (own, "all")]
    return {i: pass_at_k(samples, c, k) if k else c / samples for counts in levels for i, c in counts.items()}


def shared_cells(evaluations: Sequence[Results]) -> list[tuple[str, str]]:
    """Returns the (benchmark, level) pairs that all evaluations have. Raises InputError if the evaluations share no
    pair, or used different problems for a shared pair."""
    shared = [key for key in cells(evaluations[0]) if all(key in cells(other) for other in evaluations[1:])]
    if not shared:
        sets = "; ".join(f"{e['name']}: {', '.join(e['results'])}" for e in evaluations)
        raise InputError(f"these evaluations have no benchmark in common ({sets})")
    for other in evaluations[1:]:
        for key in shared:
            if problem_scores(evaluations[0], *key).keys() != problem_scores(other, *key).keys():
                names = f"{evaluations[0]['name']} and {other['name']}"
                raise InputError(f"{names} used different problems of {label(*key)}: they cannot be compared")
    return shared


def compare_tables(evaluations: Sequence[Results], beside_paper: bool) -> str:
    """Returns a table of evaluations: accuracies with intervals, and the paired difference of each evaluation to the
    first."""
    first = evaluations[0]
    header = ["accuracy [95% interval]", "problems", *(e["name"] for e in evaluations)]
    rows = [[*header, *(f"{e['name']} − {first['name']}" for e in evaluations[1:])]]
    shared = shared_cells(evaluations)
    for key in shared:
        cell_rows = [cells(e)[key] for e in evaluations]
        line = [label(*key), str(cell_rows[0]["problems"])]
        line += [f"{percent(row['accuracy'])} {percent(row['low'], row['high'])}" for row in cell_rows]
        base = problem_scores(first, *key)
        for other in evaluations[1:]:
            scores = problem_scores(other, *key)
            line.append(in_points(*paired_difference(list(base.values()), [scores[i] for i in base])))
        rows.append(line)
    text = markdown_table(rows) + "\n"
    names = ("temperature", "max_response_tokens", "problems_per_level", "system", "chat_template", "grader")
    settings = {name: [e["settings"].get(name) for e in evaluations] for name in names}
    for benchmark, _ in shared:
        settings[f"samples of {benchmark}"] = [e["results"][benchmark]["all"]["samples"] for e in evaluations]
        settings[f"file of {benchmark}"] = [
            (e["settings"].get("benchmarks", {}).get(benchmark) or {}).get("sha256", "")[:8] for e in evaluations
        ]
    text += not_alike([e["name"] for e in evaluations], settings)
    return text + (paper_table(evaluations) if beside_paper else "")


def not_alike(names: Sequence[str], settings: dict[str, list[Any]]) -> str:
    """Returns a line for each setting whose values differ between evaluations or runs. `names` are the names of the
    evaluations or runs."""
    text = ""
    for setting, values in settings.items():
        if any(value != values[0] for value in values):
            pairs = ", ".join(f"{name} {str(value)[:80]}" for name, value in zip(names, values))
            text += f"Not alike: {setting} ({pairs})\n"
    return text


def paper_table(evaluations: Sequence[Results]) -> str:
    """Returns a table of accuracies in % on the paper's benchmarks: first our evaluations, then the paper's results.
    The average is over SIX, the six benchmarks over which the paper averages."""
    rows = [["accuracy in %", *COLUMNS, "average of six"]]
    for e in evaluations:
        accuracies = {n: 100 * e["results"][n]["all"]["accuracy"] for n in COLUMNS if n in e["results"]}
        average = f"{mean([accuracies[n] for n in SIX]):.1f}" if set(SIX) <= accuracies.keys() else ""
        rows.append([e["name"], *(f"{accuracies[n]:.1f}" if n in accuracies else "" for n in COLUMNS), average])
    for method, (accuracies, average) in PUBLISHED.items():
        missing = [""] * (len(COLUMNS) - len(accuracies))
        rows.append([f"published, not ours: {method}", *map(str, accuracies), *missing, str(average)])
    source = "Published rows: Qwen2.5-Math-7B, arXiv 2507.01679. Their prompts, grader and sampler are not ours.\n"
    return f"\n{markdown_table(rows)}\n{source}"
