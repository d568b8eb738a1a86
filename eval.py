"""This command samples a model's responses to benchmark problems, grades them, and reports accuracy and pass@k.

    python eval.py --model DIR_OR_NAME --benchmarks math500,aime24 | paper | embedded    -> a fresh evals/MODEL-NNN/
    torchrun --nproc_per_node 8 eval.py …             does so on 8 processes (ranks); each samples its share
    python eval.py … --out evals/MODEL-NNN            continues an evaluation where it was stopped
    python eval.py --regrade evals/MODEL-NNN          grades its stored responses again and samples nothing

The order of this file: `evaluate` (the function that train.py calls), the checks, sampling the missing responses, and
the command line. An evaluation's folder gets settings.json and generations.jsonl with a line per response
(evaluation/folder.py), then results.json, results.md (evaluation/report.py) and passk.png. A response that is cut off
by max_response_tokens is wrong, as in training. The metric `unread` is the share of responses that are not cut off
but have no readable boxed answer. Random draws are a pure function of (seed, problem, sample), so an evaluation that
is stopped and continued writes the same files as an uninterrupted evaluation. Several ranks write the same files as
one process, up to rounding: which rows share a batch depends on the number of ranks. Not supported are top-p below 1,
majority voting, tools, and models too large for one GPU.
"""

import argparse
import itertools
import json
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from data.loader import Encoded, Problem, encode_prompts, odd_rows
from evaluation.benchmarks import FILES, Benchmark, all_draws, choose_benchmarks
from evaluation.folder import choose_folder, count, cut_broken_line, describe, opened, regrade, stored_settings
from evaluation.multiple_choice import grade_response
from evaluation.report import write_report
from evaluation.statistics import Answers, pass_at_k
from fast.check import check_model
from fast.decode import loop_of, whole_blocks
from model import load_model
from reward import MATH, Reward, RewardError, load_reward
from sample import Row, generate
from support import distributed
from support.checkpoint import append_rows, trained_with
from support.command import Parser, command
from support.config import check_options
from support.errors import Broken, InputError
from support.loading import check_window, pick_device, use_one_thread_if_small, window_of
from support.memory import row_bytes

__all__ = ["evaluate", "pass_at_k"]

LINE_SECONDS = 15  # seconds between progress lines if the output is not a terminal
ROWS = 512  # number of responses that are sampled together if memory allows


class Draw(NamedTuple):
    """One response that is to be sampled: its problem and the number of the sample."""

    problem: Problem
    encoded: Encoded
    options: Sequence[str]
    sample: int


def respond(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    draws: Sequence[Draw],
    *,
    reward: Reward,
    temperature: float,
    max_response_tokens: int,
    seed: int,
    rows_per_call: int,
    decode: Callable | None = None,
    progress: str | None = None,
) -> list[dict[str, Any]]:
    """Returns a graded response for each draw: {"id", "sample", "reward", "read", "truncated", "tokens",
    "response"}."""
    rows = [Row(i, (seed, "eval", d.problem.id, d.sample), d.encoded.prompt_ids, []) for i, d in enumerate(draws)]
    settings = {"rows_per_call": rows_per_call, "decode": decode, "progress": progress}
    answers = []
    for draw, row in zip(draws, generate(model, tokenizer, rows, max_response_tokens, temperature, **settings)):
        value, read = grade_response(reward, row.text, draw.problem, draw.options)
        answer = {"id": draw.problem.id, "sample": draw.sample, "reward": 0.0 if row.truncated else value}
        answer |= {"read": read, "truncated": row.truncated, "tokens": len(row.response), "response": row.text}
        answers.append(answer)
    return answers


