"""The report on the stored runs: results/study/report.md, the verdicts in results/README.md, the figures.

Everything is computed from the stored lines again; a test compares the files with them. Figures are in drawing.py,
intervals and claims in claims.py.
"""

import statistics
from collections.abc import Sequence
from pathlib import Path

from data.make_recipes import LEVELS
from evaluation.report import markdown_table, percent
from results import ceiling
from results.claims import KINDS, difference, mean_interval, runs_of, scores, verdict_rows
from results.drawing import draw_all
from results.protocol import EQUAL, REGIMES, Line, trial_score
from results.stored import stored_lines
from support.checkpoint import write_text
from support.errors import InputError

README = Path("results/README.md")
BEGIN, END = "<!-- verdicts: written by study.py report -->", "<!-- end of verdicts -->"
REFERENCES = ("prefix-rft", "sft-rft")


def names_of(lines: Sequence[Line], regime: str) -> list[str]:
    """The groups of runs that are stored, in the protocol's order; each of several numbers of demonstrations, or
    experts, is a group of its own."""
    chosen = REGIMES[regime]
    variants = next((found for found in (chosen.demonstrations, chosen.experts) if len(found) > 1), None)
    names = [f"{m}@{variant}" for m in chosen.methods for variant in variants] if variants else chosen.methods
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
    """Differences to the REFERENCES with the same demonstrations, in points with 95% intervals; with one seed of
    either without."""
    rows = [["method", *(f"minus {other}, {title}" for other in REFERENCES for title in KINDS.values())]]
    for name in names_of(lines, regime):
        cells = []
        for reference in REFERENCES:
            other = reference + name[name.index("@") :] if "@" in name else reference
            for kind in KINDS:
                groups = runs_of(lines, name), runs_of(lines, other)
                cells.append("–")
                same_runs = other == name or (name, other) == (EQUAL, "sft-rft")  # one is the other, stopped earlier
                if not same_runs and all(groups):
                    first, second = (scores(group, kind) for group in groups)
                    found = difference(first, second, (name != "base", True))
                    cells[-1] = f"{100 * (first.mean() - second.mean()):+.1f}"
                    cells[-1] += f" {percent(found[1], found[2])}" if found else ""
        if set(cells) != {"–"}:
            rows.append([name, *cells])
    return markdown_table(rows)


def cost_table(lines: Sequence[Line], regime: str) -> str:
    """Settings and tokens, means over the seeds."""
    rows = [["method", "settings", "sampled", "trained", "supervised", "sum, thousands of tokens"]]
    for name in (name for name in names_of(lines, regime) if name != "base"):
        runs = runs_of(lines, name)
        hidden = ("demonstrations", "expert")  # in the name, where there are several
        settings = {key: value for key, value in runs[0]["settings"].items() if key not in hidden}
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


def ceiling_table(lines: Sequence[Line]) -> str:
    """pass@k, means over the problems, and at the largest k by level and paired with the base."""
    most, shown = ceiling.TRIES[-1], ceiling.TRIES[::2]
    rows = [
        ["method", "seeds", *(f"pass@{k}" for k in shown), *(f"{level}: pass@{most}" for level in ceiling.LEVELS)]
    ]
    rows[0].append(f"minus base: pass@{most}")
    base = runs_of(lines, "base")
    for name in (name for name in ceiling.METHODS if runs_of(lines, name)):
        runs = runs_of(lines, name)
        asked = [(k, "all") for k in shown] + [(most, level) for level in ceiling.LEVELS]
        found = [mean_interval(ceiling.solved(runs, *pair)) for pair in asked]
        rows.append(
            [name, str(len(runs)), *(f"{percent(mid)} {percent(low, high)}" for mid, low, high in found), "–"]
        )
        if base and name != "base":
            mid, low, high = mean_interval(ceiling.solved(runs, most), ceiling.solved(base[:1], most)[0])
            rows[-1][-1] = f"{100 * mid:+.1f} {percent(low, high)}"
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
        if regime == ceiling.NAME:
            parts.append(
                f"## ceiling: up to {ceiling.SAMPLES} samples at temperature 1 from models of {ceiling.REGIME}\n"
            )
            told = f"The first {ceiling.PROBLEMS} test problems of {' and of '.join(ceiling.LEVELS)}; "
            parts += [told + "intervals over problems and, with several, seeds\n", ceiling_table(lines)]
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
    """README.md with its table of verdicts renewed; InputError where its place is gone."""
    if readme.count(BEGIN) != 1 or readme.count(END) != 1:
        raise InputError(f"{README}: found no single pair of lines {BEGIN!r} and {END!r}: restore them")
    before, _, rest = readme.partition(BEGIN)
    after = rest.partition(END)[2]
    lines = ["| " + " | ".join(row) + " |" for row in verdict_rows(stored)]  # not aligned: cells are sentences
    return "\n".join([before + BEGIN, lines[0], "|---" * 5 + "|", *lines[1:], END + after])


def read_store(store: Path) -> dict[str, list[Line]]:
    return {name: stored_lines(store / f"{name}.jsonl") for name in (*REGIMES, ceiling.NAME)}


def write_report(store: Path, readme: Path | None) -> list[Path]:
    """Write report.md and the figures into `store`, and the verdicts into `readme` -> the files."""
    stored = read_store(store)
    if not any(stored.values()):
        raise InputError(f"{store} holds no runs: first  python results/study.py tune, then run")
    written = [store / "report.md", *draw_all(stored, store)]
    if readme:
        text = with_verdicts(readme.read_text(encoding="utf-8"), stored)
        write_text(readme, text)
        written.append(readme)
    write_text(written[0], report_text(stored))
    return written
