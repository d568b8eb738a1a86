"""What the speed benches share: the default run of rft, its rows, timers, results as JSON."""

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from measure import machine

import step as steps
from config import Config, from_dict
from sample import Row
from train import prepare

RESULTS = Path(__file__).parent / "results"
BUDGET, PROBLEMS = Config.max_response_tokens, Config.prompts_per_step


def new_run(**settings) -> steps.Run:
    """The default run of rft, at learning rate 0, one thread."""
    with tempfile.TemporaryDirectory() as folder:
        run, _ = prepare(from_dict({"method": "rft", "lr": 0.0, "out": f"{folder}/run"} | settings))
    torch.set_num_threads(1)
    return run


def picked_at(run: steps.Run, step: int) -> list[int]:
    return steps.pick(len(run.data.train), run.config.prompts_per_step, step, run.config.seed, "order")


def rows_at(run: steps.Run, step: int) -> list[Row]:
    encoded = [run.data.encoded[i] for i in picked_at(run, step)]
    return steps.plan(encoded, run.method, run.config, step, run.config.rollouts_per_prompt)


def timed(call: Callable) -> tuple[object, float, float]:
    """-> result, CPU seconds, wall seconds"""
    cpu, wall = time.process_time(), time.perf_counter()
    result = call()
    return result, time.process_time() - cpu, time.perf_counter() - wall


def write(part: str, table: dict) -> None:
    RESULTS.mkdir(exist_ok=True)
    text = json.dumps({"machine": machine(), **table}, indent=1)
    (RESULTS / f"throughput-{part}.json").write_text(text + "\n")
    print(f"{part}\n{text}", flush=True)


def medians(times: dict[str, list[tuple[float, float]]], first: str) -> dict:
    """Per contender: median CPU and wall seconds, and the median over the repeats of its ratio to `first`."""
    table = {}
    for name, pairs in times.items():
        cpu, wall = zip(*pairs)
        ratios = [a / b for (a, _), (b, _) in zip(pairs, times[first])]
        walls = [a / b for (_, a), (_, b) in zip(pairs, times[first])]
        table[name] = {
            "cpu_s": round(statistics.median(cpu), 3),
            "wall_s": round(statistics.median(wall), 3),
            f"cpu_ratio_to_{first}": round(statistics.median(ratios), 2),
            f"wall_ratio_to_{first}": round(statistics.median(walls), 2),
            "cpu_ratio_range": [round(min(ratios), 2), round(max(ratios), 2)],
        }
    return table


def main(parts: dict[str, Callable]) -> None:
    """Run the parts named on the command line."""
    unknown = set(sys.argv[1:]) - set(parts)
    if unknown or not sys.argv[1:]:
        sys.exit(f"{Path(sys.argv[0]).name}: found {sorted(unknown) or 'no part'}, expected of {', '.join(parts)}")
    for part in sys.argv[1:]:
        parts[part]()
