"""The report on the stored runs: results/study/report.md, the verdicts in results/README.md, the figures.

Everything is computed from the stored lines again; a test compares the files with them. Figures are in drawing.py,
intervals and claims in claims.py.
"""

import statistics
from collections.abc import Sequence
from pathlib import Path

from data.make_recipes import LEVELS
from evaluation.report import markdown_table, percent
from results.claims import KINDS, difference, runs_of, scores, verdict_rows
from results.drawing import draw_all
from results.protocol import REGIMES, Line, trial_score
from results.runs import stored_lines
from support.checkpoint import write_text

README = Path("results/README.md")
BEGIN, END = "<!-- verdicts: written by study.py report -->", "<!-- end of verdicts -->"
REFERENCES = ("prefix-rft", "sft-rft")


def names_of(lines: Sequence[Line], regime: str) -> list[str]:
    """The groups of runs that are stored, in the protocol's order; with several numbers of demonstrations those are
    groups of their own."""
    numbers = REGIMES[regime].demonstrations
    names = [f"{m}@{n}" if len(numbers) > 1 else m for m in REGIMES[regime].methods for n in numbers]
    return [name for name in ["base", *names] if runs_of(lines, name)]


def spread(values: Sequence[float]) -> str:
    """Shares as "51.2 ± 0.8 (50.4, 52.0)", in %; a single one alone."""
    shown = percent(statistics.mean(values))
    if len(values) == 1:
        return shown
    return f"{shown} ± {percent(statistics.stdev(values))} ({', '.join(map(percent, values))})"


def accuracy_table(lines: Sequence[Line], regime: str, kind: str) -> str:
    """Mean ± standard deviation over seeds (each seed) over all levels, and the mean of each level."""
    rows = [["method", "seeds", "all levels", *LEVELS]]
    for name in names_of(lines, regime):
        runs = runs_of(lines, name)
        by_level = {level: [float(scores([line], kind, level).mean()) for line in runs] for level in ("all", *LEVELS)}
        cells = [percent(statistics.mean(by_level[level])) for level in LEVELS]
        rows.append([name, str(len(runs)), spread(by_level["all"]), *cells])
    return markdown_table(rows)


def difference_table(lines: Sequence[Line], regime: str) -> str:
    """Differences to the REFERENCES with as many demonstrations, in points with 95% intervals."""
    rows = [["method", *(f"minus {other}, {title}" for other in REFERENCES for title in KINDS.values())]]
    for name in names_of(lines, regime):
        cells = []
        for reference in REFERENCES:
            other = reference + name[name.index("@") :] if "@" in name else reference
            for kind in KINDS:
                groups = runs_of(lines, name), runs_of(lines, other)
                enough = other != name and all(groups)
                found = difference(*(scores(group, kind) for group in groups)) if enough else None
                cells.append(f"{100 * found[0]:+.1f} {percent(found[1], found[2])}" if found else "–")
        if set(cells) != {"–"}:
            rows.append([name, *cells])
    return markdown_table(rows)


def cost_table(lines: Sequence[Line], regime: str) -> str:
    """Settings and tokens, means over the seeds."""
    rows = [["method", "settings", "sampled", "trained", "supervised", "sum, thousands of tokens"]]
    for name in (name for name in names_of(lines, regime) if name != "base"):
        runs = runs_of(lines, name)
        settings = {key: value for key, value in runs[0]["settings"].items() if key != "demonstrations"}
        means = [statistics.mean(line["tokens"][kind] for line in runs) for kind in rows[0][2:5]]
        told = ", ".join(f"{key} {value:g}" for key, value in settings.items())
        rows.append([name, told, *(f"{value / 1000:.0f}" for value in (*means, sum(means)))])
    return markdown_table(rows)


def trial_table(lines: Sequence[Line]) -> str:
    """Every trial with what its choice looked at."""
    rows = [["trial", "settings", "validation: mean", "greedy", "T = 1"]]
    for line in sorted((line for line in lines if line["trial"]), key=lambda line: line["method"]):
        settings = {key: value for key, value in line["settings"].items() if key not in ("demonstrations", "steps")}
        found = line["scores"].get("validation")
        cells = [percent(trial_score(line)), percent(found["greedy"]), percent(found["sampled"])] if found else []
        told = ", ".join(f"{key} {value:g}" for key, value in settings.items())
        rows.append([line["method"], told, *(cells or ["diverged", "–", "–"])])
    return markdown_table(rows)


def report_text(stored: dict[str, list[Line]]) -> str:
    """report.md."""
    parts = [
        "# The stored runs",
        "Written by `python results/study.py report` from the lines beside it. README.md of",
    ]
    parts[-1] += " the folder above says what was done. Accuracies in %, differences in points; 95% intervals.\n"
    for regime, lines in stored.items():
        if not lines:
            continue
        parts.append(f"## {regime}: {REGIMES[regime].about}\n")
        if any(not line["trial"] for line in lines):
            for kind, title in KINDS.items():
                parts += [f"Test accuracy, {title}: mean ± standard deviation (each seed)\n"]
                parts += [accuracy_table(lines, regime, kind)]
            parts += ["Differences, paired by problem\n", difference_table(lines, regime)]
            parts += ["Settings and cost\n", cost_table(lines, regime)]
        if any(line["trial"] for line in lines):
            parts += ["Trials, on validation problems\n", trial_table(lines)]
    return "\n".join(parts)


def with_verdicts(readme: str, stored: dict[str, list[Line]]) -> str:
    """README.md with its table of verdicts renewed; ValueError where its place is gone."""
    if readme.count(BEGIN) != 1 or readme.count(END) != 1:
        raise ValueError(f"{README}: found no single pair of lines {BEGIN!r} and {END!r}: restore them")
    before, _, rest = readme.partition(BEGIN)
    after = rest.partition(END)[2]
    lines = ["| " + " | ".join(row) + " |" for row in verdict_rows(stored)]  # not aligned: cells are sentences
    return "\n".join([before + BEGIN, lines[0], "|---" * 5 + "|", *lines[1:], END + after])


def read_store(store: Path) -> dict[str, list[Line]]:
    return {regime: stored_lines(store / f"{regime}.jsonl") for regime in REGIMES}


def write_report(store: Path, readme: Path | None) -> list[Path]:
    """Write report.md and the figures into `store`, and the verdicts into `readme` -> the files."""
    stored = read_store(store)
    if not any(stored.values()):
        raise ValueError(f"{store} holds no runs: first  python results/study.py tune, then run")
    written = [store / "report.md", *draw_all(stored, store)]
    if readme:
        text = with_verdicts(readme.read_text(encoding="utf-8"), stored)
        write_text(readme, text)
        written.append(readme)
    write_text(written[0], report_text(stored))
    return written
