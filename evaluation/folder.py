"""This file reads and writes the folder of an evaluation: settings.json and generations.jsonl, which has a line per
response. The stored responses can be graded again.

The functions come in this order: `describe` for the settings, then the folder, its stored responses, and `regrade`.
report.py writes the report (results.json, results.md), and figures/comparison.py draws its figure.
"""

import argparse
import contextlib
import datetime
import hashlib
import itertools
import json
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from data.loader import render_prompt
from evaluation.benchmarks import Benchmark, all_draws, load_benchmark
from evaluation.multiple_choice import grade_response
from evaluation.statistics import Answers
from reward import Reward, load_reward
from support import distributed
from support.checkpoint import json_line, locked, model_fingerprint, sha256, write_text
from support.errors import Broken, InputError
from support.files import check_object, make_folder, parse_object, read_json, reading, replacing, writing

# fields of a line in generations.jsonl
RESPONSE = ("benchmark", "id", "sample", "reward", "read", "truncated", "tokens", "response")
# settings that may differ when an evaluation is continued, because they only affect rounding
FREE = ("device", "ranks", "rows_per_call")

# the only files in the folder of an evaluation that was killed before settings.json was written
OURS = {"lock", "settings.json.partial"}

# ---- settings


def grader_version(reward: Reward) -> str:
    """Returns the sha256 of the code that decides whether a response is right."""
    choices = sha256(Path(__file__).with_name("multiple_choice.py")) if reward.name == "math" else ""
    return hashlib.sha256((reward.fingerprint + choices).encode()).hexdigest()


