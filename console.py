"""What a run shows: a block at the start, one progress line, samples, a table at the end.

On a terminal the progress line updates in place and samples are coloured; piped, there is a plain line every
LINE_EVERY steps and no colour. Everything goes to stdout but the bar.
"""

import dataclasses
import shlex
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from config import Config

LINE_EVERY = 10  # steps between plain lines when the output is piped
SAMPLE_EVERY = 20  # steps between samples
BARS = "▁▂▃▄▅▆▇█"


def colour(text: str, code: str) -> str:
    return f"\033[{code}m{text}\033[0m" if sys.stdout.isatty() else text


def describe(metrics: dict[str, Any]) -> str:
    """The figures of one step in a line."""
    names = {
        "reward_on_policy": "reward",
        "reward_hybrid": "hybrid",
        "prefix_fraction": "prefix",
        "loss": "loss",
        "entropy": "entropy",
        "response_tokens": "length",
        "truncated": "cut off",
        "tokens_per_second": "tok/s",
    }
    if metrics.get("reward_on_policy") is not None:
        names.pop("loss")
    parts = []
    for key, name in names.items():
        value = metrics.get(key)
        if value is not None:
            parts.append(f"{name} {value:.0f}" if value >= 10 else f"{name} {value:.2f}")
    return "  ".join(parts)


def sparkline(values: list[float], top: float = 1.0) -> str:
    return "".join(BARS[min(len(BARS) - 1, int(v / top * len(BARS)))] for v in values)


def show(text: str = "") -> None:
    """A line above the progress bar."""
    tqdm.write(text, file=sys.stdout)
    sys.stdout.flush()


class Progress:
    """The progress line of a run of `total` steps, `done` of them finished."""

    def __init__(self, total: int, done: int):
        self.total = total
        self.bar = tqdm(total=total, initial=done, unit="step", disable=not sys.stderr.isatty(), dynamic_ncols=True)

    def step(self, step: int, metrics: dict[str, Any], samples: list[dict[str, Any]]) -> None:
        self.bar.set_postfix_str(describe(metrics), refresh=False)
        self.bar.update()
        if self.bar.disable and (step % LINE_EVERY == 0 or step == self.total):
            show(f"step {step}/{self.total}  {describe(metrics)}")
        if step % SAMPLE_EVERY == 0:
            for sample in samples:
                show_sample(sample)

    def close(self) -> None:
        self.bar.close()


def show_sample(sample: dict[str, Any]) -> None:
    right = sample["reward"] > 0
    verdict = "right" if right else "cut off" if sample["truncated"] else f"wrong, answer {sample['answer']}"
    prefix = colour(sample["prefix"], "34") + ("|" if sample["hybrid"] else "")
    show(f"  {sample['problem']}  {'hybrid' if sample['hybrid'] else 'on-policy'}")
    show(f"    {prefix}{sample['continuation']}  [{colour(verdict, '32' if right else '31')}]")


def command(config: Config, folder: Path) -> str:
    """The command line that continues the run in `folder`."""
    given = dataclasses.asdict(config) | {"out": str(folder), "resume": "auto"}
    words = [
        f"--{field.name} {shlex.quote(str(given[field.name]))}"
        for field in dataclasses.fields(Config)
        if given[field.name] != field.default
    ]
    return " ".join(["python train.py", *words])


def show_start(run: Any, folder: Path, left_out: dict[str, int], total: int, done: int) -> None:
    """What will run, on what; the first prompt as the model sees it."""
    config, data = run.config, run.data
    parameters = sum(p.numel() for p in run.model.parameters())
    show(f"{config.method}: {total} steps" + (f", continued after step {done}" if done else "") + f" -> {folder}/")
    show(f"  model      {config.model}, {parameters / 1e6:.2f} M parameters, on {run.model.device}")
    dropped = "".join(f", {count} left out ({why})" for why, count in left_out.items())
    show(f"  problems   {len(data.train)} of {config.data}, {len(data.demonstrated)} with demonstrations{dropped}")
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
    show(f"             ids {first[:24]}{' …' if len(first) > 24 else ''}")


def show_end(folder: Path, scores: dict[str, Any], figure: str) -> None:
    """Accuracy before and after by level, what was written, what to try next."""
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
    show(f"\nwritten to {folder}/: {figure}, metrics.jsonl, samples.jsonl, eval.json, final/ (the model)")
    show(f'try it       python sample.py --model {folder}/final "612;B*2;C-7;A+4?"')
    show(f"compare      python plot.py {folder} OTHER_RUN …")
