"""This script computes the reports of both studies from the stored runs: python results/report.py

It writes study/report.md (tables of all runs and claims), horizon/report.md, the table of questions in README.md, and
the figures. A test recomputes the reports and compares them with the files. Intervals and verdicts of the first study
are in claims.py, contrasts of the second study in horizon.py, and figures in drawing.py.
"""

import os
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data.make_recipes import LEVELS
from evaluation.report import in_points, markdown_table, percent
from results import horizon, records
from results.claims import difference, question_rows, verdict_rows
from results.drawing import draw_all
from results.records import KINDS, STUDY, Line, Stored, accuracies, names_of, runs_of, scores, solved, trial_score
from support.checkpoint import write_text
from support.errors import InputError

README = Path("results/README.md")
BEGIN, END = "<!-- questions: written by results/report.py -->", "<!-- end of questions -->"
REFERENCES = ("prefix-rft", "sft-rft")
TRIES = (1, 4, 16, 64, 256)


def plain_table(rows: Sequence[Sequence[str]]) -> str:
    """Returns a Markdown table without aligned columns, for cells that are sentences."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]]) + "\n"


def settings_text(line: Line, hidden: Sequence[str]) -> str:
    return ", ".join(f"{key} {value:g}" for key, value in line["settings"].items() if key not in hidden)


def with_spread(values: Sequence[float]) -> str:
    """Returns shares as text, mean ± standard deviation (each) in %: "51.2 ± 0.8 (50.4, 52.0)". A single share is
    returned without ± and brackets."""
    mean = percent(statistics.mean(values))
    if len(values) == 1:
        return mean
    return f"{mean} ± {percent(statistics.stdev(values))} ({', '.join(map(percent, values))})"


def accuracy_table(lines: Sequence[Line], kind: str) -> str:
    """Returns a table of each method's accuracy: over all levels the mean ± standard deviation over seeds (each
    seed), and the mean of each level."""
    rows = [["method", "seeds", "all levels", *LEVELS]]
    for name in names_of(lines):
        runs = runs_of(lines, name)
        cells = [percent(statistics.mean(accuracies(runs, kind, level).tolist())) for level in LEVELS]
        rows.append([name, str(len(runs)), with_spread(accuracies(runs, kind).tolist()), *cells])
    return markdown_table(rows)


def difference_text(first: Sequence[Line], second: Sequence[Line], kind: str) -> str:
    """Returns the difference of two groups of runs in points, with its 95% interval if both have several seeds."""
    pair = scores(first, kind), scores(second, kind)
    interval = difference(*pair, (first[0]["method"] != "base", True))
    return in_points(*interval) if interval else f"{100 * (pair[0].mean() - pair[1].mean()):+.1f}"


def difference_table(lines: Sequence[Line]) -> str:
    """Returns a table with the accuracy of each method minus that of prefix-rft and of sft-rft (REFERENCES) with the
    same demonstrations."""
    rows = [["method", *(f"minus {other}, {title}" for other in REFERENCES for title in KINDS.values())]]
    for name in names_of(lines):
        cells = []
        for reference in REFERENCES:
            other = reference + name[name.index("@") :] if "@" in name else reference
            # no difference is shown for sft-rft-equal, because its runs are runs of sft-rft that were stopped earlier
            same_runs = other == name or (name, other) == ("sft-rft-equal", "sft-rft")
            pair = runs_of(lines, name), runs_of(lines, other)
            cells += ["–" if same_runs or not pair[1] else difference_text(*pair, kind) for kind in KINDS]
        if set(cells) != {"–"}:
            rows.append([name, *cells])
    return markdown_table(rows)


def cost_table(lines: Sequence[Line]) -> str:
    """Returns a table of each method's settings and tokens, as means over the seeds."""
    rows = [["method", "settings", "sampled", "trained", "supervised", "sum, thousands of tokens"]]
    for name in names_of(lines):
        runs = runs_of(lines, name)
        if name != "base":
            means = [statistics.mean(line["tokens"][kind] for line in runs) for kind in rows[0][2:5]]
            settings = settings_text(runs[0], ("demonstrations", "expert"))
            rows.append([name, settings, *(f"{value / 1000:.0f}" for value in (*means, sum(means)))])
    return markdown_table(rows)