def now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def describe(
    args: argparse.Namespace, model: PreTrainedModel, tokenizer: Tokenizer, benchmarks: list[Benchmark]
) -> dict[str, Any]:
    """Returns all settings that influence the results of an evaluation, as settings.json stores them."""
    first = benchmarks[0].problems[0]
    return {
        "model": args.model,
        "weights": model_fingerprint(args.model, model),
        "parameters": model.num_parameters(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "chat_template": tokenizer.chat_template or "none: system message, an empty line, problem, a line end",
        "first_prompt": render_prompt(tokenizer, first.problem, first.system),
        "first_prompt_ids": " ".join(map(str, benchmarks[0].encoded[0].prompt_ids)),
        "benchmarks": {
            b.name: {
                "file": str(b.path),
                "sha256": sha256(b.path),
                "problems": len(b.problems),
                "left_out": b.left_out,
                "samples": b.samples,
            }
            for b in benchmarks
        },
        "problems_per_level": args.problems,
        "system": args.system,
        "temperature": args.temperature,
        "top_p": 1.0,
        "max_response_tokens": args.max_response_tokens,
        "seed": args.seed,
        "reward": args.reward.name,
        "grader": grader_version(args.reward),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "device": str(model.device),
        "ranks": distributed.world_size(),
        "rows_per_call": args.rows_per_call,
        "date": now(),
    }


# ---- the evaluation folder


def stored_settings(folder: Path | None) -> dict[str, Any]:
    """Returns the content of settings.json of an evaluation, or {} if the file is missing. Raises InputError if the
    file is damaged."""
    file = folder / "settings.json" if folder else None
    return read_json(file) if file and file.exists() else {}


def write_settings(file: Path, settings: dict[str, Any] | None) -> None:
    write_text(file, json.dumps(settings, indent=1, ensure_ascii=False) + "\n")


def choose_folder(args: argparse.Namespace, settings: dict[str, Any]) -> tuple[Path, dict[str, Any]]:
    """Returns the folder of this evaluation (--out, or the first free evals/MODEL-NNN) and the settings to store
    there.

    A continued evaluation keeps its settings. If a setting changed that only affects rounding (FREE), its new value
    is added under "continued". `choose_folder` writes nothing. Raises InputError if --out holds anything but an
    evaluation with the same settings.
    """
    if not args.out:
        path = Path(args.model)
        name = path.parent.name if path.name == "final" and path.parent.name else path.resolve().name
        args.out = next(f for i in itertools.count(1) if not (f := Path("evals") / f"{name}-{i:03d}").exists())
    if stored := stored_settings(args.out):
        changed = [k for k in settings if k not in (*FREE, "date") and settings[k] != stored.get(k)]
        # no response is graded yet, so a changed grader contradicts nothing
        if changed == ["grader"] and not (args.out / "generations.jsonl").exists():
            return args.out, settings
        if changed == ["grader"]:
            raise InputError(f"{args.out} was graded by another version: first run  eval.py --regrade {args.out}")
        if changed:
            was = "; ".join(f"{k}: {json.dumps(stored.get(k))[:90]}" for k in changed)
            raise InputError(f"{args.out} holds an evaluation with other settings ({was}): choose another --out")
        last, free = (stored.get("continued") or [stored])[-1], {k: settings[k] for k in FREE}
        if free != {k: last.get(k) for k in FREE} and not (args.out / "results.json").exists():
            stored["continued"] = [*(stored.get("continued") or []), free | {"date": settings["date"]}]
        settings = stored
    elif args.out.exists() and not (args.out.is_dir() and {file.name for file in args.out.iterdir()} <= OURS):
        raise InputError(f"{args.out} exists and holds no evaluation (no settings.json): choose another --out")
    return args.out, settings


@contextlib.contextmanager
def opened(folder: Path, settings: dict[str, Any] | None) -> Iterator[None]:
    """Makes and locks the folder of an evaluation, and stores `settings` in it.

    Every rank but rank 0 gives None for `settings`. Raises InputError if another process uses the folder, and Broken
    if the printed output was closed.
    """
    make_folder(folder)
    with written(folder):
        write_settings(folder / "settings.json", settings)
        yield


@contextlib.contextmanager
def written(folder: Path) -> Iterator[None]:
    """Locks the folder of an evaluation. Raises InputError if another process uses the folder, and Broken if the
    reader of the printed output has closed it."""
    with locked(folder):
        try:
            yield
        except BrokenPipeError as error:
            raise Broken("the output was closed") from error


def stored_rows(path: Path, benchmarks: list[Benchmark]) -> Iterator[tuple[Benchmark, int, dict[str, Any], int]]:
    """Yields (benchmark, index of the problem, the line as a dict, bytes of the line) for each response in
    generations.jsonl.

    An incomplete last line is ignored. Raises InputError if a line has another response than `all_draws` expects
    there.
    """
    if not path.exists():
        return
    number = 0
    with reading(path), path.open("rb") as file:
        for number, (benchmark, i, k) in enumerate(all_draws(benchmarks), 1):
            line = file.readline()
            if not line.endswith(b"\n"):
                return
            row = parse_object(line, f"{path}:{number}", RESPONSE)
            if not isinstance(row["reward"], int | float):
                found = f"reward is {row['reward']!r:.40}, expected a number"
                raise InputError(f"{path}:{number}: {found}: restore it, or delete it")
            stored, due = [row[name] for name in RESPONSE[:3]], [benchmark.name, benchmark.problems[i].id, k]
            if stored != due:
                where = f"{path}:{number}"
                raise InputError(f"{where}: found response {stored}, expected {due}: is it of another evaluation?")
            yield benchmark, i, row, len(line)
        if file.readline():
            raise InputError(
                f"{path}:{number + 1}: found more responses than the {number} of its benchmarks: were "
                "problems removed from the benchmark files?"
            )


def cut_broken_line(path: Path, benchmarks: list[Benchmark]) -> int:
    """Removes an incomplete last line of generations.jsonl, and returns the number of complete responses."""
    done = size = 0
    for *_, length in stored_rows(path, benchmarks):
        done, size = done + 1, size + length
    if path.exists():
        with writing(path), path.open("r+b") as file:
            file.truncate(size)
    return done


def count(folder: Path, benchmarks: list[Benchmark]) -> dict[str, list[Answers]]:
    """Counts the stored responses of each problem. Returns {benchmark: [the counts of each problem, as
    statistics.Answers]}."""
    answers = {b.name: [Answers(p.id, p.level) for p in b.problems] for b in benchmarks}
    for benchmark, i, row, _ in stored_rows(folder / "generations.jsonl", benchmarks):
        answers[benchmark.name][i].add(row)
    return answers


def regrade(folder: Path, name: str | None = None) -> tuple[dict[str, Any], dict[str, list[Answers]]]:
    """Grades the stored responses again, prints how many grades changed, and returns the settings and the counts per
    problem.

    `name` is the reward; None means the reward that graded the responses before. A reward in a user's file is run
    only if `name` names the file.
    """
    file, path = folder / "settings.json", folder / "generations.jsonl"
    if not file.exists() or not path.exists():
        raise InputError(f"{folder} holds no evaluation to grade again (no settings.json or generations.jsonl)")
    settings = read_json(file, "model", "benchmarks", "problems_per_level", "system")
    graded_by = settings.get("reward") or "math"
    if name is None and graded_by not in ("math", "exact"):
        raise InputError(f"{folder} was graded by {graded_by}, which runs only if named: give --reward {graded_by}")
    reward = load_reward(name or graded_by)
    benchmarks, how = [], (settings["problems_per_level"], settings["system"], reward)
    for benchmark, stored in settings["benchmarks"].items():
        check_object(stored, f"{file}: benchmark {benchmark}", ("file", "samples"))
        benchmarks.append(load_benchmark(benchmark, Path(stored["file"]), stored["samples"], *how))
        # a benchmark's file may differ from the file at the time of the evaluation, because a gold answer was
        # corrected; stored_rows checks the ids
        stored["sha256"] = sha256(Path(stored["file"]))
    changed = 0
    with written(folder):
        # a damaged line raises an error before anything is written
        rows = sum(1 for _ in stored_rows(path, benchmarks))
        with replacing(path) as partial:
            with partial.open("w", encoding="utf-8") as out:
                for benchmark, i, row, _ in stored_rows(path, benchmarks):
                    problem = benchmark.problems[i]
                    options = benchmark.options.get(problem.id, ())
                    value, read = grade_response(reward, row["response"], problem, options)
                    new = row | {"reward": 0.0 if row["truncated"] else value, "read": read}
                    out.write(json_line(new))
                    changed += new["reward"] != row["reward"]
            # If the process dies before the new settings are written, these temporary settings demand that the
            # responses are graded once more.
            write_settings(file, settings | {"grader": "unknown: it was being graded again"})
        settings |= {"reward": reward.name, "grader": grader_version(reward), "regraded": now()}
        write_settings(file, settings)
    print(f"{rows} responses graded again, {changed} grades changed")
    if rows < sum(len(b.problems) * b.samples for b in benchmarks):
        raise InputError(f"{folder} is not complete, so it has no results yet: continue with --out {folder}")
    return settings, count(folder, benchmarks)
