"""When should one use Prefix-RFT? This file makes the runs that answer it, over numbers of steps, numbers of
demonstrations and base models (PROTOCOL.md).

    python results/horizon.py run [--jobs 2] [--store DIR]     do what is missing, in the protocol's order
    python results/horizon.py again NAME                       one stored run once more: the same to the bit?

A job is a base model to pretrain, a trial of some settings, or a run. Each job is a process on one core. When it is
done, it is stored as one small file, DIR/NAME.json (default: results/horizon). A stopped command goes on when it is
given again. Only the jobs at which it was stopped are begun anew. Models and data are in runs/horizon and are made
again if they are missing.

Left out are checkpoints within a job, which takes about ten minutes, and the report (report.py).
"""

import hashlib
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from data.make_recipes import TRAIN_PROBLEMS, make_splits, write_jsonl
from step import Run
from support.checkpoint import sha256, write_text
from support.command import Parser, command
from support.config import Config, from_dict
from train import accuracy, one_step, prepare, stages

STORE, WORK = Path("results/horizon"), Path("runs/horizon")
BUDGETS = (60, 120, 240, 480)  # steps at which a run is evaluated
MOST = BUDGETS[-1]
TEMPERATURES = {"greedy": 0.0, "T = 0.6": 0.6, "T = 1": 1.0}
METHODS = ("prefix-rft", "sft-rft", "luffy", "rft")
SUPERVISED = 10  # steps of reinforcement that have as many tokens as the 64 supervised updates of sft-rft
TRIAL_SEED = 1000
TEST_SEED = 1_000_003  # the seed of base 0's test problems; the next base's is larger by 10
RATES = (1e-4, 5e-5)  # rates of the first two trials; the third goes on in the better direction
SECOND = {  # what the fourth trial changes at the best rate
    "prefix-rft": {"entropy_keep": 0.5},
    "sft-rft": {"sft_lr_end": 0.1},
    "luffy": {"coefficient": 0.3},
    "rft": {"clip_high": 0.28},
}
Stored = dict[str, dict[str, Any]]  # what DIR/NAME.json holds, by NAME


@dataclass(frozen=True)
class Cell:
    """Training problems and their demonstrations."""

    problems: str  # habit has all 512 problems; silent has the 128 of them with six instructions
    demonstrations: int
    tuned_in: str  # the cell whose trials choose the settings
    expert: str = "expert"
    bases: int = 3


CELLS = {
    "habit-512": Cell("habit", 512, "habit-512", bases=6),
    "silent-128": Cell("silent", 128, "silent-128", bases=6),
    "habit-32": Cell("habit", 32, "habit-512"),
    "habit-512-short": Cell("habit", 512, "habit-512", "short"),
    "silent-8": Cell("silent", 8, "silent-128"),
}


@dataclass(frozen=True)
class Job:
    """A job is a trial (1 to 4), a run (trial 0), or, with the method "base", a base model to pretrain and
    evaluate."""

    cell: str
    method: str
    base: int
    steps: int = MOST
    trial: int = 0

    @property
    def name(self) -> str:
        if self.method == "base":
            return f"base{self.base}"
        what = f"trial{self.trial}" if self.trial else f"base{self.base}-{self.steps}"
        return f"{self.cell}-{self.method}-{what}"

    @property
    def model(self) -> Path:
        return WORK / f"base{self.base}" if self.base else Path(Config.model)


def plan() -> list[Job]:
    """Returns all jobs in the protocol's order: those of the primary contrast first, then cell after cell."""
    jobs = []
    for name, cell in CELLS.items():
        for methods in (METHODS[:2], METHODS[2:]):
            if cell.tuned_in == name:
                jobs += [Job(name, method, 0, trial=number) for number in (1, 2, 3, 4) for method in methods]
            for base in range(cell.bases):
                jobs += [Job("", "base", base), *(Job(name, method, base) for method in methods)]
        jobs += [Job(name, METHODS[0], base, steps) for steps in BUDGETS[-2::-1] for base in range(cell.bases)]
    return list(dict.fromkeys(jobs))


