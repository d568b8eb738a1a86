"""What the benches share: timers, peak memory, results as JSON, --help."""

import argparse
import contextlib
import json
import platform
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import transformers
from torch.profiler import ProfilerActivity, profile

RESULTS = Path(__file__).parent / "results"


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


def parts_of(doc: str, known: Iterable[str] = ()) -> list[str]:
    """The parts of a bench that the command line names; --help prints `doc`."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    if known:
        parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(known))
    names = getattr(parser.parse_args(), "parts", [])
    if unknown := [name for name in names if name not in known]:
        parser.error(f"found {unknown[0]!r}, expected of {', '.join(known)}")
    return names
