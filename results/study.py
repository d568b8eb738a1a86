"""The study of the methods (README.md: protocol and verdicts): its trials, its runs, its report.

    python results/study.py tune|run|ceiling|report [--regime R] [--methods a,b] [--seeds 0,1] [--jobs N] [--quick]

tune makes the trials that the protocol asks for, run the runs with the settings that the trials chose, ceiling takes
256 samples of each of some problems from the models of finished runs (ceiling.py), report writes tables, figures and
verdicts from what is stored. Without --regime, --methods or --seeds: all that the protocol has; for ceiling: its five
models, seed 0.
--quick: 4 methods x 2 seeds of habit, stored and reported under runs/study/quick.

A trial or run is a process of its own that calls train.train in runs/study/NAME, so a stopped one goes on from its
checkpoint; when it is done, a line is added to results/study/REGIME.jsonl (runs.line_of). A stored run is done again
only where three steps of its configuration now give other metrics than those in its line. The base model is evaluated
once a regime ("method": "base"); runs do not evaluate it on the test problems, nor do trials see these.
"""

import argparse
import contextlib
import fcntl
import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from support.errors import Broken, InputError

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from tqdm import tqdm

from results import ceiling
from results.protocol import (
    EQUAL,
    REGIMES,
    TRIAL_SEED,
    Line,
    check_names,
    next_trials,
    run_settings,
    seeds_of,
    stem_of,
    supervised_stage,
    trials_of,
    tuning_base,
)
from results.runs import RUNS, Spec, alike, line_of, make_data, probe, spec_of
from results.stored import check_stored
from support.checkpoint import append_rows, write_text
from support.config import given_settings

STORE = Path("results/study")
QUICK = ("sft", "rft", "sft-rft", "prefix-rft")
UNREAD = {"tune": ("seeds",), "report": ("regime", "methods", "seeds", "jobs")}  # words that a command does not read

# ---- several processes


def work(function: Callable[[Spec], Any], spec: Spec, answer: Any) -> None:
    """The process of one Spec: sends (True, result), (False, why it failed) or, stopped by a signal, nothing."""
    os.setpgrp()  # Ctrl-C goes to the first process alone, which passes on a SIGTERM
    torch.set_num_threads(1)
    (RUNS / "log").mkdir(parents=True, exist_ok=True)
    log = (RUNS / f"log/{spec.name}.txt").open("a")
    with log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        try:
            answer.send((True, function(spec)))
        except (InputError, Broken) as error:
            answer.send((False, f"{spec.name}: {error}"))
        except KeyboardInterrupt:
            answer.close()


def in_processes(
    function: Callable[[Spec], Any], specs: Sequence[Spec], jobs: int, unit: str = "step"
) -> Iterator[tuple[Spec, Any]]:
    """(spec, function(spec)) as they end, `jobs` at a time, with a progress bar in steps, or in specs if `unit` is
    another. InputError if one fails, when those that run have been stopped."""
    context, waiting = multiprocessing.get_context("spawn"), list(specs)
    running: dict[Any, tuple[Spec, Any]] = {}
    size, rest = (steps_to_do, left_of) if unit == "step" else (lambda spec: 1,) * 2
    bar = tqdm(total=sum(map(size, specs)), unit=unit, smoothing=0.05, disable=not sys.stderr.isatty())
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                ours, theirs = context.Pipe(duplex=False)
                process = context.Process(target=work, args=(function, waiting[0], theirs))
                process.start()
                theirs.close()
                running[ours] = waiting.pop(0), process
            for ours in wait(list(running), timeout=2):
                spec, process = running.pop(ours)
                try:
                    good, result = ours.recv()
                except EOFError:
                    good, result = False, f"{spec.name} was stopped: see {RUNS}/log/{spec.name}.txt"
                process.join()
                if not good:
                    raise InputError(result)
                yield spec, result
            left = sum(map(size, waiting)) + sum(rest(spec) for spec, _ in running.values())
            bar.n = bar.total - left
            bar.refresh()
    finally:
        for _, process in running.values():
            process.terminate()
        for _, process in running.values():
            process.join()
        bar.close()


def steps_to_do(spec: Spec) -> int:
    return 0 if spec.method == "base" else spec.steps


def left_of(spec: Spec) -> int:
    """Steps that a running Spec has still to do."""
    log = RUNS / spec.name / "metrics.jsonl"
    return steps_to_do(spec) - (log.read_bytes().count(b"\n") if log.exists() else 0)


# ---- the commands


