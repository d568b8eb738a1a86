"""What the benches share: the default run of rft and its rows, timers, peak memory, results as JSON."""

import argparse
import contextlib
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import transformers
from torch.profiler import ProfilerActivity, profile

import step as steps
from sample import Row
from support.config import parse_config
from support.errors import Broken, InputError
from train import prepare

RESULTS = Path(__file__).parent / "results"


def new_run(words: Sequence[str] = ()) -> steps.Run:
    """The default run of rft, or that of train.py's settings `words`, at learning rate 0, one thread."""
    with tempfile.TemporaryDirectory() as folder:
        run, _ = prepare(replace(parse_config(list(words)), method="rft", lr=0.0, out=f"{folder}/run"))
    torch.set_num_threads(1)
    return run


def picked_at(run: steps.Run, step: int) -> list[int]:
    return steps.problems_of_step(len(run.data.train), run.config.prompts_per_step, step, run.config.seed, "order")


def rows_at(run: steps.Run, step: int) -> list[Row]:
    picked = picked_at(run, step)
    return steps.plan(run, picked, range(len(picked)), step, run.config.rollouts_per_prompt, rows=run.method.rows)


def clocks() -> tuple[float, float]:
    """CPU and wall seconds, of work that is done: on CUDA the queue is emptied first."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.process_time(), time.perf_counter()


def timed(call: Callable) -> tuple[object, float, float]:
    """-> result, CPU seconds, wall seconds"""
    cpu, wall = clocks()
    result = call()
    end = clocks()
    return result, end[0] - cpu, end[1] - wall


@contextlib.contextmanager
def peak_memory() -> Iterator[list[int]]:
    """The most bytes of tensors held at once inside, beyond what stood before, is in the list given, at the end.

    Every allocation counts, also those inside kernels. CPU: the profiler's memory events; CUDA: the allocator's own
    record.
    """
    found: list[int] = []
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield found
        torch.cuda.synchronize()
        found.append(torch.cuda.max_memory_allocated() - before)
        return
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as record:
        yield found
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    found.append(peak)


def peak_bytes(work: Callable[[], object]) -> int:
    with peak_memory() as found:
        work()
    return found[0]


def machine() -> dict[str, str | int]:
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {names[0] if names else '?'}"
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    return {"device": device, "threads": torch.get_num_threads(), "python": platform.python_version(), **versions}


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


def chosen(doc: str, known: Iterable[str] = (), least: str = "*", words: Sequence[str] | None = None) -> list[str]:
    """The parts of a bench that the command line (`words`) names, of `known`; --help prints `doc`, starts nothing."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    if known:
        parser.add_argument("parts", nargs=least, metavar="PART", help=", ".join(known))
    names = getattr(parser.parse_args(words), "parts", [])
    if unknown := [name for name in names if name not in known]:
        parser.error(f"found {unknown[0]!r}, expected of {', '.join(known)}")
    return names


def main(doc: str, parts: dict[str, Callable], settings: bool = False) -> None:
    """Run the parts named on the command line; with `settings` each is given what follows them there."""
    words = sys.argv[1:]
    first = next((i for i, word in enumerate(words) if word.startswith("--") and word != "--help"), len(words))
    for part in chosen(doc, parts, "+", words[:first] if settings else words):
        try:
            parts[part](*[words[first:]] * settings)
        except (InputError, Broken, ModuleNotFoundError) as error:  # some parts need more (requirements-dev.txt)
            sys.exit(f"{Path(sys.argv[0]).name}: {error}")
