"""This file loads benchmarks: named files of problems, with the paper's number of samples per problem for each file.

data/prepare.py writes the public benchmarks to data/benchmarks/. A line of a benchmark's file may have "options"
(multiple choice) beside the fields of data/loader.py. Problems with images, proofs, and code are not supported.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.loader import Encoded, Problem, check_rows, read_rows
from evaluation.multiple_choice import check_options
from reward import MATH, Reward
from support.config import TASK, in_project
from support.errors import InputError

PAPER = {  # benchmark of the paper -> samples per problem [paper 4.1]
    "aime24": 32,
    "aime25": 32,
    "amc23": 32,
    "math500": 1,
    "minerva": 1,
    "olympiad": 1,
    "arc_c": 1,
    "gpqa_diamond": 1,
    "mmlu_pro": 1,
}
FILES = {name: Path(in_project(f"data/benchmarks/{name}.jsonl")) for name in (*PAPER, "gsm8k_test")}
FILES["embedded"] = Path(f"{TASK}/test.jsonl")


@dataclass
class Benchmark:
    """A set of problems with its number of samples per problem."""

    name: str
    path: Path
    samples: int
    problems: list[Problem]
    options: dict[str, list[str]]  # problem id -> options, for multiple-choice problems
    left_out: int  # number of problems that data/prepare.py dropped because they cannot be graded
    encoded: list[Encoded] = dataclasses.field(default_factory=list)


def read_options(path: Path, rows: dict[int, Any], problems: list[Problem]) -> dict[str, list[str]]:
    """Returns {problem id: options} of the multiple-choice problems. Raises InputError for options that cannot be
    graded."""
    options = {}
    for (number, row), problem in zip(rows.items(), problems, strict=True):
        if "options" in row:
            try:
                check_options(row["options"], problem.answer)
            except ValueError as error:
                raise InputError(f"{path}:{number}: {error}") from error
            options[problem.id] = row["options"]
    return options


def load_benchmark(
    name: str, path: Path, samples: int, per_level: int | None, system: str | None, reward: Reward = MATH
) -> Benchmark:
    """Returns the benchmark in a JSONL file, with only the first `per_level` problems of each level (None: all
    problems).

    Unless `system` is None, `system` replaces the system message of each problem. Raises InputError for a missing
    file or a bad line.
    """
    rows = read_rows(path)
    problems = check_rows(path, rows, reward)
    options = read_options(path, rows, problems)
    if per_level is not None:
        levels = dict.fromkeys(problem.level for problem in problems)
        problems = [p for level in levels for p in [q for q in problems if q.level == level][:per_level]]
    if system is not None:
        problems = [dataclasses.replace(problem, system=system) for problem in problems]
    aside = path.with_suffix(".left_out.jsonl")
    left_out = len(read_rows(aside)) if aside.exists() else 0
    return Benchmark(name, path, samples, problems, options, left_out)


def choose_benchmarks(
    names: str,
    data: Path | None,
    samples: int | None = None,
    per_level: int | None = None,
    system: str | None = None,
    reward: Reward = MATH,
) -> list[Benchmark]:
    """Returns the benchmarks in a comma-separated list of names ("paper" stands for the paper's nine), and the file
    `data` as one more benchmark.

    If `samples` is None, each benchmark has the paper's number of samples (PAPER), or 1. Raises InputError for an
    unknown name, a missing file, and a file `data` that has the name of another benchmark.
    """
    listed = [n for name in names.split(",") if name for n in (PAPER if name == "paper" else [name])]
    for name in listed:
        if name not in FILES:
            raise InputError(f"unknown benchmark {name!r}: choose from {', '.join(FILES)}, or paper (nine of them)")
    if data and (known := FILES.get(data.stem, data)).resolve() != data.resolve():
        raise InputError(f"data file {data} has the name of the benchmark {data.stem} ({known}): rename your file")
    files = {name: FILES[name] for name in listed} | ({data.stem: data} if data else {})
    if not files:
        raise InputError("nothing to evaluate on: give --benchmarks or --data")
    how = (per_level, system, reward)
    return [load_benchmark(n, path, samples or PAPER.get(n, 1), *how) for n, path in files.items()]


def all_draws(benchmarks: Iterable[Benchmark]) -> Iterator[tuple[Benchmark, int, int]]:
    """Yields (benchmark, index of the problem, index of the sample) of each response, in the order of
    generations.jsonl."""
    for benchmark in benchmarks:
        for i, k in itertools.product(range(len(benchmark.problems)), range(benchmark.samples)):
            yield benchmark, i, k
