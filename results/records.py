"""This file reads the stored runs of the first study: what its files hold, and groups of runs by name.

A line of study/REGIME.jsonl is a trial or a run. It has regime, method, seed, trial, settings and tokens. `made_of`
are fingerprints of base and data. `scores` are accuracies on validation problems and, by level, on test problems,
greedy and "sampled" (at temperature 1). `right` has a digit for each test problem, which counts right samples (of 1,
of 4). `curve` goes over the steps. The base has the method "base". Trials stand after the runs. Runs are in the
protocol's order, which tables follow.

A line of study/ceiling.jsonl is 256 samples of each of 100 hard and 100 ood problems from a model of habit. There
`right` is a list, and `scores` are pass@k.

Left out is the code that made the runs. It is in the history (PROTOCOL.md says where).
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data.make_recipes import LEVELS, PROBLEMS_PER_LEVEL
from evaluation.statistics import pass_at_k

Line = dict[str, Any]
Stored = dict[str, list[Line]]  # lines of the stored runs, by regime

STUDY = Path("results/study")
REGIMES = {
    "habit": "128 of 512 problems demonstrated",
    "silent": "128 problems with k = 6, 32 demonstrated",
    "scarce": "few demonstrations for 512 problems",
    "weak": "habit with weaker experts",
    "twin": "habit on a base of another pretraining seed",
}
CEILING = "ceiling"
SAMPLES = {"greedy": 1, "sampled": 4}  # samples of each test problem, by measure
KINDS = {"greedy": "greedy", "sampled": "T = 1"}
CEILING_LEVELS, CEILING_SAMPLES = ("hard", "ood"), 256


def read_store(store: Path = STUDY) -> Stored:
    paths = {name: store / f"{name}.jsonl" for name in (*REGIMES, CEILING)}
    return {name: [json.loads(text) for text in path.read_bytes().splitlines()] for name, path in paths.items()}


def name_of(line: Line) -> str:
    """Returns `method`; in scarce `method@demonstrations`, in weak `method@expert`."""
    variant = {"scarce": "demonstrations", "weak": "expert"}.get(line["regime"])
    return f"{line['method']}@{line['settings'][variant]}" if variant in line["settings"] else line["method"]


def runs_of(lines: Sequence[Line], name: str) -> list[Line]:
    """Returns the runs of a method, or of `method@variant`."""
    return [line for line in lines if not line["trial"] and name in (line["method"], name_of(line))]


def names_of(lines: Sequence[Line]) -> list[str]:
    """Returns the groups of runs, in the protocol's order."""
    return list(dict.fromkeys(name_of(line) for line in lines if not line["trial"]))


def trials_of(lines: Sequence[Line], method: str) -> list[Line]:
    return [line for line in lines if line["trial"] and line["method"] == method]


def trial_score(line: Line) -> float:
    """Returns the score by which settings were chosen; 0 for a trial that diverged."""
    scores = line["scores"].get("validation", {})
    return (scores["greedy"] + scores["sampled"]) / 2 if scores else 0.0


def scores(lines: Sequence[Line], kind: str, level: str = "all") -> np.ndarray:
    """Returns the share of right samples [runs, test problems], on the problems of a level."""
    levels = np.repeat(list(LEVELS), PROBLEMS_PER_LEVEL["test"])
    right = np.array([list(line["right"][kind]) for line in lines], dtype=float)
    return right[:, (levels == level) | (level == "all")] / SAMPLES[kind]


def accuracies(lines: Sequence[Line], kind: str, level: str = "all") -> np.ndarray:
    """Returns the accuracy of each run, [runs]."""
    return scores(lines, kind, level).mean(1)


def solved(lines: Sequence[Line], tries: int, level: str = "all") -> np.ndarray:
    """Returns pass@`tries` of the lines of ceiling, [models, problems], by the unbiased estimator."""
    levels = np.repeat(CEILING_LEVELS, 100)
    places = np.flatnonzero((levels == level) | (level == "all"))
    return np.array([[pass_at_k(CEILING_SAMPLES, line["right"][i], tries) for i in places] for line in lines])


def prefix_lead(line: Line) -> list[float]:
    """Returns the mean reward of hybrid rows minus that of on-policy ones, over the parts of a run."""
    pairs = zip(line["curve"]["hybrid"], line["curve"]["on_policy"])
    return [hybrid - own for hybrid, own in pairs if hybrid is not None and own is not None]