def trial_table(trials: Sequence[Line]) -> str:
    """Returns a table of every trial with the score that chose among them."""
    rows = [["trial", "settings", "validation: mean", "greedy", "T = 1"]]
    for line in trials:
        validation, cells = line["scores"].get("validation"), ["diverged", "–", "–"]
        if validation:
            cells = [percent(trial_score(line)), percent(validation["greedy"]), percent(validation["sampled"])]
        rows.append([line["method"], settings_text(line, ("demonstrations", "steps")), *cells])
    return markdown_table(rows)


def ceiling_table(lines: Sequence[Line]) -> str:
    """Returns a table of pass@k, as means over seeds and problems. At the largest k the table also has pass@k of each
    level, and the difference to the base model."""
    most = records.CEILING_SAMPLES
    columns = [(k, "all") for k in TRIES] + [(most, level) for level in records.CEILING_LEVELS]
    rows = [
        ["method", "seeds", *(f"{level}: pass@{k}".removeprefix("all: ") for k, level in columns), "all minus base"]
    ]
    for name in names_of(lines):
        runs = runs_of(lines, name)
        interval = difference(solved(runs, most), solved(runs_of(lines, "base"), most), (True, False))
        shares = [percent(solved(runs, *column).mean()) for column in columns]
        rows.append([name, str(len(runs)), *shares, in_points(*interval) if interval else "–"])
    return markdown_table(rows)


def report_text(stored: Stored) -> str:
    """Returns the text of study/report.md."""
    parts = [
        "# The stored runs of the first study\n\nWritten by `python results/report.py` from the lines beside it; "
        "../PROTOCOL.md says what was done. Accuracies in %, differences in points; 95% intervals.\n",
        "## Every claim\n\nNumbers in brackets are the paper's averages of six benchmarks, and the critics'.\n",
        plain_table(verdict_rows(stored)),
    ]
    for regime, about in records.REGIMES.items():
        lines = [line for line in stored[regime] if not line["trial"]]
        parts.append(f"## {regime}: {about}\n")
        for kind, title in KINDS.items():
            parts += [f"Test accuracy, {title}: mean ± standard deviation (each seed)\n", accuracy_table(lines, kind)]
        parts += ["Differences, paired by problem\n", difference_table(lines)]
        parts += ["Settings and cost\n", cost_table(lines)]
        if trials := [line for line in stored[regime] if line["trial"]]:
            parts += ["Trials, on validation problems\n", trial_table(trials)]
    parts += ["## ceiling: up to 256 samples at temperature 1 from models of habit\n"]
    parts += ["The first 100 test problems of hard and of ood; % of problems solved within k\n"]
    return "\n".join([*parts, ceiling_table(stored[records.CEILING])])


def with_questions(readme: str, stored: Stored) -> str:
    """Returns the text `readme` of README.md with its table of questions renewed. Raises InputError if the lines
    around the table are missing."""
    if readme.count(BEGIN) != 1 or readme.count(END) != 1:
        raise InputError(f"{README}: found no single pair of lines {BEGIN!r} and {END!r}: restore them")
    before, _, rest = readme.partition(BEGIN)
    return f"{before}{BEGIN}\n{plain_table(question_rows(stored))}{END}{rest.partition(END)[2]}"


def main() -> None:
    os.chdir(Path(__file__).resolve().parents[1])
    stored, second = records.read_store(), horizon.read_stored()
    texts = {STUDY / "report.md": report_text(stored), horizon.STORE / "report.md": horizon.report_text(second)}
    texts[README] = with_questions(README.read_text(encoding="utf-8"), stored)
    for path, text in texts.items():
        write_text(path, text)
    for path in [*texts, *draw_all(stored, horizon.run_frame(second), README.parent)]:
        print(path)


if __name__ == "__main__":
    main()