class Study:
    """The stored lines of a regime, and how lines are added."""

    def __init__(self, regime: str, store: Path, jobs: int):
        self.regime, self.jobs = regime, jobs
        self.path = store / f"{regime}.jsonl"
        self.lines = check_stored(self.path, regime)

    def make(self, specs: Sequence[Spec]) -> None:
        """Make those of `specs` that are not stored, or whose stored line is stale, and store them."""
        stored = {spec_of(line).key: line for line in self.lines}
        old = {replace(s, seed=0).key: s for s in specs if s.key in stored and s.method != "base"}
        now = {replace(s, seed=0).key: found for s, found in in_processes(probe, list(old.values()), self.jobs)}

        def is_fresh(line: Line) -> bool:
            return line["method"] == "base" or alike(line["probe"], now[replace(spec_of(line), seed=0).key])

        todo = [spec for spec in specs if not (spec.key in stored and is_fresh(stored[spec.key]))]
        stale = sum(spec.key in stored for spec in todo)
        tqdm.write(f"{self.regime}: {len(todo)} of {len(specs)} to do" + f", {stale} of them stale" * bool(stale))
        begun = time.perf_counter()
        for number, (spec, line) in enumerate(in_processes(line_of, todo, self.jobs), 1):
            self.store(spec, line)
            hours = (time.perf_counter() - begun) / 3600 * (len(todo) - number) / number
            score = line["scores"].get("validation", {}).get("greedy", 0.0)
            left = f"{number} of {len(todo)}, about {hours:.1f} h left"
            tqdm.write(f"{spec.name}: validation {100 * score:.1f}% ({left})")
            sys.stdout.flush()

    def store(self, spec: Spec, line: Line) -> None:
        """Add a line, or put it in the place of the one it replaces."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        same = [i for i, other in enumerate(self.lines) if spec_of(other).key == spec.key]
        if not same:
            self.lines.append(line)
            append_rows(self.path, [line])
            return
        self.lines[same[0]] = line
        write_text(self.path, "".join(json.dumps(other, ensure_ascii=False) + "\n" for other in self.lines))

    def tune(self, methods: Sequence[str]) -> None:
        """Trials until the protocol asks for none more; the supervised stage of a method goes before it."""
        stems = [stem_of(method) for method in methods]
        stages = [stage for stem in stems if (stage := supervised_stage(stem))]
        for group in (stages, [stem for stem in stems if stem not in stages]):
            while True:
                specs = []
                for stem in dict.fromkeys(group):
                    trials = trials_of(stem, self.lines)
                    wanted = next_trials(stem, tuning_base(self.regime, stem, self.lines), trials)
                    specs += [Spec(self.regime, stem, TRIAL_SEED, settings, True) for settings in wanted]
                if not specs:
                    break
                self.make(specs)

    def run(self, methods: Sequence[str], seeds: Sequence[int], tuning: Sequence[Line]) -> None:
        """The base, then every method with every seed, in the protocol's order."""
        base = Spec(self.regime, "base", 0, {})
        plain = [method for method in methods if method != EQUAL]
        equal = [method for method in methods if method == EQUAL]
        for batch in filter(None, (plain, equal)):  # the second looks at the runs of the first
            specs = [base]
            for method in batch:
                chosen_seeds = [seed for seed in seeds_of(self.regime, method) if not seeds or seed in seeds]
                for settings in run_settings(self.regime, method, self.lines, tuning):
                    specs += [Spec(self.regime, method, seed, settings) for seed in chosen_seeds]
            self.check_settings(specs)
            self.make(specs)

    def check_settings(self, specs: Sequence[Spec]) -> None:
        """InputError where a run is stored with other settings than it has now."""
        for spec in specs:
            for number, line in enumerate(self.lines, 1):
                same = (line["method"], line["seed"], line["trial"]) == (spec.method, spec.seed, False)
                same &= all(line["settings"].get(k) == spec.settings.get(k) for k in ("demonstrations", "expert"))
                if same and line["settings"] != spec.settings:
                    raise InputError(
                        f"{self.path}:{number}: {spec.method}, seed {spec.seed} was run with {line['settings']}, the "
                        f"trials choose {spec.settings}: delete the line to run it again"
                    )


