"""What a run shows: a block at the start, one progress line, samples, a table at the end.

On a terminal one line updates in place and coloured samples appear above it. Piped, there is one line of key=value
pairs every LINE_EVERY steps, no colour and no samples (they stand in samples.jsonl).
"""

import dataclasses
import json
import shlex
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from tqdm import tqdm

from support.config import Config
from support.distributed import launcher, rank, world_size
from support.loading import pick_device
from support.watch import Watch

LINE_EVERY = 10  # steps between lines when the output is piped
LINE_SECONDS = 60  # or so long after the last line
ESTIMATE_AFTER = 5  # steps, from which the time of the others is estimated
SAMPLE_EVERY = 20  # steps between samples on a terminal
SHOWN = {  # metrics of the progress line and their short names, for either kind of step
    "reward_on_policy": "reward",
    "reward_hybrid": "hybrid",
    "prefix_fraction": "prefix",
    "response_tokens": "length",
    "truncated": "cut_off",
    "loss": "loss",
    "tokens_per_second": "tokens/s",
}
BARS = "▁▂▃▄▅▆▇█"


def colour(text: str, code: int) -> str:
    return f"\033[{code}m{text}\033[0m" if sys.stdout.isatty() else text


def show(text: str = "") -> None:
    """A line above the progress bar; of several ranks the first alone speaks."""
    if rank() > 0:
        return
    tqdm.write(text, file=sys.stdout)
    sys.stdout.flush()


def sparkline(values: list[float]) -> str:
    """A curve of values between 0 and 1 in one line."""
    return "".join(BARS[min(len(BARS) - 1, int(value * len(BARS)))] for value in values)


def figures(metrics: dict[str, Any]) -> dict[str, str]:
    """Short names and values of a step's metrics, without those it has not."""
    chosen = {name: metrics[key] for key, name in SHOWN.items() if metrics.get(key) is not None}
    if "reward" in chosen:
        chosen.pop("loss", None)  # of reinforcement: its value means little (loss.py)
    return {name: f"{value:.0f}" if value >= 10 else f"{value:.2f}" for name, value in chosen.items()}


def warn(text: str) -> None:
    show(colour(f"warning: {text}", 33))


class Progress:
    """The progress of a run of `total` steps, `done` of them finished; optionally TensorBoard files too."""

    def __init__(self, folder: Path, total: int, done: int, tensorboard: bool, watch: Watch):
        self.total, self.watch, self.first = total, watch, done
        self.begun = self.said = time.perf_counter()
        quiet = not sys.stderr.isatty() or rank() > 0
        self.bar = tqdm(total=total, initial=done, unit="step", disable=quiet, dynamic_ncols=True)
        self.writer = None
        if tensorboard and rank() == 0:
            from torch.utils.tensorboard import SummaryWriter  # an extra, imported where it is used

            self.writer = SummaryWriter(folder / "tensorboard", purge_step=done + 1)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.bar.close()
        if self.writer:
            self.writer.close()

    def step(self, step: int, metrics: dict[str, Any], samples: list[dict[str, Any]]) -> None:
        for text in metrics.get("warnings", {}).values():
            warn(text)
        shown = figures(metrics) | ({"warnings": str(len(self.watch.said))} if self.watch.said else {})
        self.bar.set_postfix_str(" ".join(f"{name} {value}" for name, value in shown.items()), refresh=False)
        self.bar.update()
        if not sys.stdout.isatty():
            now = time.perf_counter()
            if step % LINE_EVERY == 0 or step == self.total or now - self.said > LINE_SECONDS:
                self.said = now
                show(f"step={step}/{self.total} " + " ".join(f"{k}={v}" for k, v in shown.items()))
        elif step % SAMPLE_EVERY == 0:
            for sample in samples:
                show_sample(sample)
        if step == self.first + ESTIMATE_AFTER < self.total:
            seconds = (time.perf_counter() - self.begun) / ESTIMATE_AFTER * (self.total - step)
            show(f"  time       about {max(1, round(seconds / 60))} min for the other steps, without evaluations")
        for name, value in metrics.items():
            if self.writer and isinstance(value, int | float):
                self.writer.add_scalar(name, value, step)


def show_sample(sample: dict[str, Any]) -> None:
    """Problem, prefix, continuation and verdict of a row; the prefix ends at the bar."""
    right = sample["reward"] == 1
    verdict = "right" if right else "cut off" if sample["truncated"] else f"wrong, the answer is {sample['answer']}"
    prefix = colour(sample["prefix"], 34) + "|" if sample["hybrid"] else ""
    show(colour(f"  {'hybrid   ' if sample['hybrid'] else 'on-policy'}  {sample['problem']}", 2))
    show(f"    {prefix}{sample['continuation']}  {colour(verdict, 32 if right else 31)}")


def command(config: Config, folder: Path) -> str:
    """The command line that continues the run in `folder`."""
    given = dataclasses.asdict(config) | {"out": str(folder), "resume": "auto"}
    words = [
        f"--{field.name} {shlex.quote(str(given[field.name]))}"
        for field in dataclasses.fields(Config)
        if given[field.name] != field.default
    ]
    return " ".join([launcher(), "train.py", *words])


