"""Evaluation: sample responses to benchmark problems, grade them, report accuracy and pass@k with their settings.

    python eval.py --model DIR_OR_NAME --benchmarks math500,aime24 | paper | embedded    -> a fresh evals/MODEL-NNN/
    python eval.py … --out evals/MODEL-NNN            continues it where it was stopped
    python eval.py --regrade evals/MODEL-NNN          grades its stored responses again, samples nothing

In reading order: `evaluate` (all that train.py needs), the settings that decide a number, the evaluation folder,
the command line. The folder gets settings.json, generations.jsonl (a line per response), results.json, results.md
and passk.png. A response cut off by the budget is wrong, as in training; `unread` is the share of the others without
a readable boxed answer. Draws are a pure function of (seed, problem, sample), so a stopped evaluation continues to
the files it would have written. Left out: top-p below 1, majority voting, tools, several GPUs.
"""

import argparse
import datetime
import hashlib
import itertools
import json
import platform
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from tqdm import tqdm
from transformers import PreTrainedModel

from benchmarks import FILES, Benchmark, all_draws, choose_benchmarks, load_benchmark
from checkpoint import append_rows, write_text
from choice import grade_response
from data.loader import Encoded, Problem, encode_problems, render_prompt
from model import load_model, pick_device
from report import report
from sample import Row, generate, pack
from stats import Answers, mean, pass_at_k, summarize

__all__ = ["Answers", "evaluate", "mean", "pass_at_k", "summarize"]  # what the rest of the project uses

LINE_SECONDS = 15  # between plain progress lines where there is no terminal


class Draw(NamedTuple):
    """One response to be sampled."""

    problem: Problem
    encoded: Encoded
    options: Sequence[str]
    sample: int


def respond(
    model: PreTrainedModel,
    tokenizer,
    draws: Sequence[Draw],
    *,
    temperature: float,
    max_response_tokens: int,
    seed: int,
    rows_per_call: int,
    progress: str | None = None,
) -> list[dict[str, Any]]:
    """A graded response to each draw: {"id", "sample", "reward", "read", "truncated", "tokens", "response"}."""
    rows = [Row(i, (seed, "eval", d.problem.id, d.sample), d.encoded.prompt_ids, []) for i, d in enumerate(draws)]
    responses = generate(
        model, rows, max_response_tokens, temperature, rows_per_call=rows_per_call, progress=progress
    )
    rollouts = pack(rows, responses, model, tokenizer)
    found = []
    for draw, ids, text, cut in zip(draws, responses, rollouts.texts, rollouts.truncated.tolist()):
        reward, read = grade_response(text, draw.problem.answer, draw.options)
        row = {"id": draw.problem.id, "sample": draw.sample, "reward": 0.0 if cut else reward, "read": read}
        found.append(row | {"truncated": cut, "tokens": len(ids), "response": text})
    return found


def add(answers: Answers, row: dict[str, Any]) -> None:
    """Count a graded response."""
    answers.samples += 1
    answers.right += int(row["reward"])
    answers.tokens += row["tokens"]
    answers.truncated += int(row["truncated"])
    answers.unread += int(not row["truncated"] and not row["read"])