def measure_ceiling(store: Path, methods: Sequence[str], seeds: Sequence[int], jobs: int) -> None:
    """pass@k of the runs that have none yet, each stored in ceiling.jsonl as it is done."""
    path, runs = store / f"{ceiling.NAME}.jsonl", check_stored(store / f"{ceiling.REGIME}.jsonl", ceiling.REGIME)
    lines = check_stored(path, ceiling.REGIME)
    wanted = ceiling.runs_to_measure(methods, seeds, runs)
    todo = [spec_of(run) for run in wanted if not ceiling.is_measured(run, lines)]
    for spec in todo:
        ceiling.check_folder(spec)
    ceiling.make_problems()
    tqdm.write(f"{ceiling.NAME}: {len(todo)} of {len(wanted)} models to do")
    for spec, line in in_processes(ceiling.ceiling_line, todo, jobs, "model"):
        line["probe"] = next(run.get("probe", []) for run in wanted if spec_of(run) == spec)
        lines = [other for other in lines if ceiling.who(other) != ceiling.who(line)] + [line]
        write_text(path, "".join(json.dumps(other, ensure_ascii=False) + "\n" for other in lines))
        first, last = (100 * line["scores"]["all"][f"pass@{k}"] for k in (1, ceiling.SAMPLES))
        tqdm.write(f"{spec.name}: pass@1 {first:.1f}%, pass@{ceiling.SAMPLES} {last:.1f}%")
        sys.stdout.flush()


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """InputError where another study.py writes to the same results."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise InputError(f"another study.py is at work on these results ({path}): wait for it") from error
        yield


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="The study: trials, runs, report.", allow_abbrev=False)
    parser.add_argument("command", choices=("tune", "run", "ceiling", "report"))
    parser.add_argument("--regime", default="", help=f"one of {', '.join(REGIMES)} (default: all)")
    parser.add_argument(
        "--methods", default="", help="keys of methods.METHODS, or sft-rft-equal; with commas between"
    )
    parser.add_argument("--seeds", default="", help="with commas between (default: the protocol's)")
    parser.add_argument("--jobs", type=int, default=multiprocessing.cpu_count(), help="processes (default: cores)")
    parser.add_argument(
        "--quick", action="store_true", help=f"{', '.join(QUICK)} x seeds 0, 1 of habit, stored apart"
    )
    args = parser.parse_args(argv)
    args.regimes = [args.regime] if args.regime else list(REGIMES)
    args.methods = args.methods.split(",") if args.methods else []
    if not all(word.isdecimal() for word in args.seeds.split(",") if args.seeds):
        raise InputError(f"seeds is {args.seeds!r}, expected whole numbers with commas between")
    args.seeds = [int(word) for word in args.seeds.split(",")] if args.seeds else []
    args.store = STORE
    if args.quick:
        if args.command in ("tune", "ceiling") or args.methods or args.seeds or args.regime:
            raise InputError("--quick chooses regime, methods and seeds itself: give it to run or report alone")
        args.regimes, args.methods, args.seeds, args.store = ["habit"], list(QUICK), [0, 1], RUNS / "quick"
    if unread := [name for name in given_settings(argv) if name in UNREAD.get(args.command, ())]:
        raise InputError(f"{args.command} does not read --{unread[0]}: leave it out")
    if args.command == "ceiling":
        if args.regime not in ("", ceiling.REGIME):
            raise InputError(f"ceiling is measured of the runs of {ceiling.REGIME}: leave --regime out")
        if other := [name for name in args.methods if name not in ceiling.METHODS]:
            raise InputError(f"method {other[0]!r}: ceiling is measured of {', '.join(ceiling.METHODS)}")
    else:
        check_names(args.regimes, args.methods)
    if args.jobs < 1:
        raise InputError(f"jobs is {args.jobs}, expected at least 1")
    asked = [(regime, method) for regime in args.regimes for method in args.methods or REGIMES[regime].methods]
    known = {seed for regime, method in asked for seed in seeds_of(regime, method)}
    if unknown := sorted(set(args.seeds) - known):
        raise InputError(
            f"seeds has {unknown[0]}, the protocol for these methods {', '.join(map(str, sorted(known)))}"
        )
    return args


def main() -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    try:
        args = parse(sys.argv[1:])
        os.chdir(Path(__file__).resolve().parents[1])
        make_data(list(REGIMES))
        if args.command == "ceiling":
            with locked(RUNS / f"{args.store.name}-{ceiling.NAME}.lock"):
                measure_ceiling(args.store, args.methods or ceiling.METHODS, args.seeds or [0], args.jobs)
        for regime in args.regimes if args.command in ("tune", "run") else []:
            methods = args.methods or REGIMES[regime].methods
            with locked(RUNS / f"{args.store.name}-{regime}.lock"):
                study = Study(regime, args.store, args.jobs)
                if args.command == "tune" and REGIMES[regime].tuned_in == regime:
                    study.tune(methods)
                elif args.command == "run":
                    tuned_in = REGIMES[regime].tuned_in
                    study.run(methods, args.seeds, check_stored(STORE / f"{tuned_in}.jsonl", tuned_in))
        if args.command == "report" or args.quick:
            from results.report import README, write_report  # matplotlib, which training does not need

            for path in write_report(args.store, None if args.quick else README):
                print(path)
    except (InputError, Broken) as error:
        print(f"study.py: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nstudy.py: stopped; the same command goes on", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
