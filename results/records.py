"""This file reads the stored runs of the first study, and picks groups of runs by name.

Each line of study/REGIME.jsonl is a tuning trial or a run, with its regime, method, seed, settings and tokens. The
base model is stored as a run of the method "base". The other fields of a line are:
- `made_of`: fingerprints of the base model and of the data;
- `scores`: accuracies on the validation problems and, by level, on the test problems, "greedy" and "sampled" (T = 1);
- `right`: a digit for each test problem, which counts its right samples (of 1 greedy sample, of 4 at T = 1);
- `curve`: metrics over the steps of the run.

The lines have the protocol's order, which the tables follow. Trials stand after the runs.

Each line of study/ceiling.jsonl has 256 samples of each of 100 hard and 100 ood test problems, from one model of the
regime habit. In these lines `right` is a list of counts, and `scores` are pass@k.

Left out is the code that made the runs: PROTOCOL.md names its commit.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data.make_recipes import LEVELS, PROBLEMS_PER_LEVEL
from evaluation.statistics import pass_at_k

Line = dict[str, Any]
Stored = dict[str, list[Line]]  # the stored lines of each regime

STUDY = Path("results/study")
REGIMES = {
    "habit": "128 of 512 problems demonstrated",
    "silent": "128 problems with k = 6, 32 demonstrated",
    "scarce": "few demonstrations for 512 problems",
    "weak": "habit with weaker experts",
    "twin": "habit on a base of another pretraining seed",
}
CEILING = "ceiling"
SAMPLES = {"greedy": 1, "sampled": 4}  # number of samples of each test problem, by measure
KINDS = {"greedy": "greedy", "sampled": "T = 1"}
CEILING_LEVELS, CEILING_SAMPLES = ("hard", "ood"), 256


def read_store(store: Path = STUDY) -> Stored:
    paths = {name: store / f"{name}.jsonl" for name in (*REGIMES, CEILING)}
    return {name: [json.loads(text) for text in path.read_bytes().splitlines()] for name, path in paths.items()}


def name_of(line: Line) -> str:
    """Returns the name of the group of a run: METHOD; in the regime scarce METHOD@NUMBER (of demonstrations), in the
    regime weak METHOD@EXPERT."""
    variant = {"scarce": "demonstrations", "weak": "expert"}.get(line["regime"])
    return f"{line['method']}@{line['settings'][variant]}" if variant in line["settings"] else line["method"]


def runs_of(lines: Sequence[Line], name: str) -> list[Line]:
    """Returns the runs, without trials, whose method or group (`name_of`) is `name`."""
    return [line for line in lines if not line["trial"] and name in (line["method"], name_of(line))]


def names_of(lines: Sequence[Line]) -> list[str]:
    """Returns the names of all groups of runs, in the protocol's order."""
    return list(dict.fromkeys(name_of(line) for line in lines if not line["trial"]))


def trials_of(lines: Sequence[Line], method: str) -> list[Line]:
    return [line for line in lines if line["trial"] and line["method"] == method]


def trial_score(line: Line) -> float:
    """Returns the score that chose among trials: the mean of both validation accuracies; 0 if the trial diverged."""
    scores = line["scores"].get("validation", {})
    return (scores["greedy"] + scores["sampled"]) / 2 if scores else 0.0


def scores(lines: Sequence[Line], kind: str, level: str = "all") -> np.ndarray:
    """Returns the share of right samples of each run on each test problem of `level`, [runs, problems]."""
    levels = np.repeat(list(LEVELS), PROBLEMS_PER_LEVEL["test"])
    right = np.array([list(line["right"][kind]) for line in lines], dtype=float)
    return right[:, (levels == level) | (level == "all")] / SAMPLES[kind]


def accuracies(lines: Sequence[Line], kind: str, level: str = "all") -> np.ndarray:
    """Returns the accuracy of each run on the test problems of `level`, [runs]."""
    return scores(lines, kind, level).mean(1)


def solved(lines: Sequence[Line], tries: int, level: str = "all") -> np.ndarray:
    """Returns the unbiased estimate of pass@`tries` of each model in study/ceiling.jsonl on each problem,
    [models, problems]."""
    levels = np.repeat(CEILING_LEVELS, 100)
    places = np.flatnonzero((levels == level) | (level == "all"))
    return np.array([[pass_at_k(CEILING_SAMPLES, line["right"][i], tries) for i in places] for line in lines])


def prefix_lead(line: Line) -> list[float]:
    """Returns the mean reward of hybrid rows minus that of on-policy rows, for each part of the run that `curve`
    stores."""
    pairs = zip(line["curve"]["hybrid"], line["curve"]["on_policy"])
    return [hybrid - own for hybrid, own in pairs if hybrid is not None and own is not None]