def evaluate(
    model: PreTrainedModel,
    tokenizer,
    problems: Sequence[Problem],
    encoded: Sequence[Encoded],
    *,
    samples: int = 1,
    temperature: float = 0.0,
    max_response_tokens: int,
    seed: int = 0,
    rows_per_call: int = 512,
    progress: str | None = None,
) -> list[Answers]:
    """`samples` graded responses to each problem (temperature 0: greedy), counted. See `stats.summarize`."""
    draws = [Draw(p, e, (), k) for p, e in zip(problems, encoded) for k in range(samples)]
    settings = {"temperature": temperature, "max_response_tokens": max_response_tokens, "seed": seed}
    rows = respond(model, tokenizer, draws, **settings, rows_per_call=rows_per_call, progress=progress)
    answers = [Answers(problem.id, problem.level) for problem in problems]
    for i, row in enumerate(rows):
        add(answers[i // samples], row)
    return answers


# ---- settings


def sha256(*paths: Path) -> str:
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(2**24):
                digest.update(block)
    return digest.hexdigest()


def grader_version() -> str:
    """sha256 of the files that decide whether a response is right."""
    here = Path(__file__).parent
    return sha256(*sorted(here.glob("answers/*.py")), here / "choice.py", here / "reward.py")


def now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def describe(args: argparse.Namespace, model, tokenizer, benchmarks: list[Benchmark]) -> dict[str, Any]:
    """Everything that decides a number, as settings.json keeps it."""
    folder = Path(args.model)
    weights = sha256(*sorted(folder.glob("*.safetensors"))) if folder.is_dir() else model.config._commit_hash
    template, first = tokenizer.chat_template or "", benchmarks[0].problems[0]
    return {
        "model": args.model,
        "weights": weights,  # sha256 of the files, or the hub's revision
        "parameters": model.num_parameters(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "chat_template": hashlib.sha256(template.encode()).hexdigest() if template else None,
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
        "grader": grader_version(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "device": str(model.device),
        "date": now(),
    }


def encode_benchmarks(model, tokenizer, benchmarks: list[Benchmark], max_response_tokens: int) -> None:
    """Fill in `encoded`; ValueError where prompt and response would not fit the model's window."""
    ends = model.generation_config.eos_token_id
    for benchmark in benchmarks:
        benchmark.encoded = encode_problems(tokenizer, benchmark.problems, max_response_tokens, ends)[0]
    window = getattr(model.config, "max_position_embeddings", None)
    longest = max(len(e.prompt_ids) for b in benchmarks for e in b.encoded)
    if window and longest + max_response_tokens > window:
        raise ValueError(
            f"max_response_tokens is {max_response_tokens} and the longest prompt has {longest} tokens, but the "
            f"model has a window of {window}: give --max_response_tokens {window - longest} or less"
        )


# ---- the evaluation folder


def open_folder(args: argparse.Namespace, settings: dict[str, Any]) -> Path:
    """The folder of this evaluation, with its settings.json: --out, or the first free evals/MODEL-NNN.

    Raises ValueError if --out holds anything but an evaluation with the same settings.
    """
    if not args.out:
        path = Path(args.model)
        name = path.parent.name if path.name == "final" and path.parent.name else path.resolve().name
        args.out = next(f for i in itertools.count(1) if not (f := Path("evals") / f"{name}-{i:03d}").exists())
    file = args.out / "settings.json"
    if file.exists():
        stored = json.loads(file.read_text(encoding="utf-8"))
        changed = [k for k in settings if k not in ("date", "device") and settings[k] != stored.get(k)]
        if changed == ["grader"]:
            raise ValueError(f"{args.out} was graded by another version: first run  eval.py --regrade {args.out}")
        if changed:
            was = "; ".join(f"{k}: {json.dumps(stored.get(k))[:90]}" for k in changed)
            raise ValueError(f"{args.out} holds an evaluation with other settings ({was}): choose another --out")
    elif args.out.exists() and any(args.out.iterdir()):
        raise ValueError(f"{args.out} exists and holds no evaluation (no settings.json): choose another --out")
    else:
        args.out.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps(settings, indent=1, ensure_ascii=False) + "\n")
    return args.out


def stored_rows(path: Path, benchmarks: list[Benchmark]) -> Iterator[tuple[Benchmark, int, dict[str, Any], int]]:
    """(benchmark, index of the problem, row, bytes of its line) of the responses in generations.jsonl.

    Ends before a line that was cut short. ValueError where a line is not the response that belongs there.
    """
    if not path.exists():
        return
    with path.open("rb") as file:
        for number, (line, (benchmark, i, k)) in enumerate(zip(file, all_draws(benchmarks)), 1):
            try:
                row = json.loads(line)
                found = row["benchmark"], row["id"], row["sample"]
            except (ValueError, KeyError, TypeError):
                return
            if not line.endswith(b"\n"):
                return
            due = benchmark.name, benchmark.problems[i].id, k
            if found != due:
                raise ValueError(f"{path}:{number}: found response {found}, expected {due}: another evaluation's?")
            yield benchmark, i, row, len(line)


def sample_missing(model, tokenizer, folder: Path, benchmarks: list[Benchmark], args: argparse.Namespace) -> None:
    """Sample and grade what generations.jsonl does not hold yet, `rows_per_call` responses at a time.

    It is first cut back to whole batches, so that what is sampled anew is batched (and so rounded) as before.
    """
    path, total = folder / "generations.jsonl", sum(len(b.problems) * b.samples for b in benchmarks)
    done = size = kept = kept_size = 0
    for *_, length in stored_rows(path, benchmarks):
        done, size = done + 1, size + length
        if done % args.rows_per_call == 0 or done == total:
            kept, kept_size = done, size
    if path.exists():
        with path.open("r+b") as file:
            file.truncate(kept_size)
    draws = itertools.islice(all_draws(benchmarks), kept, None)
    start, first, said, tokens = time.perf_counter(), kept, 0.0, 0
    with tqdm(total=total, initial=kept, unit="response", disable=not sys.stderr.isatty()) as bar:
        while batch := list(itertools.islice(draws, args.rows_per_call)):
            rows = respond(
                model,
                tokenizer,
                [Draw(b.problems[i], b.encoded[i], b.options.get(b.problems[i].id, ()), k) for b, i, k in batch],
                temperature=args.temperature,
                max_response_tokens=args.max_response_tokens,
                seed=args.seed,
                rows_per_call=args.rows_per_call,
            )
            append_rows(path, [{"benchmark": b.name} | row for (b, _, _), row in zip(batch, rows)])
            tokens += sum(row["tokens"] for row in rows)
            bar.update(len(batch))
            kept += len(batch)
            seconds = time.perf_counter() - start
            bar.set_postfix_str(f"{tokens / seconds:.0f} tokens/s")
            if bar.disable and (seconds - said > LINE_SECONDS or kept == total):
                said = seconds
                left = seconds * (total - kept) / (kept - first)
                print(f"{kept}/{total} responses  {tokens / seconds:.0f} tokens/s  {left:.0f} s left", flush=True)


def count(folder: Path, benchmarks: list[Benchmark]) -> dict[str, list[Answers]]:
    """The stored responses, counted by benchmark and problem."""
    answers = {b.name: [Answers(p.id, p.level) for p in b.problems] for b in benchmarks}
    for benchmark, i, row, _ in stored_rows(folder / "generations.jsonl", benchmarks):
        add(answers[benchmark.name][i], row)
    return answers


def regrade(folder: Path) -> None:
    """Grade the stored responses again by the grader of today; report how many grades changed."""
    file, path = folder / "settings.json", folder / "generations.jsonl"
    if not file.exists() or not path.exists():
        raise ValueError(f"{folder} holds no evaluation to grade again (no settings.json or generations.jsonl)")
    settings = json.loads(file.read_text(encoding="utf-8"))
    benchmarks = []
    for name, stored in settings["benchmarks"].items():
        path_of = Path(stored["file"])
        per_level, system = settings["problems_per_level"], settings["system"]
        benchmarks.append(load_benchmark(name, path_of, stored["samples"], per_level, system))
        stored["sha256"] = sha256(path_of)  # a gold may have been corrected; the ids are checked row by row
    changed = rows = 0
    partial = folder / "generations.jsonl.partial"
    with partial.open("w", encoding="utf-8") as out:
        for benchmark, i, row, _ in stored_rows(path, benchmarks):
            problem = benchmark.problems[i]
            reward, read = grade_response(row["response"], problem.answer, benchmark.options.get(problem.id, ()))
            new = row | {"reward": 0.0 if row["truncated"] else reward, "read": read}
            out.write(json.dumps(new, ensure_ascii=False) + "\n")
            changed, rows = changed + (new["reward"] != row["reward"]), rows + 1
    partial.replace(path)
    settings |= {"grader": grader_version(), "regraded": now()}
    write_text(file, json.dumps(settings, indent=1, ensure_ascii=False) + "\n")
    print(f"{rows} responses graded again, {changed} grades changed")
    if rows < sum(len(b.problems) * b.samples for b in benchmarks):
        raise ValueError(f"{folder} is not complete, so it has no results yet: continue it with --out {folder}")
    report(folder, settings, count(folder, benchmarks))


# ---- the command line


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise ValueError(f"{message} (see python eval.py --help)")


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(description="Evaluate a model on benchmarks.", allow_abbrev=False)
    parser.add_argument("--model", help="a HuggingFace model folder or hub name")
    parser.add_argument("--benchmarks", default="", help=f"{', '.join(FILES)}, or paper: the first nine")
    parser.add_argument("--data", type=Path, help="problems of your own, JSONL (format: data/README.md)")
    parser.add_argument("--samples", type=int, help="k of each problem (default: the paper's, 32 or 1)")
    parser.add_argument("--temperature", type=float, default=0.6, help="0 is greedy (default 0.6, the paper's)")
    parser.add_argument("--max_response_tokens", type=int, default=8192, help="(default 8192, the paper's)")
    parser.add_argument("--problems", type=int, help="only the first N of each level")
    parser.add_argument("--system", help="system message, in place of the one in the rows")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="folder (default: a fresh evals/MODEL-NNN); an old one is continued")
    parser.add_argument("--regrade", type=Path, metavar="DIR", help="grade the responses stored in DIR again")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"))
    parser.add_argument("--rows_per_call", type=int, default=512, help="responses sampled together (default 512)")
    args = parser.parse_args(argv)
    for name in ("samples", "max_response_tokens", "problems", "rows_per_call"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}, expected at least 1")
    if not 0 <= args.temperature <= 10:
        raise ValueError(f"temperature is {args.temperature}, expected 0 (greedy) to 10")
    if not args.model and not args.regrade:
        raise ValueError("give --model, a HuggingFace model folder or hub name (see python eval.py --help)")
    return args


def show(folder: Path, settings: dict[str, Any]) -> None:
    """What will run, before it does."""
    print(f"evaluation -> {folder}/")
    sets = ", ".join(f"{n} {b['problems']} x {b['samples']}" for n, b in settings["benchmarks"].items())
    for key, value in (settings | {"benchmarks": f"{sets} (problems x samples)"}).items():
        text = value if isinstance(value, str) and key != "first_prompt" else json.dumps(value, ensure_ascii=False)
        print(f"  {key:<20} {text if len(text) <= 300 else text[:300] + ' …'}")
    for name, stored in settings["benchmarks"].items():
        if stored["left_out"]:
            print(f"  {name}: {stored['left_out']} problems left out: the grader cannot read their gold answer")


def run(args: argparse.Namespace) -> None:
    """A whole evaluation: load, check, sample what is missing, report."""
    benchmarks = choose_benchmarks(args.benchmarks, args.data, args.samples, args.problems, args.system)
    if args.temperature == 0 and max(b.samples for b in benchmarks) > 1:
        raise ValueError("temperature 0 is greedy, so all samples would be equal: give --samples 1 or a temperature")
    model, tokenizer = load_model(args.model, pick_device(args.device))
    encode_benchmarks(model, tokenizer, benchmarks, args.max_response_tokens)
    settings = describe(args, model, tokenizer, benchmarks)
    folder = open_folder(args, settings)
    settings = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
    show(folder, settings)
    sample_missing(model, tokenizer, folder, benchmarks, args)
    report(folder, settings, count(folder, benchmarks))


def main() -> None:
    try:
        args = parse_args(sys.argv[1:])
        regrade(args.regrade) if args.regrade else run(args)
    except ValueError as error:
        print(f"eval.py: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        words = [*sys.argv, *(["--out", str(args.out)] if args.out and "--out" not in sys.argv else [])]
        print(f"\nstopped; to go on: python {shlex.join(words)}", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
