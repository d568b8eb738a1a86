"""The ceiling: can a trained model, given 256 tries, solve what the base cannot? pass@k of finished runs of habit.

SAMPLES responses at temperature 1 to the first PROBLEMS fresh test problems of each of LEVELS (all models solve the
other levels within a few tries). A line of results/study/ceiling.jsonl has method, seed and settings of the run,
`regime` "ceiling" (so that nobody counts it as one more run of habit), `made_of` and `probe` of the run, `right`: the
right samples of each problem, level after level; `scores`: pass@k of each level and of "all".

study.py has the command, report.py the table, drawing.py the curves, claims.py what is claimed.
"""

from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import numpy as np

from data.make_recipes import write_jsonl
from evaluation.statistics import pass_at_k, powers_of_two, summarize
from results.protocol import REGIMES, Line, test_rows
from results.runs import RUNS, Spec, alike, answers, configuration, made_of
from support.errors import InputError

NAME, REGIME = "ceiling", "habit"
METHODS = ("base", "sft", "rft", "sft-rft", "prefix-rft")
LEVELS = ("hard", "ood")
PROBLEMS = 100  # of each level
SAMPLES = 256
TRIES = tuple(powers_of_two(SAMPLES))  # k


def make_problems() -> Path:
    """Write the problems, level after level. (A level's two lengths take turns, so both are there.)"""
    rows, path = test_rows(), RUNS / f"data/{NAME}.jsonl"
    chosen = [[row for row in rows if row["level"] == level][:PROBLEMS] for level in LEVELS]
    write_jsonl(path, list(chain.from_iterable(chosen)))
    return path


def final_folder(spec: Spec) -> Path:
    return Path(REGIMES[REGIME].base) if spec.method == "base" else RUNS / spec.name / "final"


def runs_to_measure(methods: Sequence[str], seeds: Sequence[int], runs: Sequence[Line]) -> list[Line]:
    """The stored runs, one of the base; InputError where one is missing."""
    found = []
    for method in methods:
        for seed in seeds if method != "base" else (0,):
            asked = [r for r in runs if (r["method"], r["seed"], r["trial"]) == (method, seed, False)]
            if not asked:
                given = "" if method == "base" else f" --methods {method} --seeds {seed}"
                command = f"python results/study.py run --regime {REGIME}{given}"
                raise InputError(f"no run of {method}, seed {seed}, is stored in {REGIME}: first  {command}")
            found += asked[:1]
    return found


def is_measured(run: Line, lines: Sequence[Line]) -> bool:
    """Whether there is a line of this very run: no other settings, no other code."""
    same = [line for line in lines if who(line) == who(run) and line["settings"] == run["settings"]]
    return any(alike(line["probe"], run.get("probe", [])) for line in same)


def who(line: Line) -> tuple[str, int]:
    return line["method"], line["seed"]


def check_folder(spec: Spec) -> None:
    """InputError, with the command that makes it, where the model of a run is gone."""
    if not final_folder(spec).exists():
        flags = " ".join(f"--{name} {value}" for name, value in configuration(spec).items())
        command = f"python train.py {flags} --out {RUNS / spec.name}"
        raise InputError(f"{final_folder(spec)} is missing (a run is not committed): make it again with  {command}")


def ceiling_line(spec: Spec) -> Line:
    """Sample and grade -> the line, but for the run's probe. Two to four minutes on one core."""
    found = answers(str(final_folder(spec)), RUNS / f"data/{NAME}.jsonl", 1.0, spec.seed, SAMPLES)
    table = summarize(found)
    scores = {level: {f"pass@{k}": round(table[level][f"pass@{k}"], 4) for k in TRIES} for level in (*LEVELS, "all")}
    line = {"regime": NAME, "method": spec.method, "seed": spec.seed, "trial": False, "settings": spec.settings}
    return line | {"made_of": made_of(REGIME), "scores": scores, "right": [a.right for a in found]}


def solved(lines: Sequence[Line], tries: int, level: str = "all") -> np.ndarray:
    """[runs, problems] pass@`tries` of each problem of a level, by the unbiased estimator."""
    places = [i for i, name in enumerate(np.repeat(LEVELS, PROBLEMS)) if level in (name, "all")]
    return np.array([[pass_at_k(SAMPLES, line["right"][i], tries) for i in places] for line in lines])