# ---- settings


def trial_score(line: dict[str, Any]) -> float:
    """Returns the mean validation accuracy over the temperatures; 0 if the trial diverged."""
    (last,) = line["budgets"].values()
    return 0.0 if "diverged" in last else sum(last[name]["all"] for name in TEMPERATURES) / len(TEMPERATURES)


def settings_of(job: Job, stored: Stored) -> dict[str, Any] | None:
    """Returns the settings that differ from train.py's defaults, beside data, seed and steps; None if earlier trials
    are missing."""
    needed = range(1, job.trial or 5)
    trials = [stored.get(Job(CELLS[job.cell].tuned_in, job.method, 0, trial=number).name) for number in needed]
    if job.trial in (1, 2):
        return {"lr": RATES[job.trial - 1]}
    if None in trials:
        return None
    if job.trial == 3:
        lower_is_better = trial_score(trials[1]) > trial_score(trials[0])
        return {"lr": RATES[1] / 2 if lower_is_better else 2 * RATES[0]}
    best = max(trials, key=trial_score)["settings"]
    return best | SECOND[job.method] if job.trial else best


def configuration(job: Job, settings: dict[str, Any]) -> Config:
    """Returns the whole run for train.py. Its held-out problems are those of the base."""
    values = {"model": str(job.model), "test_data": str(WORK / f"test{job.base}.jsonl")}
    values |= {"seed": TRIAL_SEED if job.trial else job.base, "eval_data": "data/recipes/validation.jsonl"}
    if job.method != "base":
        cell = CELLS[job.cell]
        share = cell.demonstrations / (TRAIN_PROBLEMS if cell.problems == "habit" else TRAIN_PROBLEMS // 4)
        values |= {"method": job.method, "data": str(WORK / f"{job.cell}.jsonl"), "demonstration_fraction": share}
        values["steps"] = job.steps - SUPERVISED if job.method == "sft-rft" else job.steps
    return from_dict(values | settings)


def make_files(job: Job) -> None:
    """Write the problems that a job needs, always with the same bytes, and pretrain its base if it is missing."""
    WORK.mkdir(parents=True, exist_ok=True)
    if not job.model.exists():
        words = [sys.executable, "data/make_base.py", "--seed", str(job.base), "--out", str(job.model)]
        subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
    write_jsonl(WORK / f"test{job.base}.jsonl", make_splits(fresh_seed=TEST_SEED + 10 * job.base)["fresh"])
    if job.method != "base":
        cell = CELLS[job.cell]
        rows = make_splits(cell.expert, demonstrated=TRAIN_PROBLEMS)["train"]
        if cell.problems == "silent":
            rows = [row for row in rows if row["problem"].count(";") == 6]
        write_jsonl(WORK / f"{job.cell}.jsonl", rows)


# ---- one job


def measure(run: Run, which: str) -> dict[str, Any]:
    """Returns the accuracy at each temperature, by level, and a fingerprint of the weights."""
    weights = b"".join(parameter.detach().numpy().tobytes() for parameter in run.model.parameters())
    scores: dict[str, Any] = {"weights": hashlib.sha256(weights).hexdigest()[:12]}
    for name, temperature in TEMPERATURES.items():
        table = accuracy(run, which, temperature, "")
        scores[name] = {level: round(row["accuracy"], 4) for level, row in table.items()}
    return scores


def budgets(run: Run, job: Job) -> Iterator[tuple[str, dict[str, Any]]]:
    """Train, and at each budget of this run note its scores and its cost up to there."""
    total, cost = sum(stages(run)), Counter(seconds=0.0, sampled=0, trained=0, supervised=0)
    # it is less than 0 if the supervised updates are more than the steps that they count as
    counted = job.steps - total
    due = BUDGETS if job.method != "prefix-rft" and not job.trial else (job.steps,)
    for step in range(total):
        start = time.process_time()
        metrics, _ = one_step(run, step)
        cost["seconds"] += time.process_time() - start
        cost["sampled"] += metrics.get("sampled_tokens", 0)
        cost["trained" if "reward" in metrics else "supervised"] += metrics["trained_tokens"]
        if run.skipped >= 3:
            yield str(job.steps), {"diverged": step + 1}
            return
        if step + 1 + counted in due:
            told = {name: round(value) for name, value in cost.items()}
            yield str(step + 1 + counted), measure(run, "validation" if job.trial else "test") | told


def line_of(job: Job, settings: dict[str, Any]) -> dict[str, Any]:
    """Do a job and return what is stored of it."""
    torch.set_num_threads(1)
    make_files(job)
    config = configuration(job, settings)
    run, _ = prepare(config)
    files = {"base": job.model / "model.safetensors", "train": Path(config.data), "test": Path(config.test_data)}
    commit = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=12"], capture_output=True, text=True)
    line = asdict(job) | {"seed": config.seed, "settings": settings, "commit": commit.stdout.strip()}
    line["made_of"] = {name: sha256(path)[:12] for name, path in files.items()}
    line["budgets"] = {"0": measure(run, "test")} if job.method == "base" else dict(budgets(run, job))
    return line


def make(job: Job, settings: dict[str, Any], store: Path) -> str:
    """Runs a job in a process of its own, stores its line, and returns what to print."""
    line = line_of(job, settings)
    write_text(store / f"{job.name}.json", json.dumps(line, indent=1) + "\n")
    scores = list(line["budgets"].values())[-1]
    return f"{job.name}: " + ", ".join(f"{name} {scores[name]['all']}" for name in TEMPERATURES if name in scores)


# ---- all of them


def read_stored(store: Path) -> Stored:
    return {path.stem: json.loads(path.read_bytes()) for path in sorted(store.glob("*.json"))}


def ready(store: Path) -> Iterator[tuple[Job, dict[str, Any]]]:
    """Returns the jobs that can be done now, in order, with their settings."""
    stored = read_stored(store)
    for job in plan():
        if job.method == "base":
            if job.name not in stored or not job.model.exists():
                yield job, {}
        elif job.name not in stored and job.model.exists():
            settings = settings_of(job, stored)
            if settings is not None:
                yield job, settings


def run_all(store: Path, jobs: int) -> None:
    """Do the jobs, `jobs` at a time, each as soon as what it needs is there."""
    store.mkdir(parents=True, exist_ok=True)
    running: dict[Future, Job] = {}
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        while True:
            for job, settings in ready(store):
                if len(running) < jobs and job not in running.values():
                    running[pool.submit(make, job, settings, store)] = job
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                del running[future]
                print(future.result(), flush=True)


def again(store: Path, name: str) -> bool:
    """Returns whether a stored job, made once more, gives the same line but for seconds and commit."""
    before = read_stored(store)[name]
    job = Job(*(before[field] for field in ("cell", "method", "base", "steps", "trial")))
    lines = before, line_of(job, before["settings"])
    for line in lines:
        del line["commit"]
        for scores in line["budgets"].values():
            scores.pop("seconds", None)
    return lines[0] == lines[1]


@command("horizon.py")
def main() -> None:
    parser = Parser(description="The runs of the study of the horizon.")
    parser.add_argument("command", choices=("run", "again"))
    parser.add_argument("name", nargs="?", help="for again: a stored run's name, as habit-512-prefix-rft-base0-480")
    parser.add_argument("--jobs", type=int, default=1, help="processes, one core each (%(default)s)")
    parser.add_argument("--store", type=Path, default=STORE, help="folder of the stored runs (%(default)s)")
    args = parser.parse_args()
    store = args.store.resolve()
    os.chdir(Path(__file__).resolve().parents[1])
    if args.command == "run":
        run_all(store, args.jobs)
    elif args.name not in read_stored(store):
        parser.error(f"again needs the name of a stored run in {store}, found {args.name}")
    else:
        same = again(store, args.name)
        print(f"{args.name}: {'the same to the bit' if same else 'NOT the same'}")
        sys.exit(not same)


if __name__ == "__main__":
    main()