def show_start(run: Any, folder: Path, counts: Any, total: int, done: int) -> None:
    """What will run, on what; the first prompt as the model sees it."""
    config, data = run.config, run.data
    parameters = sum(p.numel() for p in run.model.parameters())
    show(f"{config.method}: {total} steps" + (f", continued after step {done}" if done else "") + f" -> {folder}/")
    ranks = f", {world_size()} ranks" if world_size() > 1 else ""
    device = pick_device(config.device)
    where = f"{device}{ranks}" + (", bf16 compute" if device.type == "cuda" else "")
    show(f"  model      {config.model}, {parameters / 1e6:.2f} M parameters, on {where}")
    demonstrated = sum(bool(problem.demonstrations) for problem in data.encoded)
    dropped = "".join(f", {count} left out ({why})" for why, count in counts.left_out.items())
    show(f"  problems   {len(data.train)} of {config.data}, {demonstrated} with demonstrations{dropped}")
    for what, count in counts.noted.items():
        show(f"             {count} demonstrations {what}")
    held = ", ".join(f"{len(problems)} {name}" for name, (problems, _) in data.held.items())
    show(f"  held out   {held or 'none: give --eval_data and --test_data to see accuracy'}")
    if "rl" in run.method.stages:
        rows = config.prompts_per_step * config.rollouts_per_prompt
        show(
            f"  each step  {config.prompts_per_step} problems x {config.rollouts_per_prompt} rollouts = {rows} rows, "
            f"{config.updates_per_step} updates, lr {config.lr:g}"
        )
    first = data.encoded[0].prompt_ids
    show(f"  prompt     {run.tokenizer.decode(first)!r}")
    show(f"             ids {first}")


def show_base(base: dict[str, Any]) -> None:
    """Accuracy of the untrained model."""
    if not base["test"]:
        return
    levels = "  ".join(f"{level} {100 * row['accuracy']:.1f}" for level, row in base["test"].items())
    show(f"  base       {levels}   (% right, test, greedy)")


PHASES = {  # the functions in which memory can be full: what they do, the two settings to lower first
    "accuracy": ("evaluating", "rows_per_call", "eval_response_tokens"),
    "sample_groups": ("sampling", "rows_per_call", "max_response_tokens"),
    "old_stats": ("the log-probs before an update", "micro_batch_tokens", "max_response_tokens"),
    "update": ("an update", "micro_batch_tokens", "max_response_tokens"),
}


def memory_advice(error: BaseException, config: Config) -> str:
    """In which part of a run the error was raised, the sizes, and what to do if it says that memory is full."""
    said = " ".join(str(error).split())[:160]
    called = [frame.name for frame in traceback.extract_tb(error.__traceback__)]
    if not (found := next((PHASES[name] for name in called if name in PHASES), None)):
        return f"loading the model ({said}): set offload to true, or start more ranks (python plan.py)"
    phase, *names = found
    lower = " or ".join(f"{name} ({getattr(config, name)})" for name in names)
    return f"{phase} ({said}): lower {lower}; python plan.py shows what they take"


def curve(folder: Path) -> str:
    """The reward of on-policy rows (or, without any, the validation accuracy) over the run, in one line."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_bytes().splitlines()]  # not at U+2028
    for name, title in (("reward_on_policy", "reward of on-policy rows"), ("eval_all", "validation accuracy")):
        values = [row[name] for row in rows if row.get(name) is not None]
        if values:
            width = -(-len(values) // 60)
            means = [sum(part) / len(part) for part in (values[i : i + width] for i in range(0, len(values), width))]
            return f"{title}  {means[0]:.2f} {sparkline(means)} {means[-1]:.2f}"
    return ""


def show_end(folder: Path, scores: dict[str, Any], figure: str, problem: str, said: dict[str, str]) -> None:
    """Accuracy before and after by level, the run's warnings again, what was written, what to try next."""
    base, trained = scores["base"], scores["trained"]
    for name, title in (("test", "test, greedy"), ("test_sampled", "test, temperature 1")):
        if not trained[name]:
            continue
        show(f"\naccuracy in % [95% interval]: {title}")
        show(f"  {'level':<10}{'base':>22}{'trained':>22}")
        for level in trained[name]:
            cells = (
                f"{100 * row['accuracy']:.1f} [{100 * row['low']:.1f}, {100 * row['high']:.1f}]"
                for row in (base[name][level], trained[name][level])
            )
            show(f"  {level:<10}" + "".join(f"{cell:>22}" for cell in cells))
    show(f"\n{curve(folder)}")
    for text in said.values():
        warn(text)
    groups = (folder / "groups.jsonl").exists()
    files = [figure, "metrics.jsonl", "samples.jsonl", *["groups.jsonl"] * groups, "eval.json", "checkpoint/"]
    show(f"\nwritten to {folder}/: {', '.join(files)}, final/ (the model)")
    show(f"try it       python sample.py --model {folder}/final {shlex.quote(problem)}")
    if groups:
        show(f"one group    python plot.py --group {folder}")
    show(f"compare      python plot.py {folder} OTHER_RUN …")