def evaluate(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    problems: Sequence[Problem],
    encoded: Sequence[Encoded],
    *,
    reward: Reward = MATH,
    samples: int = 1,
    temperature: float = 0.0,
    max_response_tokens: int,
    seed: int = 0,
    rows_per_call: int = ROWS,
    decode: Callable | None = None,
    progress: str | None = None,
) -> list[Answers]:
    """Samples and grades `samples` responses to each problem. Returns the counts of graded responses for each
    problem, as `statistics.summarize` takes them.

    With temperature 0 the responses are greedy.
    """
    draws = [Draw(p, e, (), k) for p, e in zip(problems, encoded) for k in range(samples)]
    settings = {"reward": reward, "temperature": temperature, "max_response_tokens": max_response_tokens}
    settings |= {"seed": seed}
    settings |= {"rows_per_call": rows_per_call, "decode": decode, "progress": progress}
    rows = respond(model, tokenizer, draws, **settings)
    answers = [Answers(problem.id, problem.level) for problem in problems]
    for i, row in enumerate(rows):
        answers[i // samples].add(row)
    return answers


# ---- checks


def encode_benchmarks(
    model: PreTrainedModel, tokenizer: Tokenizer, benchmarks: list[Benchmark], max_response_tokens: int
) -> int:
    """Encodes the prompts of all benchmarks (Benchmark.encoded) and returns the length of the longest prompt in
    tokens.

    Raises InputError if a prompt and its response can be longer than the model's window.
    """
    for benchmark in benchmarks:
        benchmark.encoded = encode_prompts(tokenizer, benchmark.problems)
    longest = max(len(e.prompt_ids) for b in benchmarks for e in b.encoded)
    check_window(window_of(model.config), longest, max_response_tokens, "max_response_tokens")
    return longest


def rows_that_fit(model: PreTrainedModel, columns: int) -> int:
    """Returns how many rows of `columns` tokens are sampled together: ROWS, or fewer on CUDA if not so many fit on
    every GPU."""
    fit = ROWS
    if model.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(model.device)
        try:
            # `repeated` is True, because in layers with sliding windows HF's attention copies keys and values for all
            # heads
            row = row_bytes(model.config, whole_blocks(columns), repeated=True)
        except Exception as error:  # reading an unusual model's config can raise any error
            raise InputError(f"the memory of a response is unknown ({error}): give --rows_per_call") from error
        fit = max(1, min(ROWS, int(0.8 * free / row)))
    return min(distributed.gather_dict({distributed.rank(): fit}).values())


# ---- sampling what is missing


def sample_missing(
    model: PreTrainedModel, tokenizer: Tokenizer, folder: Path, benchmarks: list[Benchmark], args: argparse.Namespace
) -> None:
    """Sample and grade the responses that generations.jsonl lacks, `rows_per_call` on each rank at a time."""
    path, total = folder / "generations.jsonl", sum(len(b.problems) * b.samples for b in benchmarks)
    size = args.rows_per_call * distributed.world_size()
    done = distributed.from_rank_0(cut_broken_line(path, benchmarks) if distributed.rank() == 0 else None)
    draws = itertools.islice(all_draws(benchmarks), done, None)
    start, tokens = time.perf_counter(), 0
    quiet, seldom = distributed.rank() > 0, 0.1 if sys.stderr.isatty() else LINE_SECONDS
    with tqdm(total=total, initial=done, unit="response", file=sys.stdout, disable=quiet, mininterval=seldom) as bar:
        # a resumed evaluation begins with a shorter batch, so that later batches have the same rows as in an
        # uninterrupted evaluation
        while batch := list(itertools.islice(draws, size - done % size)):
            rows = respond(
                model,
                tokenizer,
                [Draw(b.problems[i], b.encoded[i], b.options.get(b.problems[i].id, ()), k) for b, i, k in batch],
                reward=args.reward,
                temperature=args.temperature,
                max_response_tokens=args.max_response_tokens,
                seed=args.seed,
                rows_per_call=args.rows_per_call,
                decode=loop_of(model),
            )
            append_rows(path, [{"benchmark": b.name} | row for (b, _, _), row in zip(batch, rows)])
            tokens += sum(row["tokens"] for row in rows)
            bar.update(len(batch))
            done += len(batch)
            bar.set_postfix_str(f"{tokens / (time.perf_counter() - start):.0f} tokens/s")


def report(folder: Path, settings: dict[str, Any], answers: dict[str, list[Answers]]) -> None:
    """Write and print the report of a finished evaluation, and draw its figure."""
    write_report(folder, settings, answers)
    print(f"written to {folder}/: generations.jsonl, settings.json, results.json, results.md, {figure(folder)}")


def figure(folder: Path) -> str:
    """Draw passk.png if matplotlib is installed, and return the text that the command prints about the figure."""
    try:
        from plot import draw_pass_at_k
    except ImportError:
        return f"(no passk.png: pip install matplotlib, then python plot.py --compare {folder})"
    return draw_pass_at_k([folder], folder / "passk.png").name


# ---- the command line


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(description="Evaluate a model on benchmarks.")
    parser.add_argument("--model", help="a HuggingFace model folder or hub name")
    parser.add_argument("--benchmarks", default="", help=f"any of {', '.join(FILES)}; paper: the first nine of them")
    parser.add_argument("--data", type=Path, help="problems of your own, JSONL (format: data/README.md)")
    parser.add_argument(
        "--samples", type=int, help="number of responses to each problem (default: as in the paper, 32 or 1)"
    )
    parser.add_argument(
        "--temperature", type=float, default=0.6, help="sampling temperature; 0 is greedy (default: 0.6 [paper])"
    )
    parser.add_argument(
        "--max_response_tokens", type=int, default=8192, help="limit of tokens of a response (default: 8192 [paper])"
    )
    parser.add_argument("--problems", type=int, help="evaluate only the first N problems of each level of difficulty")
    parser.add_argument("--system", help="system message (default: as in the model's training, else as in the data)")
    parser.add_argument("--reward", help="math (default), exact, or FILE.py[:name], a function of your own")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--out", type=Path, help="a new folder, or an evaluation to continue (default: a new evals/MODEL-NNN)"
    )
    parser.add_argument(
        "--regrade", type=Path, metavar="DIR", help="grade the responses in DIR again; allows no option but --reward"
    )
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"))
    parser.add_argument(
        "--rows_per_call", type=int, help=f"number of responses sampled together (default {ROWS}, or as many as fit)"
    )
    args = parser.parse_args(argv)
    for word in argv:
        option = word.partition("=")[0]
        if args.regrade and option.startswith("--") and option not in ("--regrade", "--reward"):
            raise InputError(f"--regrade does not read {option}: leave it out")
    check_options(args, samples=1, max_response_tokens=1, problems=1, rows_per_call=1, seed=0)
    if not args.model and not args.regrade:
        raise InputError("give --model, a HuggingFace model folder or hub name (see python eval.py --help)")
    return args


