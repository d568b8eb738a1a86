"""This file prints the output of a run: a block at the start, a progress line, samples, and a table at the end.

On a terminal the progress line is updated in place, and samples appear above it. Piped output has a line of key=value
pairs every LINE_EVERY steps and no samples; the samples are in samples.jsonl.
"""

import dataclasses
import shlex
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from support.config import Config
from support.distributed import launcher, rank, world_size
from support.loading import pick_device
from support.watch import Watch

LINE_EVERY = 10  # number of steps between lines when the output is piped
LINE_SECONDS = 60  # seconds after which a line is printed even if LINE_EVERY steps are not done
ESTIMATE_AFTER = 5  # number of steps after which the remaining time is estimated
SAMPLE_EVERY = 20  # number of steps between samples on a terminal
SHOWN = {  # metrics of the progress line and their short names (a step shows only metrics that it has)
    "reward_on_policy": "reward",
    "reward_hybrid": "hybrid",
    "prefix_fraction": "prefix",
    "response_tokens": "length",
    "truncated": "cut_off",
    "loss": "loss",
    "tokens_per_second": "tokens/s",
}


def show(text: str = "") -> None:
    """Print a line above the progress bar. With several ranks only rank 0 prints."""
    if rank() > 0:
        return
    tqdm.write(text, file=sys.stdout)
    sys.stdout.flush()


def figures(metrics: dict[str, Any]) -> dict[str, str]:
    """Returns the metrics of one step as text, by their short names. Metrics without a value are skipped."""
    shown = {name: metrics[key] for key, name in SHOWN.items() if metrics.get(key) is not None}
    if "reward" in shown:
        shown.pop("loss", None)  # the loss of reinforcement is hidden, because its value means little (see loss.py)
    return {name: f"{value:.0f}" if value >= 10 else f"{value:.2f}" for name, value in shown.items()}


def warn(text: str) -> None:
    show(f"warning: {text}")


class Progress:
    """The progress bar of a run of `total` steps, of which `done` are finished. With `tensorboard` the class also
    writes TensorBoard's files."""

    def __init__(self, folder: Path, total: int, done: int, tensorboard: bool, watch: Watch):
        self.total, self.watch, self.first = total, watch, done
        self.begun = self.last_line = time.perf_counter()
        quiet = not sys.stderr.isatty() or rank() > 0
        self.bar = tqdm(total=total, initial=done, unit="step", disable=quiet, dynamic_ncols=True)
        self.writer = None
        if tensorboard and rank() == 0:
            from torch.utils.tensorboard import SummaryWriter  # tensorboard is an optional package

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
        shown = figures(metrics) | ({"warnings": str(len(self.watch.warnings))} if self.watch.warnings else {})
        self.bar.set_postfix_str(" ".join(f"{name} {value}" for name, value in shown.items()), refresh=False)
        self.bar.update()
        if not sys.stdout.isatty():
            now = time.perf_counter()
            if step % LINE_EVERY == 0 or step == self.total or now - self.last_line > LINE_SECONDS:
                self.last_line = now
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
    """Print one rollout: problem, prefix, continuation and whether it is right. A bar (|) ends the prefix."""
    right = sample["reward"] == 1
    verdict = "right" if right else "cut off" if sample["truncated"] else f"wrong, the answer is {sample['answer']}"
    prefix = sample["prefix"] + "|" if sample["hybrid"] else ""
    show(f"  {'hybrid   ' if sample['hybrid'] else 'on-policy'}  {sample['problem']}")
    show(f"    {prefix}{sample['continuation']}  {verdict}")


def command(config: Config, folder: Path) -> str:
    """Returns the command line that continues the run in `folder`."""
    settings = dataclasses.asdict(config) | {"out": str(folder), "resume": "auto"}
    words = [
        f"--{field.name} {shlex.quote(str(settings[field.name]))}"
        for field in dataclasses.fields(Config)
        if settings[field.name] != field.default
    ]
    return " ".join([launcher(), "train.py", *words])


def show_start(run: Any, folder: Path, counts: Any, total: int, done: int) -> None:
    """Print the run's method, model, device and data, and the first prompt as the model sees it."""
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
    show(f"  prompt     {run.tokenizer.decode(data.encoded[0].prompt_ids)!r}")
    show(f"             ids {data.encoded[0].prompt_ids}")


def show_base(base: dict[str, Any]) -> None:
    """Print the test accuracy of the untrained model."""
    if not base["test"]:
        return
    levels = "  ".join(f"{level} {100 * row['accuracy']:.1f}" for level, row in base["test"].items())
    show(f"  base       {levels}   (% right, test, greedy)")


def memory_advice(error: BaseException, config: Config) -> str:
    """Returns advice for the `error` of a full memory: which settings to lower."""
    names = ("rows_per_call", "micro_batch_tokens", "max_response_tokens")
    lower = ", ".join(f"{name} ({getattr(config, name)})" for name in names)
    message = " ".join(str(error).split())[:160]
    return f"{message}: lower {lower}, or set offload to true; python plan.py shows what they take"


def show_end(
    folder: Path, scores: dict[str, Any], figure: str, problem: str, warnings: dict[str, str], final: str
) -> None:
    """Print the accuracy before and after training by level, the run's warnings again, the files, and commands to try
    next.

    `final` describes the model in the folder final/.
    """
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
    show()
    for text in warnings.values():
        warn(text)
    groups = (folder / "groups.jsonl").exists()
    files = [figure, "metrics.jsonl", "samples.jsonl", *["groups.jsonl"] * groups, "eval.json", "checkpoint/"]
    show(f"\nwritten to {folder}/: {', '.join(files)}, final/ ({final})")
    show(f"try it       python sample.py --model {folder}/final {shlex.quote(problem)}")
    if groups:
        show(f"one group    python plot.py --group {folder}")
    show(f"compare      python plot.py {folder} OTHER_RUN …")