def show(folder: Path, settings: dict[str, Any], remembered: dict[str, Any]) -> None:
    """Print the evaluation's settings, and each setting that differs from the model's training."""
    print(f"evaluation -> {folder}/")
    for key, value in settings.items():
        print(f"  {key:<20} {json.dumps(value, ensure_ascii=False)[:300]}")
    for name, value in remembered.items():
        if value is not None and settings[name] != value:
            print(f"  the model was trained with another {name}: {json.dumps(value, ensure_ascii=False)[:300]}")
    for name, stored in settings["benchmarks"].items():
        for text in odd_rows(stored["file"]):
            print(f"  warning: {text}")
        if stored["left_out"]:
            print(f"  {name}: {stored['left_out']} problems left out: they cannot be graded (see data/README.md)")


def run(args: argparse.Namespace) -> None:
    """Make a whole evaluation: load, check, sample the missing responses, report. Every rank calls this function;
    rank 0 writes."""
    remembered = trained_with(args.model)
    args.reward = load_reward(args.reward or "math")
    args.system = remembered.get("system") if args.system is None else args.system
    benchmarks = choose_benchmarks(args.benchmarks, args.data, args.samples, args.problems, args.system, args.reward)
    if args.temperature == 0 and max(b.samples for b in benchmarks) > 1:
        raise InputError("temperature 0 is greedy, so all samples would be equal: give --samples 1 or a temperature")
    device = pick_device(args.device)
    distributed.start(device)
    model, tokenizer = load_model(args.model, device, check=check_model)
    use_one_thread_if_small(model)
    longest = encode_benchmarks(model, tokenizer, benchmarks, args.max_response_tokens)
    args.rows_per_call = args.rows_per_call or distributed.from_rank_0(stored_settings(args.out)).get("rows_per_call")
    args.rows_per_call = args.rows_per_call or rows_that_fit(model, longest + args.max_response_tokens)
    settings = None
    if distributed.rank() == 0:
        args.out, settings = choose_folder(args, describe(args, model, tokenizer, benchmarks))
    args.out = distributed.from_rank_0(args.out)
    with opened(args.out, settings):
        if settings:
            show(args.out, settings, remembered)
        try:
            sample_missing(model, tokenizer, args.out, benchmarks, args)
        except RewardError as error:
            raise Broken(f"{error}; mend this fault") from error
        if settings:
            report(args.out, settings, count(args.out, benchmarks))


def go_on(args: argparse.Namespace) -> str:
    """Returns the command line that continues this evaluation."""
    out = ["--out", str(args.out)] if args.out and "--out" not in sys.argv else []
    return f"{distributed.launcher()} {shlex.join([*sys.argv, *out])}"


@command("eval.py", distributed.name, RewardError)
def main() -> None:
    try:
        args = parse_args(sys.argv[1:])
        if args.regrade:
            distributed.start(torch.device("cpu"))
            if distributed.rank() == 0:
                report(args.regrade, *regrade(args.regrade, args.reward))
        else:
            run(args)
        distributed.stop()
    except (Broken, RuntimeError) as error:
        message = " ".join(str(error).split())[:160]
        lower = f"{message}: give a smaller --rows_per_call or --max_response_tokens ({args.max_response_tokens})"
        reason = str(error) if isinstance(error, Broken) else distributed.explain(error, lower)
        if not reason:
            raise
        raise Broken(f"{reason}; to go on: {go_on(args)}") from error
    except KeyboardInterrupt:
        if distributed.rank() == 0:
            print(f"\nstopped; to go on: {go_on(args)}", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
